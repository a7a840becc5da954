"""Which units of the study a change of the code left as they were, to the bit.

    countermark reproduce --profile quick --data mnist --precision 32-true --out before  # old code
    countermark reproduce --profile quick --data mnist --precision 32-true --out after  # new code
    python benchmarks/same_units.py before after

A unit's name depends on the code, so units are paired by what they are made of: kind, options,
environment and, in turn, inputs. Of each pair every file is compared by its digest.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from countermark.files import canonical_json, read_json, sha256

CODE = ("config.json", "model.json")  # the files that name the code, or whoever made them


class Units:
    """The finished units of a store, by what they are made of."""

    def __init__(self, store: Path) -> None:
        """Read the store's records; its tensors are not read."""
        finished = [each.parent for each in (store / "units").glob("*/manifest.json")]
        self.records = {each.name: read_json(each / "config.json") for each in finished}
        self.files = {
            self.made_of(each.name): (
                self.records[each.name]["kind"],
                read_json(each / "manifest.json"),
            )
            for each in finished
        }

    def made_of(self, name: str) -> str:
        """A digest of everything but the code."""
        record: dict[str, Any] = {**self.records[name]}
        del record["code"]
        record["inputs"] = {role: self.made_of(each) for role, each in record["inputs"].items()}
        return sha256(canonical_json(record))


def main() -> None:
    """Print a table in Markdown, and what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stores", type=Path, nargs=2, help="folders that reproduce wrote")
    before, after = (Units(each) for each in parser.parse_args().stores)
    same, other = Counter[str](), Counter[str]()
    for name in sorted(before.files.keys() & after.files.keys()):
        (kind, one), (_, two) = before.files[name], after.files[name]
        differing = [
            file
            for file in sorted(one.keys() | two.keys())
            if file not in CODE and one.get(file) != two.get(file)
        ]
        (other if differing else same)[kind] += 1
        if differing:
            print(f"{kind} {name[:12]}: {', '.join(differing)}")
    print("\n| kind | units in both | the same to the bit |\n|---|---|---|")
    for kind in sorted(same | other):
        print(f"| {kind} | {same[kind] + other[kind]} | {same[kind]} |")


if __name__ == "__main__":
    main()
