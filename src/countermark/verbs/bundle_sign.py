"""`countermark bundle sign`: an OpenSSF signature of a model folder."""

from dataclasses import dataclass, field
from pathlib import Path

from countermark.options import ReadPath, VerbConfig, verb
from countermark.signing import sign_folder
from countermark.terminal import print_lines, unbroken


@dataclass(frozen=True, kw_only=True)
class BundleSignConfig(VerbConfig):
    """Sign a model folder's public files with model-signing.

    The signature is OpenSSF's, in MODEL/model.sig.
    """

    model: ReadPath = field(kw_only=False)
    """Model folder; its key, clients.json and the signature itself are left out."""
    private_key: ReadPath
    """Elliptic-curve private key, PEM."""


@dataclass(frozen=True)
class SignedBundle:
    """A signed folder.

    Attributes:
        folder: the model folder.
        signature: the file that was written.
    """

    folder: str
    signature: str


@verb(BundleSignConfig)
def bundle_sign(config: BundleSignConfig) -> SignedBundle:
    """Sign every public file of a model folder.

    Raises:
        CountermarkError: the folder or the key cannot be read.

    Example:
        >>> cm.bundle_sign("mine", private_key="signer.pem")
        SignedBundle(folder='mine', signature='mine/model.sig')
    """
    return SignedBundle(
        str(config.model), str(sign_folder(Path(config.model), Path(config.private_key)))
    )


def show(result: SignedBundle) -> None:
    """Print what was written."""
    print_lines(
        f"wrote {unbroken(result.signature)}; it covers every file of "
        f"{unbroken(result.folder)} but key/, clients.json and those of git"
    )
