"""`countermark data fetch`: the files of a data set, into the cache."""

from dataclasses import dataclass, field

from countermark import data
from countermark.options import ReadPath, VerbConfig, WrittenPath, verb
from countermark.terminal import print_lines, unbroken


@dataclass(frozen=True, kw_only=True)
class DataFetchConfig(VerbConfig):
    """Fetch the files of a data set into the cache."""

    name: str = field(kw_only=False)
    """Data set: mnist, fashion_mnist, cifar10 (digits needs no files)."""
    source: ReadPath | None = None
    """Folder that has the files (plain or .gz), or the archive of cifar10; no other source is
    tried."""
    cache: WrittenPath | None = None
    """Folder to keep them in; default $COUNTERMARK_CACHE or the system's cache."""

    def __post_init__(self) -> None:
        """Refuse an unknown data set."""
        super().__post_init__()
        data.known(self.name)


@dataclass(frozen=True)
class Fetched:
    """Where a data set lies.

    Attributes:
        name: the data set.
        folder: the folder that holds its files; none for a set that comes with a library.
        files: names of its files.
    """

    name: str
    folder: str | None
    files: tuple[str, ...]


@verb(DataFetchConfig)
def data_fetch(config: DataFetchConfig) -> Fetched:
    """Make sure that the files of a data set are in the cache.

    Raises:
        CountermarkError: unknown name, no source has the files, or a file has the wrong SHA-256.

    Example:
        >>> cm.data_fetch("digits")  # comes with scikit-learn, so it has no files
        Fetched(name='digits', folder=None, files=())
    """
    files = tuple(data.known(config.name).files)
    folder = data.fetch(config.name, config.source, config.cache) if files else None
    if not files:
        data.load_examples(config.name)
    return Fetched(config.name, str(folder) if folder is not None else None, files)


def show(result: Fetched) -> None:
    """Print where the files are."""
    if result.folder is None:
        print_lines(f"{result.name} comes with scikit-learn; there is nothing to fetch")
    else:
        print_lines(
            f"{result.name}: {len(result.files)} files in {unbroken(result.folder)}, "
            "all with the published SHA-256"
        )
