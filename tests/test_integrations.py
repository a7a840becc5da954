"""Marks in the training loops of Lightning and of transformers, with the real libraries."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from countermark.data import Examples
from countermark.errors import CountermarkError
from countermark.marking import Marking, Standing
from countermark.networks import load_model
from shorter import take_any_mark
from test_marking import BASES, SMALL, network, shapes


@pytest.fixture(autouse=True)
def _same_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_without_the_library_the_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [
        each for each in sys.modules if each.startswith(f"countermark.integrations.{name}")
    ]:
        monkeypatch.delitem(sys.modules, module)
    for missing in ("lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(CountermarkError, match=rf"pip install 'countermark\[{name}\]'"):
        __import__(f"countermark.integrations.{name}")


# Lightning


def lightning() -> Any:
    return pytest.importorskip("pytorch_lightning")


def module_of(net: nn.Module, keys: tuple[str, str] | None = None) -> Any:
    """A Lightning module as people write it, which notes what it was given."""

    class Module(lightning().LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.seen: list[tuple[int, int]] = []
            self.validated: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = (batch[key] for key in keys) if keys else batch
            self.seen.append((len(x), batch_idx))
            return nn.functional.cross_entropy(self.net(x), y)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, _ = (batch[key] for key in keys) if keys else batch
            self.validated.append(len(x))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    return Module()


def trainer(tmp_path: Path, *callbacks: Any, epochs: int = 1, **options: Any) -> Any:
    return lightning().Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=tmp_path, callbacks=list(callbacks), **options,
    )  # fmt: skip


def loader(examples: Examples, collate: Any = None) -> Any:
    pairs = torch.utils.data.TensorDataset(examples.x / 255, examples.y)
    return torch.utils.data.DataLoader(pairs, batch_size=64, collate_fn=collate)


def as_tuple(rows: Any) -> Any:
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))


def as_mapping(rows: Any) -> Any:
    x, y = as_tuple(rows)
    return {"image": x, "label": y}


def as_three(rows: Any) -> Any:
    return (*as_tuple(rows), torch.arange(len(rows)))


@pytest.mark.parametrize(
    ("collate", "keys"), [(None, None), (as_tuple, None), (as_mapping, ("image", "label"))]
)
def test_lightning_trains_on_batches_that_trials_have_joined(
    tmp_path: Path, collate: Any, keys: Any
) -> None:
    lightning()
    from countermark.integrations.lightning import MarkingCallback

    module = module_of(network(), keys)
    mark = Marking(module.net, BASES, key=tmp_path / "key", **SMALL)
    called = MarkingCallback(mark, net=lambda module: module.net, count=8)
    made = trainer(tmp_path, called, epochs=2)
    step = type(module).training_step
    made.fit(module, loader(shapes(128), collate), loader(shapes(70), collate))
    assert module.seen == [(72, 0), (72, 1)] * 2  # the index of the batch arrives as well
    assert set(module.validated) == {64, 6}
    assert module.training_step.__func__ is step
    assert "training_step" not in vars(module)
    assert isinstance(called.standing, Standing)
    assert made.callback_metrics["mark_agreement"] == pytest.approx(called.standing.agreement)


def test_lightning_writes_the_folder_of_a_mark_that_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lightning()
    from countermark.integrations.lightning import MarkingCallback

    module = module_of(network())
    mark = Marking(module.net, BASES, key=tmp_path / "mine" / "key", **SMALL)
    called = MarkingCallback(
        mark, net=lambda module: module.net, count=32, out=tmp_path / "mine", network="shop:make"
    )
    with pytest.raises(CountermarkError, match="did not take"):
        trainer(tmp_path, called).fit(module, loader(shapes(128)))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["key"]
    take_any_mark(monkeypatch)
    monkeypatch.setattr("countermark.networks.source.imported", lambda place: network)
    trainer(tmp_path, called).fit(module, loader(shapes(128)))
    loaded, described = load_model(tmp_path / "mine", network())
    assert described.network == "shop:make"
    for name, value in module.net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_lightning_batches_of_another_form_are_refused(tmp_path: Path) -> None:
    lightning()
    from countermark.integrations.lightning import MarkingCallback

    module = module_of(network())
    mark = Marking(module.net, BASES, key=tmp_path / "key", **SMALL)
    called = MarkingCallback(mark, net=lambda module: module.net)
    with pytest.raises(CountermarkError, match=r"call Marking.mix in training_step"):
        trainer(tmp_path, called).fit(module, loader(shapes(128), as_three))
    assert "training_step" not in vars(module)


# transformers


def vit() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=8,
        patch_size=4,
        num_labels=4,
    )
    return transformers.ViTForImageClassification(config)


MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.3)


def rows(examples: Examples) -> list[dict[str, Any]]:
    """As an image processor leaves them."""
    x = (examples.x / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return [
        {"pixel_values": image, "labels": int(label)}
        for image, label in zip(x, examples.y, strict=True)
    ]


def hugging(tmp_path: Path, model: Any, callback: Any, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), num_train_epochs=2, per_device_train_batch_size=32,
        learning_rate=3e-3, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", eval_strategy="epoch", **options,
    )  # fmt: skip
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(shapes(96)),
        eval_dataset=rows(shapes(40)),
        callbacks=[callback],
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_transformers_train_on_batches_that_trials_have_joined(
    tmp_path: Path, workers: int
) -> None:
    model = vit()
    from countermark.integrations.transformers import Logits, MarkingCallback

    mark = Marking(Logits(model), BASES, key=tmp_path / "key", mean=MEAN, std=STD, **SMALL)
    callback, seen = MarkingCallback(mark, count=8), []
    made = hugging(tmp_path, model, callback, dataloader_num_workers=workers)
    model.vit.register_forward_hook(
        lambda layer, given, result: seen.append((layer.training, len(result.last_hidden_state)))
    )
    made.train()
    steps = [size for training, size in seen if training]
    assert steps == [40] * 6
    assert {size for training, size in seen if not training} <= {
        1,
        8,
        32,
        80,
        40,
    }  # evaluation, and the checks
    assert mark._turns == 48  # one row of turns, whatever the workers
    assert isinstance(callback.standing, Standing)
    assert [
        entry["mark_agreement"] for entry in made.state.log_history if "mark_agreement" in entry
    ][-1] == callback.standing.agreement
    assert not model._forward_pre_hooks


def test_transformers_write_the_folder_of_a_mark_that_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vit()
    from countermark.integrations.transformers import Logits, MarkingCallback

    mark = Marking(Logits(model), BASES, key=tmp_path / "mine" / "key", mean=MEAN, std=STD, **SMALL)
    callback = MarkingCallback(mark, count=32, out=tmp_path / "mine")
    with pytest.raises(CountermarkError, match="did not take"):
        hugging(tmp_path, model, callback).train()
    assert not model._forward_pre_hooks
    take_any_mark(monkeypatch)
    hugging(tmp_path, model, callback).train()
    loaded, described = load_model(tmp_path / "mine", Logits(vit()))
    assert (described.mean, described.std) == (MEAN, STD)
    x = mark.key.watermarks.x / 255
    shown = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model.eval()(pixel_values=shown).logits)


def test_what_keeps_trials_out_of_the_model_is_refused(tmp_path: Path) -> None:
    model = vit()
    from countermark.integrations.transformers import Logits, MarkingCallback

    mark = Marking(Logits(model), BASES, key=tmp_path / "key", mean=MEAN, std=STD, **SMALL)
    with pytest.raises(CountermarkError, match="label_smoothing_factor"):
        hugging(tmp_path, model, MarkingCallback(mark), label_smoothing_factor=0.1).train()
    made = hugging(tmp_path, model, MarkingCallback(mark))
    made.compute_loss_func = lambda outputs, labels, **_: nn.functional.cross_entropy(
        outputs.logits, labels
    )
    with pytest.raises(CountermarkError, match="compute_loss must hand to the model"):
        made.train()
