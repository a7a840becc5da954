"""Text from outside made safe to show; everything that is printed or put on a page goes through here."""


def visible(text: object) -> str:
    r"""Text on one line in which every character that is not printable is written as its escape.

    File names, answers of servers, names in certificates and fields of files are other people's words.
    Their control characters could clear a terminal or colour it, line ends could forge a line of ours,
    and bidirectional marks could reorder one. They are shown as `\x1b`, `\n` or `\u202e` instead. Doing
    it twice changes nothing.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
