"""Check the words of code and documents: what the formatter and ruff cannot see.

    python .ci/words.py

It reads Markdown, Python and notebooks.
It complains about prose lines beyond 100 columns in Markdown (a row of a table cannot be wrapped),
decimals without a leading zero, the pronouns of one sex for people, and the words that the glossary
has in its column "not", but for those in italics. The lines of pages that a command writes may have
any length.
"""

import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "benchmarks", "examples", "docs", ".ci")
KINDS = (".md", ".py", ".ipynb")
WIDTH = 100
WRITTEN_BY_COMMANDS = ("docs/results.md", "docs/performance.md", "docs/colour-results.md")
DECIMAL = re.compile(r"(?<![\w.)\]])\.\d")
PRONOUN = re.compile(r"\b(?:he|his|him|himself)\b", re.IGNORECASE)
A_NAME = re.compile(r"\bHe et al\.")  # "Deep residual learning"
GLOSSARY = "docs/glossary.md"
CODE = re.compile(r"`[^`]*`|\]\([^)]*\)|https?://\S+")


def prose_of_markdown(text: str) -> Iterator[tuple[int, str, bool]]:
    """Each line that is no code, with its number and whether it is a row of a table."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, line, line.lstrip().startswith("|")


def prose_of_python(text: str) -> Iterator[tuple[int, str]]:
    """Each line of a comment, and of a string that stands for itself."""
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        alone = token.type == tokenize.STRING and before in (tokenize.NEWLINE, tokenize.INDENT)
        if token.type == tokenize.COMMENT or alone:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.DEDENT):
            before = token.type


def unused_words(glossary: str) -> dict[str, str]:
    """Each word that is not used for a thing, without those in italics, and the word that is."""
    rows = (line.strip("|").split("|") for line in glossary.splitlines() if line.startswith("| "))
    found = ((word.strip(), row[0].strip()) for row in rows for word in row[2].split(","))
    return {word: meant for word, meant in found if word and word != "not" and word[0] not in "*-"}


UNUSED = unused_words((ROOT / GLOSSARY).read_text())
UNUSED_WORD = re.compile(rf"\b({'|'.join(map(re.escape, UNUSED))})(?:e?s)?\b", re.IGNORECASE)


def parts(path: str) -> Iterator[tuple[str, str, bool]]:
    """The texts of a file, with where each is and whether it is Markdown; cells of a notebook."""
    text = (ROOT / path).read_text()
    if not path.endswith(".ipynb"):
        yield path, text, path.endswith(".md")
        return
    for number, cell in enumerate(json.loads(text)["cells"], 1):
        yield f"{path}:cell {number}", "".join(cell["source"]), cell["cell_type"] == "markdown"


def faults(where: str, text: str, markdown: bool) -> Iterator[str]:
    """What is wrong with a text, one line each."""
    if markdown:
        lines = [(number, line, table) for number, line, table in prose_of_markdown(text)]
    else:
        lines = [(number, line, True) for number, line in prose_of_python(text)]
    for number, line, table in lines:
        bare = A_NAME.sub("", CODE.sub("", line))
        free = table or where in WRITTEN_BY_COMMANDS
        if not free and len(CODE.sub("x", line)) > WIDTH:
            yield f"{where}:{number}: {len(line)} columns; break the line after a clause"
        if DECIMAL.search(bare):
            yield f"{where}:{number}: a decimal without its zero: {line.strip()[:60]}"
        if PRONOUN.search(bare):
            yield f"{where}:{number}: say they: {line.strip()[:60]}"
        for word in UNUSED_WORD.findall(re.sub(r"ies\b", "y", bare)) if where != GLOSSARY else ():
            yield f"{where}:{number}: say {UNUSED[word.lower()]}, not {word} ({GLOSSARY})"


def main() -> int:
    """Print the faults and return the exit status."""
    folders = (ROOT / name for name in FOLDERS)
    files = [*ROOT.glob("*.md"), *(file for each in folders for file in each.rglob("*.*"))]
    paths = sorted(str(file.relative_to(ROOT)) for file in files if file.suffix in KINDS)
    found = [fault for path in paths for part in parts(path) for fault in faults(*part)]
    print("\n".join(found) or f"the words of {len(paths)} files are in order")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
