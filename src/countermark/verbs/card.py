"""`countermark card`: a model card for the Hugging Face Hub."""

import re
from dataclasses import dataclass

from countermark.errors import CountermarkError
from countermark.options import verb
from countermark.terminal import print_lines, unbroken
from countermark.text import brief
from countermark.verbs.papers import Paper, PaperOptions, measures, opened, written

_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True, kw_only=True)
class CardConfig(PaperOptions):
    """Write a model card for readers, and for the Hub.

    It is Markdown with the front matter of the Hugging Face Hub.
    """

    license: str | None = None
    """The Hub's identifier of the licence, such as apache-2.0; without it the card says nothing of
    a licence."""
    tags: tuple[str, ...] = ()
    """Tags besides those that follow from the model."""
    tell_mark: bool = False
    """Say on the card that the model carries a mark. What was told cannot be taken back, so by
    default the card says nothing of it."""

    def __post_init__(self) -> None:
        """Refuse a licence that the Hub would refuse."""
        super().__post_init__()
        if self.license is not None and not _IDENTIFIER.fullmatch(self.license):
            raise CountermarkError(
                "--license takes an identifier of the Hub in small letters, such as apache-2.0, "
                f"not {brief(self.license)}"
            )


@verb(CardConfig)
def card(config: CardConfig) -> Paper:
    """Write the model card of a model folder (see `countermark.papers`).

    Raises:
        CountermarkError: a file cannot be read, the files are of several models, the card is there
            already, or there is no mark to tell of.

    Example:
        >>> made = cm.card("mine", license="apache-2.0", out="card.md")
        >>> made.path, made.figures
        ('card.md', 2)
    """
    from countermark.papers import model_card

    path, facts = opened(config, "README.md")
    text = model_card(facts, license=config.license, tags=config.tags, tell_mark=config.tell_mark)
    return written(path, text.encode(), facts)


def show(result: Paper) -> None:
    """Print what was written."""
    print_lines(f"wrote {unbroken(result.path)}: a model card, {measures(result)}")
