"""Test that training is right under any ``lightning.Trainer``, not only under the one that ``train`` makes."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from alexnet_repro import Classifier, Store, StoreData
from alexnet_repro.data.batches import TrainBatch
from alexnet_repro.errors import UserError

EPOCHS = 4
BY_HAND = {"rule": "by_hand", "by_hand": {"of_epochs": 4, "changes": {"weights": {2: 0.1}}}}
RATES = [0.01, 0.01, 0.001, 0.001]


class Seen(L.Callback):
    """Remember what identifies each training batch, by epoch; and lose power after ``stop_after`` of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.epochs: list[list[tuple[Any, ...]]] = [[] for _ in range(EPOCHS)]
        self.stop_after = stop_after

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: TrainBatch, index: int) -> None:
        self.epochs[trainer.current_epoch].append(
            (batch.tops.tolist(), batch.lefts.tolist(), int(batch.patches.long().sum()))
        )
        if self.stop_after == sum(map(len, self.epochs)):
            raise KeyError("power cut")


def classifier(**options: Any) -> Classifier:
    return Classifier(classes=2, net={"width": 1 / 16}, schedule=BY_HAND, epochs=EPOCHS, **options)


def trainer(folder: Path, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    usual = {"accelerator": "cpu", "max_epochs": EPOCHS, "default_root_dir": folder}
    return L.Trainer(callbacks=callbacks, **{**usual, **quiet, **options})


def fitted(store: Path, folder: Path, **options: Any) -> tuple[Classifier, Seen]:
    torch.manual_seed(0)
    model, seen = classifier(), Seen()
    trainer(folder, [seen], **options).fit(model, StoreData(Store(store), batch_size=3))
    return model, seen


@pytest.fixture(scope="module")
def plain(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Seen]:
    return fitted(small_store, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"check_val_every_n_epoch": 2},
        {"val_check_interval": 2},
        {"limit_val_batches": 0},
        {"num_sanity_val_steps": 0, "gradient_clip_val": 1e9, "profiler": "simple", "log_every_n_steps": 1},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=lambda options: next(iter(options), "none"),
)
def test_every_epoch_has_all_its_batches_a_history_and_its_rate(
    options: dict[str, Any], plain: tuple[Classifier, Seen], small_store: Path, tmp_path: Path
) -> None:
    model, seen = fitted(small_store, tmp_path, **options)
    assert [len(epoch) for epoch in seen.epochs] == [4] * EPOCHS
    assert seen.epochs == plain[1].epochs
    assert [entry["epoch"] for entry in model.history] == [1, 2, 3, 4]
    assert [entry["lr"] for entry in model.history] == RATES
    updates = -(-4 // options.get("accumulate_grad_batches", 1))
    assert [entry["steps"] for entry in model.history] == [updates * epoch for epoch in (1, 2, 3, 4)]
    validated = ["val_error" in entry for entry in model.history]
    every = options.get("check_val_every_n_epoch", 1)
    assert validated == [options.get("limit_val_batches") != 0 and epoch % every == 0 for epoch in (1, 2, 3, 4)]


def test_limited_epochs_see_the_beginning_of_each_order(
    plain: tuple[Classifier, Seen], small_store: Path, tmp_path: Path
) -> None:
    _, seen = fitted(small_store, tmp_path, limit_train_batches=3)
    assert seen.epochs == [epoch[:3] for epoch in plain[1].epochs]
    _, seen = fitted(small_store, tmp_path, fast_dev_run=2)
    assert seen.epochs[0] == plain[1].epochs[0][:2]


def test_overfit_batches_is_refused_with_the_way_to_do_it(small_store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_per_class"):
        fitted(small_store, tmp_path, overfit_batches=2)


def resumed(
    store: Path, folder: Path, stop_after: int, checkpoint: Callable[[], ModelCheckpoint], **options: Any
) -> Any:
    """Train until a power cut, resume from the newest checkpoint, and return the net and what it saw after that."""
    torch.manual_seed(0)
    options["enable_checkpointing"] = True
    with pytest.raises(KeyError):
        trainer(folder, [checkpoint(), Seen(stop_after)], **options).fit(classifier(), StoreData(Store(store), 3))
    (newest,) = folder.glob("*.ckpt")
    torch.manual_seed(1)
    model, seen = classifier(), Seen()
    trainer(folder, [checkpoint(), seen], **options).fit(
        model, StoreData(Store(store), 3), ckpt_path=newest, weights_only=True
    )
    return model, seen


@pytest.mark.parametrize(
    ("options", "every_n_train_steps", "stop_after"),
    [
        ({}, 1, 6),
        ({}, 1, 9),
        ({}, None, 7),
        ({"accumulate_grad_batches": 2}, 1, 7),
        ({"check_val_every_n_epoch": 2}, 1, 6),
        ({"check_val_every_n_epoch": 2}, None, 10),
        ({"val_check_interval": 2}, 1, 7),
        ({"accumulate_grad_batches": 2, "check_val_every_n_epoch": 2}, 2, 13),
    ],
)
def test_resumed_training_is_the_uninterrupted_one(
    options: dict[str, Any], every_n_train_steps: int | None, stop_after: int, small_store: Path, tmp_path: Path
) -> None:
    """With Lightning's own checkpoints, within an epoch and at its end."""

    def checkpoint() -> ModelCheckpoint:
        every_epoch = every_n_train_steps is None
        return ModelCheckpoint(tmp_path, every_n_train_steps=every_n_train_steps, save_on_train_epoch_end=every_epoch)

    expected, all_seen = fitted(small_store, tmp_path, **options)
    model, seen = resumed(small_store, tmp_path, stop_after, checkpoint, **options)
    flat, rest = ([batch for epoch in of.epochs for batch in epoch] for of in (all_seen, seen))
    assert rest
    assert flat[-len(rest) :] == rest
    for entry, other in zip(model.history, expected.history, strict=True):
        # Lightning does not validate the epoch of a checkpoint that was saved after its last batch, and before validation
        unvalidated = "val_error" not in entry and entry["epoch"] == EPOCHS - len(rest) / 4
        assert entry == ({key: other[key] for key in entry} if unvalidated else other)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


DDP = """
import sys
import lightning as L, torch
from alexnet_repro import Classifier, Store, StoreData
from tests.test_trainer import Seen, classifier, trainer
store, folder, sampler = sys.argv[1:]
torch.manual_seed(0)
model, seen = classifier(), Seen()
options = {} if sampler == "default" else {"use_distributed_sampler": False}
fitting = trainer(folder, [seen], strategy="ddp", devices=2, **options)
data = StoreData(Store(store), batch_size=3)
fitting.fit(model, data)
measured = fitting.test(model, data, verbose=False)
predicted = torch.cat([batch[0] for batch in fitting.predict(model, data)])
torch.save([seen.epochs, model.history, model.state_dict(), measured, predicted], f"{folder}/{fitting.global_rank}.pt")
"""


@pytest.mark.parametrize("sampler", ["default", pytest.param("own", marks=pytest.mark.slow)])
def test_processes_of_ddp_share_each_batch(
    sampler: str, plain: tuple[Classifier, Seen], small_store: Path, tmp_path: Path
) -> None:
    """With Lightning's own distributed samplers left on, and switched off."""
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.fspath(Path.cwd()), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, script, small_store, tmp_path, sampler], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for whole, *halves in zip(plain[1].epochs, *(rank[0] for rank in ranks), strict=True):
        for batch, one, other in zip(whole, *halves, strict=True):
            assert (one[0] + other[0], one[1] + other[1], one[2] + other[2]) == batch
    assert ranks[0][1] == ranks[1][1]
    for entry, alone in zip(ranks[0][1], plain[0].history, strict=True):
        assert entry == pytest.approx(alone, abs=1e-3)
    for name, value in plain[0].state_dict().items():
        torch.testing.assert_close(ranks[0][2][name], value, rtol=1e-4, atol=1e-6)
    images = Store(small_store).split("val")
    assert [len(rank[4]) for rank in ranks] == [3, 3]
    assert len(images) == 6
    assert ranks[0][3] == ranks[1][3]


def images_and_labels(count: int = 12) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = 60 * torch.randn(count, 3, 224, 224, generator=generator) + 80 * labels[:, None, None, None]
    return TensorDataset(images, labels)


class Foreign(L.LightningDataModule):
    """A data module that knows nothing of alexnet_repro."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(images_and_labels(), batch_size=3)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def test_foreign_data_module_trains_and_measures(tmp_path: Path) -> None:
    model = classifier()
    fitting = trainer(tmp_path, [])
    fitting.fit(model, Foreign())
    assert [entry["epoch"] for entry in model.history] == [1, 2, 3, 4]
    (measured,) = fitting.test(model, Foreign(), verbose=False)
    images, labels = images_and_labels().tensors
    with torch.no_grad():
        logits = model.eval()(images)
    assert measured["test/top1_error"] == pytest.approx(100 * float((logits.argmax(1) != labels).float().mean()))
    loss = float(torch.nn.functional.cross_entropy(logits, labels))
    assert measured["test/log_loss"] == pytest.approx(loss, rel=1e-5)
    (softmax,) = zip(*fitting.predict(model, Foreign()), strict=True)
    torch.testing.assert_close(torch.cat(softmax), logits.softmax(1))


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ((torch.zeros(2, 3, 200, 200), torch.zeros(2)), r"\(2, 3, 200, 200\), not \(N, 3, 224, 224\)"),
        ((torch.zeros(2, 3, 224, 224, dtype=torch.uint8), torch.zeros(2)), "float images"),
        ({"image": torch.zeros(2, 3, 224, 224)}, "a batch is dict"),
        (torch.zeros(2, 3, 224, 224), "a batch is Tensor"),
        ((torch.zeros(2, 3, 224, 224),), "not .images, labels."),
    ],
)
def test_batch_of_another_kind_is_refused_in_a_sentence(batch: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        trainer(tmp_path, []).fit(classifier(), DataLoader([batch], batch_size=None))  # type: ignore[arg-type]


def test_store_of_other_classes_is_refused_before_training(small_store: Path, tmp_path: Path) -> None:
    data = StoreData(Store(small_store))
    with pytest.raises(UserError, match="2 classes, and the net has 1000"):
        trainer(tmp_path, []).fit(Classifier(), data)
    with pytest.raises(UserError, match="256x256, and the net expects 110x110"):
        trainer(tmp_path, []).fit(Classifier(classes=2, image_size=110, augment={"crop": 96}), data)


def test_trainer_test_measures_one_view_and_ten_crops(small_store: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, store = classifier(), Store(small_store)
    (measured,) = trainer(tmp_path, []).test(model, StoreData(store), verbose=False)
    split = store.split("val")
    images = torch.from_numpy(np.stack([split[i] for i in range(len(split))])).double()
    labels = torch.from_numpy(split.labels)
    images = (images - torch.from_numpy(store.mean)).permute(0, 3, 1, 2)
    corners = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]
    patches = [images[:, :, top : top + 224, left : left + 224] for top, left in corners]
    net = copy.deepcopy(model.net).double().eval()
    with torch.no_grad():
        one = net(patches[4]).softmax(1)
        ten = sum(net(side).softmax(1) for patch in patches for side in (patch, patch.flip(3))) / 10
    for prefix, softmax in (("test/", one), ("test/ten_crop_", ten)):
        nats = -softmax.gather(1, labels[:, None]).log().mean()
        assert measured[f"{prefix}log_loss"] == pytest.approx(float(nats), rel=1e-5)
        assert measured[f"{prefix}top1_error"] == pytest.approx(
            100 * float((softmax.argmax(1) != labels).double().mean())
        )


def test_any_callback_can_follow_the_errors(small_store: Path, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/top1_error", filename="best")
    stop = EarlyStopping("train/log_loss", stopping_threshold=1e9, patience=9)
    model = classifier()
    trainer(tmp_path, [best, stop], enable_checkpointing=True).fit(model, StoreData(Store(small_store), batch_size=3))
    assert len(model.history) == 1  # stopped after the first epoch
    loaded = Classifier.load_from_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    assert loaded.class_names == ["cat", "dog"]
    assert torch.equal(loaded.mean, torch.from_numpy(Store(small_store).mean))
