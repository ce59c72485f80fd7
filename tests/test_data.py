"""Order and augmentation are a function of (seed, epoch, sample index), and of nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch

from alexnet_repro.data import EpochSampler, StoreData, TrainImages, draw, epoch_order
from alexnet_repro.store import Store


def batches(store: Path, steps_done: int = 0, workers: int = 0, seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    data = StoreData(Store(store), batch_size=5, seed=seed, crop=224, workers=workers)
    loader = data.train_dataloader()
    loader.batch_sampler.steps_done = lambda: steps_done  # type: ignore[union-attr]
    return list(loader)


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_batches_do_not_depend_on_workers_or_on_the_global_generator(small_store: Path) -> None:
    here = batches(small_store)
    torch.manual_seed(99)
    np.random.seed(99)
    there = batches(small_store, workers=2)
    assert len(here) == 3
    assert all(map(same, here, there))
    assert not any(map(same, here, batches(small_store, seed=1)))


def test_an_epoch_goes_on_where_it_was_left(small_store: Path) -> None:
    second_epoch = batches(small_store, steps_done=3)
    assert not any(map(same, batches(small_store), second_epoch))
    for done in (1, 2):
        rest = batches(small_store, steps_done=3 + done)
        assert len(rest) == 3 - done
        assert all(map(same, second_epoch[done:], rest))


def test_an_epoch_shows_every_image_once(small_store: Path) -> None:
    for epoch in range(3):
        seen = [key for batch in EpochSampler(12, 5, 0, lambda epoch=epoch: 3 * epoch) for key in batch]  # type: ignore[misc]
        assert sorted(seen) == [(epoch, index) for index in range(12)]
    orders = [epoch_order(seed, epoch, 1000).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_draws_reach_all_33_by_33_positions_and_both_sides_evenly() -> None:
    draws = [draw(0, epoch, index, 33) for epoch in range(100) for index in range(300)]
    positions = np.zeros((33, 33))
    np.add.at(positions, ([d.top for d in draws], [d.left for d in draws]), 1)
    assert positions.min() > 0
    expected = 30_000 / 33**2
    assert ((positions - expected) ** 2 / expected).sum() == pytest.approx(
        1088, abs=5 * (2 * 1088) ** 0.5
    )  # chi squared
    assert np.mean([d.mirror for d in draws]) == pytest.approx(0.5, abs=5 * 0.5 / 30_000**0.5)
    colours = np.array([d.colour for d in draws])
    np.testing.assert_allclose(np.cov(colours.T), np.eye(3), atol=0.05)


def test_a_patch_is_the_part_of_the_image_that_was_drawn(small_store: Path) -> None:
    split = Store(small_store).split("train")
    batch = TrainImages(split, seed=4, crop=224).__getitems__([(2, 7), (2, 0), (3, 7)])
    for n, (epoch, index) in enumerate([(2, 7), (2, 0), (3, 7)]):
        top, left, mirror, colour = draw(4, epoch, index, 33)
        expected = split[index][top : top + 224, left : left + 224]
        assert np.array_equal(batch.patches[n].numpy(), expected[:, ::-1] if mirror else expected)
        assert batch.labels[n] == split.labels[index]
        np.testing.assert_allclose(batch.colour[n].numpy(), colour, rtol=1e-6)
