"""Ask a suspect behind any API: wrap it as a Python function from images to labels.

    countermark protect digits --out mine
    countermark remove mine --prune 0.5 --out copy
    python examples/suspect_function.py copy --key mine/key

`Product` stands for somebody's product. It reads one PNG at a time, answers with a word, and is
busy now and then. In its place put your HTTP client, gRPC, or an app that you drive. At most 60
images are sent at first. The second call goes on from the answers in `answers.jsonl`, and sends
no image again that was answered.
"""

import argparse
import io

import numpy as np
import torch
from PIL import Image

import countermark as cm

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Product:
    """A product with an API of its own; here it runs the model of a folder."""

    def __init__(self, folder: str) -> None:
        """Load the model."""
        self.model, self.requests = cm.load(folder), 0

    def read(self, png: bytes) -> str:
        """Read the digit on an image."""
        self.requests += 1
        if self.requests % 50 == 0:
            return "busy, try again later"
        image = torch.tensor(np.array(Image.open(io.BytesIO(png)))) / 255
        return WORDS[int(self.model(image[None, None]).argmax())]


def main() -> None:
    """Ask twice: with a budget, then for the rest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suspect", help="a model folder, as the product's inside")
    parser.add_argument("--key", required=True, help="your key folder")
    parser.add_argument("--replay", default="answers.jsonl", help="file that keeps the answers")
    given = parser.parse_args()
    product = Product(given.suspect)

    def suspect(images: torch.Tensor) -> torch.Tensor:
        """Turn uint8 images (n, 1, h, w) into int64 labels (n,), with -1 for no answer."""
        labels = []
        for image in images:
            png = io.BytesIO()
            Image.fromarray(image[0].numpy()).save(png, "png")
            word = product.read(png.getvalue())
            labels.append(WORDS.index(word) if word in WORDS else -1)
        return torch.tensor(labels)

    for budget in (60, None):
        found = cm.verify(
            suspect, key=given.key, pixels="uint8", budget=budget, replay=given.replay
        )
        answered = found.test.trials - found.answers.unanswered
        p = f"{found.test.p_value:.1e}"
        print(f"{product.requests} requests so far, {answered} of {found.test.trials} trials")
        print(f"  {found.test.agreements} agree, p = {p}: {found.verdict}")
        print(*found.doubts, sep="\n")


if __name__ == "__main__":
    main()
