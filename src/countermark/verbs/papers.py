"""What `card` and `bom` share: what they read, and the file that they write."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from countermark.files import sha256, write_bytes
from countermark.options import ReadPath, VerbConfig, WrittenPath
from countermark.places import check_new

if TYPE_CHECKING:
    from countermark.papers import Facts


@dataclass(frozen=True, kw_only=True)
class PaperOptions(VerbConfig):
    """Options of verbs that write a paper of a model."""

    model: ReadPath = field(kw_only=False)
    """Model folder."""
    out: WrittenPath | None = None
    """File to write, which must not be there; default MODEL/README.md for a card, where the Hub
    looks for it, and MODEL/bom.json for a bill of materials."""
    evaluation: ReadPath | None = None
    """What countermark evaluate MODEL --strict --json printed; default the figures of
    MODEL/metrics.json, whose adversarial accuracy is that of PGD alone."""


@dataclass(frozen=True)
class Paper:
    """A paper of a model.

    Attributes:
        path: the file.
        sha256: its digest.
        figures: how many measured figures it tells.
    """

    path: str
    sha256: str
    figures: int


def opened(config: PaperOptions, name: str) -> tuple[Path, "Facts"]:
    """The file to write and what it will tell.

    Raises:
        CountermarkError: the file is there already, since a card may have been edited; see also
            `countermark.papers.read_facts`.
    """
    from countermark.papers import read_facts

    folder = Path(config.model)
    path = folder / name if config.out is None else Path(config.out)
    check_new(path)
    evaluation = None if config.evaluation is None else Path(config.evaluation)
    return path, read_facts(folder, evaluation)


def written(path: Path, data: bytes, facts: "Facts") -> Paper:
    """Write a paper."""
    write_bytes(path, data)
    return Paper(str(path), sha256(data), len(facts.figures))


def measures(result: Paper) -> str:
    """How many figures it tells, in words."""
    if not result.figures:
        return "no figures, since the folder has no metrics.json"
    return f"{result.figures} figures"
