"""`countermark bundle check`: is a model folder as its publisher signed it?"""

from dataclasses import dataclass, field
from pathlib import Path

from countermark.options import ReadPath, VerbConfig, verb
from countermark.signing import check_folder
from countermark.terminal import print_lines, unbroken


@dataclass(frozen=True, kw_only=True)
class BundleCheckConfig(VerbConfig):
    """Check the signature that `bundle sign` made.

    It is an OpenSSF signature of every public file of the model folder.
    """

    model: ReadPath = field(kw_only=False)
    """Model folder with its model.sig."""
    public_key: ReadPath
    """Public key of whoever signed, PEM."""


@dataclass(frozen=True)
class CheckedBundle:
    """A folder whose signature holds.

    Attributes:
        folder: the model folder.
    """

    folder: str


@verb(BundleCheckConfig)
def bundle_check(config: BundleCheckConfig) -> CheckedBundle:
    """Check the signature of a model folder.

    Raises:
        CountermarkError: it has none, or one by another key, or a file was changed, removed or
            added.

    Example:
        >>> signed = cm.bundle_sign("mine", private_key="signer.pem")
        >>> cm.bundle_check("mine", public_key="signer.pub")
        CheckedBundle(folder='mine')
    """
    check_folder(Path(config.model), Path(config.public_key))
    return CheckedBundle(str(config.model))


def show(result: CheckedBundle) -> None:
    """Print that all is well."""
    print_lines(
        f"the signature of {unbroken(result.folder)} holds: no file was changed, removed or added"
    )
