"""What is left of a model's coins after what may happen to images on their way to a suspect.

    python benchmarks/survive.py mine jpeg:95 jpeg:75 resize:2 resize:0.5

The model is asked for its key's trials as they are and after each change, which are words as
`protect --survive` takes them, but for cleaners that are trained first: `outlast.py` asks copies
behind those.
"""

import argparse
from pathlib import Path

from countermark.evaluation import predict
from countermark.evidence import judge
from countermark.networks import load
from countermark.terminal import p_value
from countermark.watermarks import changes, load_key, versions

WORDS = ("jpeg:95", "jpeg:75", "jpeg:50", "resize:2", "resize:0.75", "resize:0.5")


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder with its key")
    parser.add_argument("words", nargs="*", default=WORDS, help="changes")
    given = parser.parse_args()
    network, key = load(given.model), load_key(given.model / "key")
    x, cells = key.watermarks.x, key.watermarks.cell.tolist()
    channels, height, width = x.shape[1:]
    print("| asked | coins | p |\n|---|---|---|")

    def refuse(word: str, _layer: object) -> None:
        parser.error(f"{word} is trained first; python benchmarks/outlast.py asks behind it")

    every = versions(x, changes(given.words, (channels, height, width), refuse))
    for word, images in zip(("as they are", *given.words), every, strict=True):
        test = judge(cells, key.outcomes(predict(network, images)))
        coins = f"{test.agreements}:{test.disagreements}"
        print(f"| {word} | {coins} | {p_value(test.log10_p_value)} |")


if __name__ == "__main__":
    main()
