"""`countermark bundle check`: is a model folder as its publisher signed it?"""

from dataclasses import dataclass

from countermark.config import BundleCheckConfig
from countermark.report import print_lines
from countermark.signing import check_folder


@dataclass(frozen=True)
class CheckedBundle:
    """A folder whose signature holds.

    Attributes:
        folder: the model folder.
    """

    folder: str


def bundle_check(config: BundleCheckConfig) -> CheckedBundle:
    """Check the signature of a model folder.

    Raises:
        CountermarkError: it has none, or one by another key, or a file was changed, removed or added.
    """
    check_folder(config.model, config.public_key)
    return CheckedBundle(str(config.model))


def show(result: CheckedBundle) -> None:
    """Print that all is well."""
    print_lines(f"the signature of {result.folder} holds: no file was changed, removed or added")
