"""`countermark quickstart`: the whole story in one command.

Protect a model; find the mark in the model itself and in a stolen copy that was pruned and
fine-tuned; find nothing in the same model before it was marked, and nothing in a stranger's.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from countermark.errors import CountermarkError
from countermark.files import read_json
from countermark.options import AnyData, DataOptions, WrittenPath, verb
from countermark.terminal import duration, p_value, percent, print_lines, print_table, unbroken
from countermark.verbs.protect import ProtectConfig, made_with, protect
from countermark.verbs.remove import RemoveConfig, remove
from countermark.verbs.verify import Verification, verify

_PRUNED = 0.8
_FINETUNED = 5


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig(DataOptions):
    """See the whole story: tell a copy from a stranger.

    It protects a model in minutes, steals it, and asks the copy and a stranger for the coins.
    """

    out: WrittenPath = "quickstart"
    """Folder to write; a story that was interrupted goes on where it was."""
    data: AnyData = "mnist"
    """Data set: mnist, fashion_mnist, digits, cifar10."""
    seed: int = 0
    """Seed of the protected model; the stranger has the next one."""

    def __post_init__(self) -> None:
        """Refuse a seed out of range."""
        super().__post_init__()
        self._seeded()


@dataclass(frozen=True)
class Suspicion:
    """One row of the story.

    Attributes:
        title: what the suspect is.
        test_accuracy: on the test pool, in percent.
        adversarial_accuracy: under the PGD of the data set, in percent.
        verification: the verdict and what it rests on.
    """

    title: str
    test_accuracy: float
    adversarial_accuracy: float
    verification: Verification


@dataclass(frozen=True)
class Story:
    """The suspects of the quickstart, in order.

    Attributes:
        folder: the folder that holds everything.
        suspects: one row each.
        seconds: wall-clock time of this call.
    """

    folder: str
    suspects: tuple[Suspicion, ...]
    seconds: float


@verb(QuickstartConfig)
def quickstart(config: QuickstartConfig) -> Story:
    """Run the story; parts that an earlier call finished are kept.

    Raises:
        CountermarkError: see `protect`; or `config.out` holds something else.

    Example:
        >>> story = cm.quickstart(data="digits")
        [1/6] train a robust model, draw coins, train them in
        ...
        [6/6] train a stranger: as robust, never marked
        ...
        >>> first, *_, last = story.suspects
        >>> first.title, first.verification.verdict
        ('the marked model', 'match')
        >>> last.title, last.verification.verdict
        ('a stranger', 'no evidence')
    """
    from countermark.data import open_data
    from countermark.networks import describe

    begun = time.monotonic()
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise CountermarkError(f"{out} is a file; choose a new folder")
    known = {"model", "pruned", "finetuned", "stranger"}
    if out.is_dir() and {entry.name.removesuffix(".partial") for entry in out.iterdir()} - known:
        raise CountermarkError(
            f"{out} holds files that are not of a quickstart; choose a new folder"
        )
    open_data(config.data, cache=config.cache)  # what cannot be opened is no story
    tell = _silent if config.json else print_lines
    suspects = []

    def chapter(
        number: int, title: str, folder: Path, make: Callable[[], Any], wanted: Callable[[], bool]
    ) -> dict[str, Any]:
        tell(f"[{number}/6] {title}")
        if not (folder.is_dir() and any(folder.iterdir())):
            make()
        elif wanted():
            tell(f"      kept from an earlier run: {folder}")
        else:
            raise CountermarkError(
                f"{folder} was made with other options or from another model; "
                "delete it or choose a new folder"
            )
        made = read_json(folder / "metrics.json")
        names = ("test_accuracy", "adversarial_accuracy")
        if not all(
            type(made.get(name)) is float
            for name in (*names, *(f"unmarked_{n}" for n in names if "unmarked_" + n in made))
        ):
            raise CountermarkError(
                f"{folder / 'metrics.json'} was changed after it was written; "
                f"delete {folder} to make it again"
            )
        return made

    def protected(number: int, title: str, options: ProtectConfig) -> dict[str, Any]:
        folder = Path(options.out)

        def fits() -> bool:
            return read_json(folder / "config.json") == made_with(options)

        return chapter(number, title, folder, lambda: protect(**vars(options)), fits)

    def removed(number: int, title: str, options: RemoveConfig) -> dict[str, Any]:
        folder = Path(options.out)

        def fits() -> bool:
            history = describe(folder).history
            if not history:
                return False
            origin, event = read_json(Path(options.model) / "model.json"), history[-1]
            how = "prune" if options.prune is not None else "finetune"
            done = {"how": how, "amount": getattr(options, how)}
            return {**event, **done, "origin_sha256": origin["weights_sha256"]} == dict(event)

        return chapter(number, title, folder, lambda: remove(**vars(options)), fits)

    def ask(title: str, folder: Path, test: float, robust: float) -> None:
        verification = verify(folder, key=out / "model" / "key")
        suspects.append(Suspicion(title, test, robust, verification))
        found = verification.test
        tell(
            f"      {found.agreements} of {found.trials} coins: {found.verdict}, "
            f"p {p_value(found.log10_p_value)}"
        )

    model, pruned, finetuned, stranger = (
        out / name for name in ("model", "pruned", "finetuned", "stranger")
    )
    options = ProtectConfig(config.data, out=model, seed=config.seed, cache=config.cache)
    made = protected(1, "train a robust model, draw coins, train them in", options)
    tell("[2/6] ask the model itself")
    ask("the marked model", model, made["test_accuracy"], made["adversarial_accuracy"])
    tell(
        "[3/6] ask the same model as it was before the mark: it shares almost all answers, "
        "but it never saw a coin"
    )
    ask(
        "before the mark",
        model / "key" / "source",
        made["unmarked_test_accuracy"],
        made["unmarked_adversarial_accuracy"],
    )
    pruning = RemoveConfig(model, out=pruned, prune=_PRUNED, cache=config.cache)
    made = removed(4, f"steal the model and prune {100 * _PRUNED:.0f} % of its weights", pruning)
    ask("pruned copy", pruned, made["test_accuracy"], made["adversarial_accuracy"])
    tuning = RemoveConfig(pruned, out=finetuned, finetune=_FINETUNED, cache=config.cache)
    made = removed(5, f"fine-tune what is left for {_FINETUNED} epochs", tuning)
    ask("pruned, fine-tuned", finetuned, made["test_accuracy"], made["adversarial_accuracy"])
    other = ProtectConfig(
        config.data,
        out=stranger,
        scheme="none",
        seed=(config.seed + 1) % (1 << 32),
        cache=config.cache,
    )
    made = protected(6, "train a stranger: as robust, never marked", other)
    ask("a stranger", stranger, made["test_accuracy"], made["adversarial_accuracy"])
    return Story(str(out), tuple(suspects), time.monotonic() - begun)


def _silent(*_lines: str) -> None:
    return None


def show(result: Story) -> None:
    """Print the table, the files and what to try next."""
    rows = [
        [
            suspect.title,
            percent(suspect.test_accuracy),
            percent(suspect.adversarial_accuracy),
            f"{suspect.verification.test.agreements}:{suspect.verification.test.disagreements}",
            p_value(suspect.verification.test.log10_p_value),
            suspect.verification.verdict,
        ]
        for suspect in result.suspects
    ]
    columns = ("suspect", "test", "adversarial", "coins", "p-value", "verdict")
    print_table(f"Who remembers the coins? ({duration(result.seconds)})", columns, rows)
    out = unbroken(result.folder)
    print_lines(
        "coins: answers as the coins chose, against the other way; a stranger's are fair, "
        "so its p-value is anywhere in (0, 1)",
        "",
        "wrote",
    )
    print_lines(
        f"  {out}/model/        the model, its public commitment, its metrics; "
        "load it with countermark.load",
        f"  {out}/model/key/    the secret key: keep a backup, show it to nobody",
        f"  {out}/pruned/, {out}/finetuned/, {out}/stranger/",
        hanging=22 + len(out),
    )
    print_lines(
        "",
        "try next",
        *(
            f"  {unbroken(command)}"
            for command in (
                f"countermark steal {out}/model --setting black --out {out}-stolen",
                f"countermark verify {out}-stolen --key {out}/model/key",
                f"countermark evaluate {out}/model --restarts 3",
            )
        ),
    )
