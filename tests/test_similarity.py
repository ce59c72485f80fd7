"""Compare the estimate of similarity with its formula term by term, and with what must hold for any representation."""

import csv
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from alexnet_repro import AlexNet, load_net
from alexnet_repro.configs import CONF
from alexnet_repro.errors import UserError
from alexnet_repro.page.report import report
from alexnet_repro.sharing.index import index
from alexnet_repro.sharing.similarity import LAYERS, cka, gram, similarity
from alexnet_repro.training.run import train
from tests.conftest import picture


def hsic_by_enumeration(k: np.ndarray, m: np.ndarray) -> float:
    """Return the unbiased estimate of HSIC as the mean over all ordered quadruples of different images.

    Song et al. 2012: E[k_ij m_ij] + E[k_ij m_qr] - 2 E[k_ij m_iq], with i, j, q, r all different.
    """
    quadruples = list(itertools.permutations(range(len(k)), 4))
    terms = [k[i, j] * m[i, j] + k[i, j] * m[q, r] - 2 * k[i, j] * m[i, q] for i, j, q, r in quadruples]
    return float(np.mean(terms))


def test_estimate_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(7, 3)).astype(np.float32)
    k, m = gram(x), gram(y)
    expected = hsic_by_enumeration(k, m) / (hsic_by_enumeration(k, k) * hsic_by_enumeration(m, m)) ** 0.5
    assert cka(k, m) == pytest.approx(expected, rel=1e-6)


def test_rotation_scale_and_shift_change_nothing_and_noise_is_unlike() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 20)).astype(np.float32)
    rotation, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    turned = (3 * x @ rotation + 5).astype(np.float32)
    assert cka(gram(x), gram(turned)) == pytest.approx(1, abs=1e-4)
    # with many more features than images, the plain estimate would be near 1
    unlike = [cka(gram(rng.normal(size=(60, 5000)).astype(np.float32)), gram(rng.normal(size=(60, 5000)).astype(np.float32))) for _ in range(8)]  # fmt: skip
    assert abs(np.mean(unlike)) < 0.05


def test_a_net_is_equal_to_itself_and_to_itself_with_permuted_maps(small_alexnet: Path) -> None:
    nets = [load_net(small_alexnet, at_chance=True) for _ in range(2)]
    other = nets[1].net
    assert isinstance(other, AlexNet)
    with torch.no_grad():  # reverse the neurons of fc6, and what reads them
        tower = other.fc6.weight.shape[0] // 2
        order = torch.cat([torch.arange(tower).flip(0), tower + torch.arange(tower).flip(0)])
        other.fc6.weight.copy_(other.fc6.weight[order])
        other.fc6.bias.copy_(other.fc6.bias[order])
        other.fc7.weight.copy_(other.fc7.weight[:, order])
    names, alike = similarity(nets, np.stack([picture(i, 110, 110) for i in range(12)]))
    assert tuple(names) == LAYERS
    assert alike.shape == (1, 8, 8)
    np.testing.assert_allclose(np.diag(alike[0]), 1, atol=1e-3)


@pytest.mark.slow
def test_kept_epochs_the_index_and_the_comparison_of_seeds(small_alexnet: Path, tmp_path: Path) -> None:
    store = small_alexnet.parent / "store"
    images = ["data=folder", "data.image_size=110", f"data.store={store}"]
    options = [*images, "recipe=as_run", "augment.crop=96", "net.width=0.125", "epochs=3", "batch_size=6", "trainer=cpu", "watch.every=0"]  # fmt: skip
    runs = [tmp_path / f"seed-{seed}" for seed in range(2)]
    with initialize_config_dir(CONF, version_base="1.3"):
        for seed, run in enumerate(runs):
            train(compose("train", [*options, f"seed={seed}", f"run={run}", "keep_epochs=[1,3]"]))
        with pytest.raises(UserError, match="this run has 3 epochs"):
            train(compose("train", [*options, f"run={tmp_path / 'x'}", "keep_epochs=[1,4]"]))
        page = report(compose("report", [f"runs=[{runs[0]},{runs[1]}]", f"out={tmp_path / 'page'}", f"results={tmp_path / 'seed-0'}", "trainer=cpu"]))  # fmt: skip
    rows = list(csv.DictReader(index(runs).splitlines()))
    assert [row["checkpoint"] for row in rows[:4]] == ["last", "best", "epoch-1", "epoch-3"]
    assert [row["epoch"] for row in rows if row["checkpoint"].startswith("epoch")] == ["1", "3", "1", "3"]
    for row in rows:
        content = (Path(row["run"]) / "checkpoints" / f"{row['checkpoint']}.ckpt").read_bytes()
        assert row["sha256"] == hashlib.sha256(content).hexdigest()
    kept, last = (load_net(runs[0], checkpoint=name, at_chance=True) for name in ("epoch-3", "last"))
    for name, value in last.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value), name
    sizes = [(runs[0] / "checkpoints" / f"{name}.ckpt").stat().st_size for name in ("epoch-3", "last")]
    assert sizes[0] < 0.6 * sizes[1], "it must not hold the momenta"
    assert "seeds 0, 1" in page["figures"]["similarity"][1]
    assert (tmp_path / "page" / "runs.csv").read_text() == page["index"]
