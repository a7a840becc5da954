"""`countermark data check`: what a place holds, before anything is trained on it."""

from dataclasses import dataclass, field

from countermark.data.check import Findings, check_data
from countermark.options import AnyData, DataOptions, verb
from countermark.terminal import print_lines, print_table, unbroken
from countermark.text import brief

_CLASSES = 40  # that are shown; --json has all
_INDENT = 12  # columns of the words in front of what was found


@dataclass(frozen=True, kw_only=True)
class DataCheckConfig(DataOptions):
    """Check images: good, converted, damaged, duplicate.

    It also says which pools a mark would have.
    """

    place: AnyData = field(kw_only=False)
    """Data set: a name (mnist, cifar10), a folder of class folders, a .npz or Parquet file, or
    module:function; in Python also arrays or a data set."""
    size: int | None = None
    """Side of the squares that images are brought to; default: they must have one shape."""
    skip_damaged: bool = False
    """Leave out images that cannot be read."""


@verb(DataCheckConfig)
def data_check(config: DataCheckConfig) -> Findings:
    """Read everything at a place, keep it in the cache, and say what is there.

    Raises:
        CountermarkError: there is no data at the place, or it is arranged in no way that can be
            read.

    Example:
        >>> findings = cm.data_check("photos", size=16, skip_damaged=True)
        >>> found = findings.found
        >>> found.images, len(found.damaged), found.duplicates
        (182, 2, 2)
        >>> findings.pools["bases"]  # images that watermarks can be made from
        38
    """
    return check_data(
        config.place, size=config.size, skip_damaged=config.skip_damaged, cache=config.cache
    )


def show(findings: Findings) -> None:
    """Print the classes as a table, and the rest in a few lines."""
    from countermark.data.reading import count_of, some

    found, parts = findings.found, list(findings.found.counts)
    rows = [
        [name, *(f"{found.counts[part][label]:,}" for part in parts)]
        for label, name in enumerate(found.class_names[:_CLASSES])
    ]
    if len(found.class_names) > _CLASSES:
        rows.append([f"and {len(found.class_names) - _CLASSES} more classes", *("" for _ in parts)])
    rows.append(["all", *(f"{sum(found.counts[part]):,}" for part in parts)])
    print_lines(
        f"{unbroken(found.place)}: {found.images:,} images of {len(found.class_names)} classes"
    )
    print_table("", ("class", *parts), rows)
    kind = "colour" if found.colour else "grey"
    if found.shapes:
        print_lines(
            f"images:     {kind}, "
            f"{some([f'{shape} ({number:,})' for shape, number in found.shapes.items()])}"
            + ("" if findings.size is None else f", brought to {findings.size}x{findings.size}"),
            hanging=_INDENT,
        )
    if found.converted:
        print_lines(
            "converted:  "
            f"{', '.join(f'{number:,} {what}' for what, number in found.converted.items())}",
            hanging=_INDENT,
        )
    left_out = ", left out" if found.damaged and findings.digest is not None else ""
    print_lines(
        f"damaged:    {len(found.damaged):,}{left_out}{_damaged(found.damaged)}", hanging=_INDENT
    )
    if found.duplicates is not None:
        print_lines(
            f"duplicates: {found.duplicates:,}"
            + (f", {found.disputed:,} of them under another label" if found.disputed else "")
        )
    if found.ignored:
        print_lines(f"ignored:    {count_of(found.ignored, 'other file')}")
    if found.cut:
        print_lines("test part:  there is none, so every sixth image was cut out as one")
    if findings.pools is not None:
        print_lines(
            "pools:      "
            f"{', '.join(f'{number:,} {pool}' for pool, number in findings.pools.items())}",
            hanging=_INDENT,
        )
    if findings.digest is not None:
        print_lines(f"digest:     {findings.digest}")
    print_lines(findings.problem or "It can be used.")


def _damaged(damaged: tuple[tuple[str, str], ...]) -> str:
    from countermark.data.reading import some

    return f": {some([f'{brief(name)} {reason}' for name, reason in damaged])}" if damaged else ""
