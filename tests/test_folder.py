"""Model folders: what is written can be read, and what stands in front of the weights is part of them."""

from dataclasses import replace
from pathlib import Path


from countermark.networks import describe, load_model, open_declared, save_model

GOLDEN = Path(__file__).parent / "golden" / "0.1.0" / "mine"


def test_a_copy_of_a_model_of_0_1_0_is_read_and_its_pools_are_cut_as_they_were(tmp_path: Path) -> None:
    network, description = load_model(GOLDEN)
    save_model(tmp_path, network, replace(description, history=(*description.history, {"event": "stolen"})))
    copied = describe(tmp_path)
    assert copied.data == description.data
    assert copied.data.sha256 is None
    first, again = (open_declared(each).pools(each.seed) for each in (description, copied))
    assert again.digests() == first.digests()
