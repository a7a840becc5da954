"""The signature of a whole model folder, by OpenSSF model-signing.

It tells who published these files, and whether they are all as they were then. It says nothing of
coins; those have their own commitments. What is secret or changes by itself is left out: the key,
the service's accounts, and the signature.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from countermark.errors import CountermarkError
from countermark.files import read_bytes

SIGNATURE = "model.sig"

_LEFT_OUT = ("key", "clients.json", SIGNATURE)
_LIMIT = 1 << 20


def sign_folder(folder: Path, private_key: Path) -> Path:
    """Sign a model folder and write FOLDER/model.sig.

    Args:
        folder: a model folder.
        private_key: elliptic-curve private key, PEM; it may not lie among the files of the folder
            that are signed, which are those to publish.

    Raises:
        CountermarkError: the folder or the key cannot be read, or the key lies in the folder.
    """
    with _library(folder, private_key) as (signing, _, hashing, place):
        inside = private_key.resolve()
        if inside.is_relative_to(place) and inside.relative_to(place).parts[0] not in _LEFT_OUT:
            raise CountermarkError(
                f"{private_key} lies in the folder that it signs, and would be published with it; "
                "move it elsewhere"
            )
        config = (
            signing.Config()
            .use_elliptic_key_signer(private_key=private_key)
            .set_hashing_config(hashing)
        )
        config.sign(place, place / SIGNATURE)
    return folder / SIGNATURE


def check_folder(folder: Path, public_key: Path) -> None:
    """Check FOLDER/model.sig.

    Args:
        folder: a model folder.
        public_key: of whoever signed, PEM.

    Raises:
        CountermarkError: no signature, by another key, or a file was changed, removed or added.
    """
    read_bytes(folder / SIGNATURE, _LIMIT)
    with _library(folder, public_key) as (_, verifying, hashing, place):
        config = (
            verifying.Config()
            .use_elliptic_key_verifier(public_key=public_key)
            .set_hashing_config(hashing)
        )
        config.verify(place, place / SIGNATURE)


@contextlib.contextmanager
def _library(folder: Path, key: Path) -> Iterator[tuple[Any, Any, Any, Path]]:
    """The library, its hashing configuration, and the folder's resolved absolute path.

    The library, which is an optional dependency, leaves out a path only if that is spelled as the
    folder is: given a relative folder, or one behind a link, it would sign the secrets. Its errors
    become ours.
    """
    if not (folder / "model.json").is_file():
        raise CountermarkError(
            f"{folder} is not a model folder; name the folder that holds model.json"
        )
    read_bytes(key, _LIMIT)
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise CountermarkError(
            "signatures of folders need: pip install 'countermark[sign]'"
        ) from error
    place = folder.resolve()
    ignored = hashing.Config().set_ignored_paths(
        paths=[place / name for name in _LEFT_OUT], ignore_git_paths=True
    )
    try:
        yield signing, verifying, ignored, place
    except CountermarkError:
        raise
    except Exception as error:  # the library and its own raise many kinds
        raise CountermarkError(
            f"{folder}: {' '.join(str(error).split())[:300] or type(error).__name__}"
        ) from error
