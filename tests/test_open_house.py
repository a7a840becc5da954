"""The whole story by command line, in small: a user's own images, network and weights, every verb.

It is the story of benchmarks/open_house.py, on fewer and smaller images.
"""

import pytest

import open_house
from authority import Authority
from warm import warm

SHORT = open_house.Length(
    epochs=1,
    images=4,
    queries=300,
    thefts=("white", "black", "distil"),
    removals=("--prune 0.1", "--median 3"),
)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> open_house.Story:
    """Both stories: from scratch, and from weights that a loop of the user's own trained."""
    folder = tmp_path_factory.mktemp("house")
    open_house.prepare(folder, each=80, size=16)
    story, authority = open_house.Story(folder, 16, warm()), Authority(folder / "authority")
    open_house.begin(story)
    open_house.tell(story, "scratch", authority, SHORT, "--objective", "standard")
    open_house.own_weights(folder, 16, epochs=20)
    open_house.tell(story, "weights", authority, SHORT, "--weights", "own.pt")
    return story


def test_the_check_names_what_is_wrong_with_the_images(told: open_house.Story) -> None:
    """Two files are damaged, two are there twice."""
    found = told.found["data check"]
    assert (len(found["damaged"]), found["duplicates"]) == (2, 2)


@pytest.mark.parametrize("mine", ["scratch", "weights"])
def test_every_verb_takes_a_users_own_images_network_and_weights(
    told: open_house.Story, mine: str
) -> None:
    """Each ended as it should; a copy is told from a stranger's model, and a judge agrees."""
    found = {
        title.removeprefix(f"{mine}: "): each
        for title, each in told.found.items()
        if title.startswith(mine)
    }
    assert {
        name: found[name]["verdict"]
        for name in ("verify", "verify white", "verify onnx", "adjudicate")
    } == {
        "verify": "match",
        "verify white": "match",
        "verify onnx": "match",
        "adjudicate": "upheld",
    }
    assert found["verify stranger"]["log10_p_value"] > -6
    assert (
        found["evaluate --strict"]["strict_accuracy"]
        <= found["evaluate --strict"]["adversarial_accuracy"]
    )
    assert any(
        title == f"{mine}: serve" and said.endswith("exit 0") for title, _, said in told.rows
    )
