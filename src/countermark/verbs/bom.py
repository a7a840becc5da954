"""`countermark bom`: the bill of materials of a model."""

from dataclasses import dataclass
from datetime import UTC, datetime

from countermark.files import canonical_json
from countermark.options import verb
from countermark.terminal import print_lines, unbroken
from countermark.verbs.papers import Paper, PaperOptions, measures, opened, written


@dataclass(frozen=True, kw_only=True)
class BomConfig(PaperOptions):
    """Write a model's bill of materials (CycloneDX).

    It is a CycloneDX 1.6 ML-BOM in JSON.
    """

    time: bool = False
    """Say when it was made; without it the same folder and releases give the same bytes."""


@verb(BomConfig)
def bom(config: BomConfig) -> Paper:
    """Write the bill of materials of a model folder (see `countermark.papers`).

    Raises:
        CountermarkError: a file cannot be read, the files are of several models, or the bill is
            there already.

    Example:
        >>> first, second = (cm.bom("mine", out=f"bom{number}.json") for number in (1, 2))
        >>> first.sha256 == second.sha256
        True
    """
    from countermark.papers import bill_of_materials

    path, facts = opened(config, "bom.json")
    now = datetime.now(UTC).isoformat(timespec="seconds") if config.time else None
    return written(path, canonical_json(bill_of_materials(facts, timestamp=now)), facts)


def show(result: Paper) -> None:
    """Print what was written."""
    print_lines(f"wrote {unbroken(result.path)}: CycloneDX 1.6, {measures(result)}")
