"""Test that order and augmentation depend only on (seed, epoch, sample index)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from alexnet_repro.data.batches import TrainImages, ValImages, draw_places
from alexnet_repro.data.loader import _copying_stream, _Loader, make_loader
from alexnet_repro.data.module import StoreData
from alexnet_repro.data.sampler import PLACE, EpochSampler, Part, epoch_order, stream
from alexnet_repro.data.store import Store


def batches(
    store: Path, epoch: int = 0, batch: int = 0, workers: int = 0, seed: int = 0, share: int = 1
) -> list[tuple[torch.Tensor, ...]]:
    patches = {"crop": 224, "share": share}
    data = StoreData(Store(store), batch_size=5, seed=seed, patches=patches, workers=workers)
    loader = data.train_dataloader()
    loader.sampler.position = lambda: (epoch, batch)  # type: ignore[attr-defined]
    return list(loader)


def whole_epoch(epoch: int) -> Part:
    return Part(epoch, np.arange(12), np.arange(12), 0, 12)


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_batches_do_not_depend_on_workers_or_on_the_global_generator(small_store: Path) -> None:
    here = batches(small_store)
    torch.manual_seed(99)
    np.random.seed(99)
    there = batches(small_store, workers=2)
    assert len(here) == 3
    assert all(map(same, here, there))
    assert not any(map(same, here, batches(small_store, seed=1)))


def test_resumed_epoch_yields_the_remaining_batches(small_store: Path) -> None:
    second_epoch = batches(small_store, epoch=1)
    assert not any(map(same, batches(small_store), second_epoch))
    for done in (1, 2):
        rest = batches(small_store, epoch=1, batch=done)
        assert len(rest) == 3 - done
        assert all(map(same, second_epoch[done:], rest))


def test_epoch_yields_every_image_once(small_store: Path) -> None:
    for epoch in range(3):
        parts = list(EpochSampler(12, 5, 0, lambda epoch=epoch: (epoch, 0)))  # type: ignore[misc]
        assert sorted(np.concatenate([part.images for part in parts])) == list(range(12))
        assert np.concatenate([part.positions for part in parts]).tolist() == list(range(12))
        assert [(part.epoch, part.first, part.global_batch_size) for part in parts] == [
            (epoch, 0, 5),
            (epoch, 0, 5),
            (epoch, 0, 2),
        ]
        # three replicas split each batch and keep its order
        shared = [list(EpochSampler(12, 5, 0, lambda epoch=epoch: (epoch, 0), replica, 3)) for replica in range(3)]  # type: ignore[misc]
        for whole, *own in zip(parts, *shared, strict=True):
            assert np.concatenate([part.images for part in own]).tolist() == whole.images.tolist()
            assert [part.first for part in own] == [sum(len(p.images) for p in own[:i]) for i in range(3)]
            assert {part.global_batch_size for part in own} == {whole.global_batch_size}
    orders = [epoch_order(seed, epoch, 1000).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_crop_positions_and_reflections_are_uniform() -> None:
    draws = np.concatenate([draw_places(stream(0, epoch, PLACE), 300, 33) for epoch in range(100)])
    positions = np.zeros((33, 33))
    np.add.at(positions, (draws[:, 0], draws[:, 1]), 1)
    assert positions.min() > 0
    expected = 30_000 / 33**2
    assert ((positions - expected) ** 2 / expected).sum() == pytest.approx(
        1088, abs=5 * (2 * 1088) ** 0.5
    )  # chi squared
    assert draws[:, 2].mean() == pytest.approx(0.5, abs=5 * 0.5 / 30_000**0.5)


def test_patches_colours_and_jitter_have_their_distributions(small_store: Path) -> None:
    images = TrainImages(Store(small_store).split("train"), seed=0, crop=224)
    fetched = [images.__getitems__(whole_epoch(epoch)) for epoch in range(200)]
    for offsets in (torch.cat([batch.tops for batch in fetched]), torch.cat([batch.lefts for batch in fetched])):
        assert set(offsets.tolist()) == set(range(33))
    colours = torch.cat([batch.colour for batch in fetched]).numpy()
    np.testing.assert_allclose(np.cov(colours.T), np.eye(3), atol=5 * (2 / 2400) ** 0.5)
    shares = torch.cat([batch.jitter for batch in fetched])
    assert shares.abs().max() <= 1
    np.testing.assert_allclose(shares.var(0), 1 / 3, atol=0.03)


def test_half_of_the_patches_are_mirrored() -> None:
    """A fair coin gives a share outside 0.49 to 0.51 of 100,000 draws once in ten million million times."""
    mirrored = draw_places(stream(0, 0, 0), 100_000, 33)[:, 2]
    assert set(mirrored.tolist()) == {0, 1}
    assert 0.49 < mirrored.mean() < 0.51


@pytest.mark.parametrize(("random_crops", "mirror"), [(True, True), (True, False), (False, False)])
def test_patch_equals_the_image_at_its_position(random_crops: bool, mirror: bool, small_store: Path) -> None:
    split = Store(small_store).split("train")
    images = TrainImages(split, seed=4, crop=224, random_crops=random_crops, mirror=mirror)
    places, mirrored = set(), []
    for epoch in range(4):
        batch = images.__getitems__(whole_epoch(epoch))
        for n in range(12):
            top, left = int(batch.tops[n]), int(batch.lefts[n])
            expected = split[n][top : top + 224, left : left + 224]
            assert np.array_equal(batch.patches[n].numpy(), expected[:, ::-1] if batch.mirror[n] else expected)
            assert batch.labels[n] == split.labels[n]
            places.add((top, left))
        mirrored += batch.mirror.tolist()
    assert (len(places) > 40) if random_crops else places == {(16, 16)}
    assert any(mirrored) == mirror


def test_consecutive_images_share_crop_and_reflection_as_in_2012(small_store: Path) -> None:
    def places(share: int) -> list[tuple[int, int, bool]]:
        columns = zip(*[b[2:5] for b in batches(small_store, share=share)], strict=True)
        return list(zip(*(torch.cat(column).tolist() for column in columns), strict=True))

    shared = places(4)  # in batches of 5, so groups of 4 span batches
    assert [len(set(shared[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1]
    assert len(set(shared)) == 3
    assert len(set(places(1))) == 12
    colours = torch.cat([batch[5] for batch in batches(small_store, share=4)])
    assert len(colours.unique(dim=0)) == 12  # colours are drawn for each image


def parts(count: int, epoch: int = 0, **options: Any) -> list[Part]:
    sampler = EpochSampler(count, 4, 7, lambda: (epoch, 0), **options)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def test_fixed_order_is_the_same_in_every_epoch() -> None:
    """The 2012 program read its stored batches in one order, so the same images always share a crop."""
    orders = {
        order: [np.concatenate([part.images for part in parts(30, epoch, order=order)]).tolist() for epoch in (0, 1, 5)]
        for order in ("reshuffled", "fixed", "stored")
    }
    assert all(sorted(epoch) == list(range(30)) for epochs in orders.values() for epoch in epochs)
    assert orders["fixed"][0] == orders["fixed"][1] == orders["fixed"][2] != list(range(30))
    assert orders["stored"] == [list(range(30))] * 3
    assert orders["reshuffled"][0] != orders["reshuffled"][1]
    assert parts(30, 5, order="fixed")[0].epoch == 5  # crops and colours still differ
    with pytest.raises(ValueError, match="order=sorted"):
        EpochSampler(30, 4, 0, lambda: (0, 0), order="sorted")


def test_batches_do_not_span_stored_files() -> None:
    found = parts(25, order="stored", images_per_file=10)
    assert [part.global_batch_size for part in found] == [4, 4, 2, 4, 4, 2, 4, 1]
    assert [part.file for part in found] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert np.concatenate([part.images for part in found]).tolist() == list(range(25))
    assert [part.global_batch_size for part in parts(25, order="fixed", images_per_file=10)] == [4] * 6 + [1]


def test_validation_images_join_the_training_images_after_the_given_epoch(small_store: Path) -> None:
    class Trainer:
        strategy, distributed_sampler_kwargs = SimpleNamespace(root_device=torch.device("cpu")), None
        lightning_module = None

        def __init__(self, epoch: int, batch: int) -> None:
            self.current_epoch = epoch
            epochs = SimpleNamespace(ready=epoch + 1, processed=epoch)
            batches = SimpleNamespace(current=SimpleNamespace(processed=batch), is_last_batch=False)
            self.fit_loop = SimpleNamespace(
                epoch_progress=SimpleNamespace(current=epochs), epoch_loop=SimpleNamespace(batch_progress=batches)
            )

    data = StoreData(Store(small_store), 5, 0, {"crop": 224}, order="stored", val_joins_after=2)
    store = Store(small_store)
    labels = {split: store.split(split).labels.tolist() for split in ("train", "val")}
    for epoch, batch, updates, expected in (
        (0, 0, 3, labels["train"]),
        (1, 0, 3, labels["train"]),
        (2, 0, 4, labels["train"] + labels["val"]),
        (3, 0, 4, labels["train"] + labels["val"]),
        (3, 2, 2, (labels["train"] + labels["val"])[10:]),  # resumed in the middle of an epoch
    ):
        data.trainer = Trainer(epoch, batch)  # type: ignore[assignment]
        loader = data.train_dataloader()
        found = list(loader)
        assert len(found) == updates
        assert torch.cat([batch.labels for batch in found]).tolist() == expected
        assert data.watched_split == "val"  # there is no test split
    joined = loader.dataset.split  # type: ignore[attr-defined]
    assert np.array_equal(joined[13], store.split("val")[1])
    assert np.array_equal(joined[3], store.split("train")[3])


def test_each_image_is_mirrored_with_probability_one_half(small_store: Path) -> None:
    images = TrainImages(Store(small_store).split("train"), seed=3, crop=224)
    mirrored = torch.stack([images.__getitems__(whole_epoch(epoch)).mirror for epoch in range(400)]).float()
    assert float(mirrored.mean()) == pytest.approx(0.5, abs=5 * 0.5 / 4800**0.5)
    assert (mirrored.mean(0) - 0.5).abs().max() < 5 * 0.5 / 400**0.5


def test_sample_is_spread_evenly_over_the_split(small_store: Path) -> None:
    data = StoreData(Store(small_store), 5, 0, {"crop": 224}, predict_split="train", sample=4)
    assert list(data.predict_dataloader().sampler) == [0, 3, 7, 11]


def fields(batches: Iterable[Any]) -> list[list[Any]]:
    def comparable(field: Any) -> Any:
        return (field.shape, field.dtype, field.numpy().tobytes()) if isinstance(field, torch.Tensor) else field

    return [[comparable(field) for field in batch] for batch in batches]


def test_loader_processes_give_the_same_batches(small_store: Path) -> None:
    """Also when all batches are kept, of which there are more than buffers, and after an epoch that was not finished."""
    loaders = []
    for workers in (0, 2):
        data = StoreData(Store(small_store), 1, 0, {"crop": 224}, workers=workers)
        loaders.append((data.train_dataloader(), data.predict_dataloader()))
    (train, predict), (train_shared, predict_shared) = loaders
    assert train_shared.num_workers == 2
    expected = fields(train)
    assert len(expected) == 12
    next(iter(train_shared))
    for _ in range(2):
        assert fields(list(train_shared)) == expected
    assert fields(list(predict_shared)) == fields(predict)


@pytest.mark.gpu
@pytest.mark.parametrize("pinned_before", [False, True])
def test_loader_processes_send_the_same_pixels_to_a_gpu(pinned_before: bool, small_store: Path) -> None:
    """Even if copies begin late, and if batches are read later still, after the host has left them.

    ``_sleep`` holds up one stream of the GPU, by about 30 ms for 50 million cycles. Registering memory twice is an error,
    after which copies are slower and nothing else fails.
    """
    images, device = ValImages(Store(small_store).split("train")), torch.device("cuda")
    order = list(range(12)) * 2
    loader = make_loader(images, 1, 2, device, sampler=order)
    assert isinstance(loader, _Loader)
    cuda, buffers = torch.cuda.cudart(), loader.dataset.buffers
    if pinned_before:
        assert int(cuda.cudaHostRegister(buffers.data_ptr(), buffers.nbytes, 0)) == 0
    batches, found = iter(loader), []
    for _ in order:
        with torch.cuda.stream(_copying_stream(device)):
            torch.cuda._sleep(50_000_000)
        batch = next(batches)
        torch.cuda._sleep(100_000_000)
        found.append(batch.images.clone())
        del batch
    if pinned_before:
        assert int(cuda.cudaHostUnregister(buffers.data_ptr())) == 0
    assert torch.equal(torch.cat(found).cpu(), torch.from_numpy(np.stack([images.split[i] for i in order])))


def test_loader_processes_without_enough_shared_memory(small_store: Path) -> None:
    code = f"""
import resource
from alexnet_repro.data.module import StoreData
from alexnet_repro.data.store import Store

data = StoreData(Store({os.fspath(small_store)!r}), 5, 0, {{"crop": 224}}, workers=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
data.train_dataloader()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert "2 loader processes need 4 MB of shared memory, and there is less" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="PyTorch's own handling of signals")
def test_loaders_end_with_their_main_process_and_not_with_its_group(small_store: Path) -> None:
    """A main process that ends with an error waits for loaders; it ends those that do not hear of it with SIGTERM."""
    code = f"""
import os, signal, subprocess, sys, time
from alexnet_repro.data.module import StoreData
from alexnet_repro.data.store import Store

data = StoreData(Store({os.fspath(small_store)!r}), 5, 0, {{"crop": 224}}, workers=2)
batches = iter(data.train_dataloader())
next(batches)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
# from a process that is not their parent; some versions of kill(1) take the group -1234 for -1, which is every process
subprocess.run([sys.executable, "-c", f"import os; os.killpg({{os.getpgrp()}}, 15)"])
time.sleep(1)
next(batches)
sys.exit("an error")
"""
    began = time.monotonic()
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=100, start_new_session=True)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "an error"), done.stderr
    assert time.monotonic() - began < 60
