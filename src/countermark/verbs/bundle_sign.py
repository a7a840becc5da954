"""`countermark bundle sign`: an OpenSSF signature of a model folder."""

from dataclasses import dataclass

from countermark.config import BundleSignConfig
from countermark.report import print_lines
from countermark.signing import sign_folder


@dataclass(frozen=True)
class SignedBundle:
    """A signed folder.

    Attributes:
        folder: the model folder.
        signature: the file that was written.
    """

    folder: str
    signature: str


def bundle_sign(config: BundleSignConfig) -> SignedBundle:
    """Sign every public file of a model folder.

    Raises:
        CountermarkError: the folder or the key cannot be read.
    """
    return SignedBundle(str(config.model), str(sign_folder(config.model, config.private_key)))


def show(result: SignedBundle) -> None:
    """Print what was written."""
    print_lines(f"wrote {result.signature}; it covers every file of {result.folder} but key/, clients.json and those of git")
