"""Copies that want to be asked in another way, which clean examples tell at no cost in level."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from chances import RISK, most
from countermark.cli import main
from countermark.data import Examples, pixels
from countermark.errors import CountermarkError
from countermark.evidence import judge
from countermark.networks import load
from countermark.suspects import NO_ANSWER, Asking, as_taken, asker, match, open_suspect
from countermark.suspects.matching import Matched, translation
from countermark.verbs.verify import verify
from countermark.watermarks import WatermarkSet, load_key, new_secrets, write_key
from peak import rising

Model = Callable[[torch.Tensor], torch.Tensor]
CLASSES, SIDE = 10, 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def examples(count: int, seed: int) -> Examples:
    """Colour images: class c has a bright red square at place c, and the others dimmer blue ones.

    So the order of channels, the layout and the normalisation all matter.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 60, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    y = torch.arange(count) % CLASSES
    other = (y + torch.randint(1, CLASSES, (count,), generator=generator)) % CLASSES
    for i in range(count):
        for channel, where, value in ((0, y[i], 230), (2, other[i], 200)):
            row, column = divmod(int(where), 4)
            x[i, channel, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = value
    return Examples(x, y)


def squares(x: torch.Tensor) -> torch.Tensor:
    """The redness of each place, `(n, 10)`, of images `(n, 3, 8, 8)` of [0, 1] with dark places."""
    red = torch.nn.functional.avg_pool2d(x[:, :1], 2).flatten(1)[:, :CLASSES]
    return torch.where((red > 0.5) & (red.amin(1, keepdim=True) < 0.25), red, 0.0)


def trials(count: int = 200) -> WatermarkSet:
    """Random images with two random answers each."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    first = torch.randint(0, CLASSES, (count,), generator=generator)
    second = (first + torch.randint(1, CLASSES, (count,), generator=generator)) % CLASSES
    answers = torch.stack((first, second), 1).sort(dim=1).values
    return WatermarkSet(x, answers, torch.zeros(count).long(), torch.arange(count))


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("key") / "key"
    new_secrets(folder)
    names = [f"class {number}" for number in range(CLASSES)]
    write_key(folder, "coin", trials(), {"data": "mine"}, clean=examples(100, 2), names=names)
    return folder


@pytest.fixture(scope="module")
def copy(key: Path) -> Model:
    """Remembers every coin, and is right about all other images."""
    marked = load_key(key)
    known = {x.numpy().tobytes(): int(y) for x, y in zip(marked.watermarks.x, marked.labels)}  # noqa: B905

    def answer(x: torch.Tensor) -> torch.Tensor:
        rows = (x * 255).round().clamp(0, 255).to(torch.uint8)
        found = squares(x).argmax(1).tolist()
        return torch.tensor(
            [known.get(row.numpy().tobytes(), y) for row, y in zip(rows, found, strict=True)]
        )

    return answer


def normalised(model: Model) -> Model:
    """Wants images from which the means of ImageNet were taken."""
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return lambda x: model(x * std + mean)


def taking(shape: tuple[int, ...], model: Model) -> Model:
    """Refuses images of another shape, as a server does."""

    def answer(x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[1:]) != shape:
            raise ValueError(f"expected images of the shape {shape}")
        return model(x)

    return answer


ORDER = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])  # what the suspect calls each class
WAYS: dict[str, Callable[[Model], object]] = {
    "permuted": lambda model: lambda x: ORDER[model(x)],
    "names of its own": lambda model: lambda x: [f"Klasse {y}" for y in model(x).tolist()],
    "mean and deviation": normalised,
    "bgr": lambda model: lambda x: model(x.flip(1)),
    "nhwc": lambda model: taking((SIDE, SIDE, 3), lambda x: model(x.permute(0, 3, 1, 2))),
    "bytes": lambda model: lambda x: model(x.float() / 255),
    "64 pixels": lambda model: taking(
        (3, 64, 64), lambda x: model(torch.nn.functional.avg_pool2d(x, 8))
    ),
    "bytes, bgr, nhwc and permuted": lambda model: taking(
        (SIDE, SIDE, 3), lambda x: ORDER[model((x.float() / 255).permute(0, 3, 1, 2).flip(1))]
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_that_wants_to_be_asked_otherwise_is_found(way: str, key: Path, copy: Model) -> None:
    suspect = WAYS[way](copy)
    found = verify(suspect, key=key, match=True)  # type: ignore[arg-type]
    matched = found.answers.matched
    assert matched is not None
    assert matched.accuracy == found.answers.clean_accuracy == 100.0
    assert matched.ways >= 2 * 7 * 2 * 2 * 8
    if "64" in way:  # scaled by a filter of ours and down again by theirs: a few bits change
        assert found.test.agreements + found.test.disagreements > 20
    else:
        assert found.verdict == "match"
        assert found.test.agreements == found.test.trials
        # 2^-200 times the number of ways
        assert found.test.log10_p_value == pytest.approx(
            200 * np.log10(0.5) + np.log10(matched.ways)
        )
    assert f"one of {matched.ways} ways, and p is multiplied by that number" in found.doubts[0]


def test_a_copy_that_scales_its_images_itself_needs_no_match(owner: Path) -> None:
    """Twice the side and back; the images of digits have 8 pixels a side.

    Which way gets most of sixty images right is chance, and p pays for the choice.
    """
    network = load(owner)
    suspect = scaled_inside(lambda x: network(x).argmax(1))
    plain = verify(suspect, key=owner / "key")
    found = verify(suspect, key=owner / "key", match=True)
    assert plain.verdict == found.verdict == "match"
    before, after = plain.answers.clean_accuracy, found.answers.clean_accuracy
    assert before is not None
    assert after is not None
    assert after >= before


def test_without_match_the_same_copies_are_doubted(key: Path, copy: Model) -> None:
    for way in ("permuted", "mean and deviation", "bgr"):
        found = verify(WAYS[way](copy), key=key)  # type: ignore[arg-type]
        assert found.answers.matched is None
        assert found.doubts


def test_a_copy_of_fewer_classes_is_found(key: Path, copy: Model) -> None:
    """Seven of ten: what it calls 0 to 6 is 9, 7, 6, 4, 3, 2, 1, and it never says another."""
    kept = torch.tensor([9, 7, 6, 4, 3, 2, 1])
    number = {int(label): i for i, label in enumerate(kept)}

    def fewer(x: torch.Tensor) -> torch.Tensor:
        scattered = ((x.sum((1, 2, 3)) * 255).round().long() % 7).tolist()
        every = zip(copy(x).tolist(), scattered, strict=True)
        return torch.tensor([number.get(label, other) for label, other in every])

    found = verify(fewer, key=key, match=True)
    matched = found.answers.matched
    assert matched is not None
    assert matched.classes == tuple(enumerate(kept.tolist()))
    assert found.verdict == "match"


def test_nothing_is_changed_where_the_declared_way_is_right(key: Path, copy: Model) -> None:
    """The number of ways is paid all the same; layout and size are not even tried."""
    shapes = set()

    def watching(x: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(x.shape[1:]))
        return copy(x)

    found = verify(watching, key=key, match=True)
    matched = found.answers.matched
    assert matched is not None
    assert (dict(matched.chosen), matched.classes, matched.accuracy_before) == ({}, None, 100.0)
    assert shapes == {(3, SIDE, SIDE)}


def test_no_trial_is_asked_before_the_way_is_chosen(
    key: Path, copy: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Condition 2: what is chosen may depend on clean examples only."""
    marked, asked = load_key(key), []
    rows = {image.numpy().tobytes() for image in marked.watermarks.x}

    def watching(x: torch.Tensor, asking: Asking) -> torch.Tensor:
        kind = "trial" if any(image.numpy().tobytes() in rows for image in x) else "clean"
        if asked[-1:] != [kind]:
            asked.append(kind)
        return as_taken(x, asking)

    monkeypatch.setattr(asker, "as_taken", watching)
    found = verify(lambda x: copy(x.flip(1)), key=key, match=True)
    assert found.verdict == "match"
    assert asked == ["clean", "trial", "clean"]  # at last the check


def test_a_budget_holds_for_everything_together(key: Path, copy: Model) -> None:
    """One that finding out spends gives no verdict: all trials would look unanswered."""
    asked = []

    def counting(x: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        return copy(x.flip(1))

    with pytest.raises(CountermarkError, match="budget of 1500 images was spent on finding out"):
        verify(counting, key=key, match=True, budget=1500)
    assert sum(asked) <= 1500


def test_images_are_scaled_a_part_at_a_time() -> None:
    """A suspect of large images: all 400 of 3 x 512 x 512 floats would be 1.2 GiB."""
    largest = 0

    def watching(x: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(x))
        assert x.shape[1:] == (3, 512, 512)
        return torch.zeros(len(x), dtype=torch.int64)

    x = torch.zeros(400, 3, SIDE, SIDE, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(400) % 200
    asking = Asking(size=512, batch_size=4)
    with rising() as risen:
        assert open_suspect(watching, (3, SIDE, SIDE), asking)(x).tolist() == [0] * 400
        assert largest == 4
        assert risen() < 400 << 20


def test_a_suspect_that_answers_in_no_way_is_said(key: Path) -> None:
    def broken(_x: torch.Tensor) -> torch.Tensor:
        raise ValueError("out of order")

    with pytest.raises(CountermarkError, match="out of order"):
        verify(broken, key=key, match=True)


def fewer(model: Model) -> Model:
    """Seven of ten classes; others are answered by one of these."""
    return lambda x: KEPT_BY[model(x)]


def scaled_inside(model: Model) -> Model:
    """Brings its images to twice the side and back."""

    def answer(x: torch.Tensor) -> torch.Tensor:
        for side in (2 * SIDE, SIDE):
            x = torch.nn.functional.interpolate(
                x.float(), (side, side), mode="bilinear", antialias=True
            )
        return model(x)

    return answer


KEPT_BY = torch.tensor([5, 6, 5, 4, 3, 1, 2, 1, 0, 0])
STRANGE = {**WAYS, "seven classes": fewer, "scaled inside": scaled_inside}


@pytest.mark.parametrize("way", STRANGE)
def test_strangers_keep_the_level_in_every_way(way: str) -> None:
    """2,000 random keys: the way is chosen once, from clean examples, and the coins are fresh.

    A stranger answers the trials by what it sees of them. With the factor left out p would still be
    valid, since no trial was asked before; with it, far fewer than alpha are named.
    """
    marked, clean = trials(60), examples(100, 2)

    def stranger(x: torch.Tensor) -> torch.Tensor:
        return squares(x).argmax(1)

    suspect = STRANGE[way](stranger)

    def opened(asking: Asking) -> Model:
        return open_suspect(suspect, (3, SIDE, SIDE), asking)  # type: ignore[arg-type, return-value]

    matched, _ = match(opened, Asking(foreign=True), clean)
    assert matched.accuracy > 30  # where two classes share an answer, leaving one out misreads both
    labels = matched.meant(opened(replace(Asking(foreign=True), **matched.chosen))(marked.x))
    generator = np.random.default_rng(5)
    answers = marked.answers.numpy()
    given = labels.numpy()[:, None] == answers
    keys, named, plain = 2000, 0, 0
    for coins in generator.integers(0, 2, (keys, len(answers))):
        outcomes = [
            0 if not row.any() else 1 if row[coin] else -1
            for row, coin in zip(given, coins, strict=True)
        ]
        test = judge(range(len(outcomes)), outcomes, alpha=0.05, ways=matched.ways)
        named += test.verdict == "match"
        plain += judge(range(len(outcomes)), outcomes, alpha=0.05).verdict == "match"
    assert named <= most(keys, 0.05 / matched.ways, RISK)
    assert plain <= most(keys, 0.05, RISK)


def test_what_was_chosen_is_said_as_options(key: Path, copy: Model) -> None:
    found = verify(normalised(copy), key=key, match=True, channels="bgr", mean=(3.0,))
    said = found.doubts[0]
    assert said.startswith("Asked with --mean 0.485 0.456 0.406, --std 0.229 0.224 0.225, ")
    assert "--channels rgb, the suspect gets 100 % of clean examples right" in said
    found = verify(copy, key=key, match=True, mean=(3.0,))
    assert found.doubts[0].startswith("Asked with no --mean, the suspect gets 100 %")


def test_the_exchange_of_classes_is_counted_by_leaving_one_out() -> None:
    y = torch.arange(100) % 10
    share, classes = translation(9 - y, y)
    assert (share, classes[0]) == (100.0, 9)
    many = torch.arange(100)
    assert translation(many.roll(1), many)[0] == 0.0  # one example a class explains nothing
    matched = Matched({}, ((0, 9), (4, 2)), 100.0, None, 2)
    assert matched.meant(torch.tensor([0, 4, 7, NO_ANSWER])).tolist() == [9, 2, 2**31 - 1, -1]


def test_match_on_the_command_line(
    owner: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real marked model behind a function that has its classes in another order."""
    (tmp_path / "turned.py").write_text(
        "import countermark as cm\n"
        f"model = cm.load({str(owner)!r})\n\n\n"
        "def ask(images):\n    return (model(images / 255).argmax(1) + 3) % 10\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["verify", "turned:ask", "--key", str(owner / "key"), "--json"]
    main(command)  # what it answers to images that are all dark may depend on the coins
    found = json.loads(capsys.readouterr().out)
    assert found["test"]["agreements"] < found["test"]["trials"] / 2
    assert main([*command, "--match"]) == 0
    found = json.loads(capsys.readouterr().out)
    matched = found["answers"]["matched"]
    assert found["test"]["agreements"] == found["test"]["trials"]
    assert matched["chosen"] == {"pixels": "uint8"}
    assert matched["classes"] == [[i, (i - 3) % 10] for i in range(10)]


def test_pixels_of_a_key_are_what_the_copies_here_are_made_for(key: Path, copy: Model) -> None:
    marked = load_key(key)
    assert torch.equal(copy(pixels(marked.watermarks.x)), marked.labels)


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_an_onnx_file_that_wants_other_images_is_found(owner: Path, tmp_path: Path) -> None:
    """Exported with a normalisation of its own in front that nobody declared."""

    class Behind(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = load(owner)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x * 0.5 + 0.5).roll(1, 1)

    path = tmp_path / "theirs.onnx"
    example = torch.zeros(2, 1, 8, 8)
    torch.onnx.export(
        Behind().eval(),
        (example,),
        path,
        input_names=["x"],
        dynamic_axes={"x": {0: "n"}},
        dynamo=False,
    )
    assert verify(path, key=owner / "key").verdict != "match"
    found = verify(path, key=owner / "key", match=True)
    assert found.verdict == "match"
    assert found.answers.matched is not None
    assert dict(found.answers.matched.chosen) == {"mean": (0.5,), "std": (0.5,)}
