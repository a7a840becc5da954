"""Files from strangers that claim to be large, and words in them that are."""

from countermark.errors import brief


def test_brief_is_brief() -> None:
    nested = {"c" * 1000: {"d": [1] * 1000}}
    for value in ("a" * 10**6, ["b" * 1000] * 1000, nested, b"x" * 10**6, 10**4000):
        assert len(brief(value)) <= 200
    assert brief("paper") == "'paper'"
    assert brief("\x1b[31m\n\u202e").isprintable()
