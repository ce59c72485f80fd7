"""Test the small nets of Sections 3.1 and 3.3, CIFAR-10's official files and the CIFAR-10 experiments."""

import functools
import hashlib
import http.server
import json
import os
import pickle
import shutil
import signal
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch.nn import functional as F
from torchvision.datasets import CIFAR10

from alexnet_repro.configs import CONF, leaves
from alexnet_repro.data.cifar10 import in_official_order
from alexnet_repro.data.listing import File
from alexnet_repro.data.store import Store
from alexnet_repro.net.cifar import FourLayer, LocalConv2d, LocallyConnected
from alexnet_repro.net.lrn import plain_local_response_norm
from alexnet_repro.training.classifier import Classifier
from alexnet_repro.training.optim import PaperSGD
from alexnet_repro.training.schedule import ByHand
from alexnet_repro.training.setup import joining_epoch, new_classifier
from tests.conftest import image_folder, picture, save_picture

Run = Callable[..., tuple[int, str, str]]


def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_local_layer_equals_a_loop_over_positions() -> None:
    torch.manual_seed(0)
    layer = LocalConv2d(5, 7, 4).double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    padded, expected = F.pad(x, (1, 1, 1, 1)), torch.zeros(3, 7, 4, 4, dtype=torch.float64)
    for row in range(4):
        for column in range(4):
            place = 4 * row + column
            for output in range(7):
                # kernels as (three rows, three columns, inputs)
                kernel = layer.weight[place, :, output].view(3, 3, 5).permute(2, 0, 1)
                window = padded[:, :, row : row + 3, column : column + 3]
                expected[:, output, row, column] = (window * kernel).sum((1, 2, 3)) + layer.bias[place, 0, output]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad((y * weights).sum(), [x, layer.weight]),
        torch.autograd.grad((expected * weights).sum(), [x, layer.weight]),
        rtol=1e-12,
        atol=1e-12,
    )


def test_layer_sizes_equal_the_layer_files() -> None:
    images = torch.zeros(2, 3, 24, 24)
    # 64 5x5x3 + 64, 64 5x5x64 + 64, 36 positions x (9 x 64 x maps + maps), 36 x (9 x maps x 32 + 32), 1152 x 10 + 10
    for maps, total in (
        (64, 4_864 + 102_464 + 1_329_408 + 664_704 + 11_530),
        (32, 4_864 + 102_464 + 664_704 + 332_928 + 11_530),
    ):
        assert parameters(LocallyConnected(local3_maps=maps)) == total
    shapes = {name: tuple(x.shape[1:]) for name, x in LocallyConnected().activations(images).items()}
    assert shapes == {
        "conv1": (64, 24, 24),
        "conv2": (64, 12, 12),
        "local3": (64, 6, 6),
        "local4": (32, 6, 6),
        "fc10": (10,),
    }
    assert parameters(FourLayer()) == 2_432 + 25_632 + 51_264 + 10_250
    shapes = {name: tuple(x.shape[1:]) for name, x in FourLayer().activations(torch.zeros(2, 3, 32, 32)).items()}
    assert shapes == {"conv1": (32, 32, 32), "conv2": (32, 16, 16), "conv3": (64, 8, 8), "fc10": (10,)}
    with pytest.raises(ValueError, match="8x8: the net was built for 6x6"):
        LocallyConnected()(torch.zeros(1, 3, 32, 32))
    for size in (25, 20):
        with pytest.raises(ValueError, match="image_size"):
            FourLayer(image_size=size)


def test_weights_have_the_deviations_of_the_layer_files() -> None:
    torch.manual_seed(0)
    for net, deviations in (
        (FourLayer(), {"conv1": 1e-4, "conv2": 0.01, "conv3": 0.01, "fc10": 0.01}),
        (LocallyConnected(), {"conv1": 1e-4, "conv2": 0.01, "local3": 0.04, "local4": 0.04, "fc10": 0.01}),
    ):
        for name, deviation in deviations.items():
            layer = net.get_submodule(name)
            assert float(layer.weight.std()) == pytest.approx(deviation, rel=0.05)  # type: ignore[operator, union-attr]
            assert not layer.bias.any()  # type: ignore[operator, union-attr]


EXPERIMENTS: dict[str, dict[str, Any]] = {  # from the authors' layer files
    "cifar10_13pct": {"norm": None, "maps": 32, "decay": (0, 0, 0.004, 0.004, 0.004), "protocol": (160, 100)},
    "cifar10_11pct_first": {
        "norm": (5, True),
        "maps": 32,
        "decay": (0, 0, 0.004, 0.004, 0.004),
        "protocol": (160, 100),
    },
    "cifar10_11pct": {"norm": (9, False), "maps": 64, "decay": (0, 0, 0.004, 0.004, 0.01), "protocol": (520, 350)},
}


def model_of(cfg: DictConfig) -> Classifier:
    """Build the classifier of a config without a store."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    parts = {key: plain[key] for key in ("optim", "schedule", "augment", "epochs")}
    net = plain["net"] | {"classes": 10}
    return Classifier(net=net, image_size=32, class_names=list("abcdefghij"), seed=0, **parts)


def rates_and_decays(model: Classifier) -> dict[str, tuple[float, float]]:
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    by_id = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: by_id[id(p)] for name, p in model.net.named_parameters()}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_nets_of_section_3_3_equal_the_layer_files(name: str) -> None:
    wanted = EXPERIMENTS[name]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", [f"+experiment={name}"])
    model = model_of(cfg)
    net: Any = model.net
    assert net.local3.weight.shape[2] == wanted["maps"]
    if wanted["norm"] is None:
        assert not hasattr(net, "norm1")
    else:
        size, before_pool = wanted["norm"]
        for norm in (net.norm1, net.norm2):
            assert (norm.size, norm.alpha, norm.beta, norm.k) == (size, 0.001 / size, 0.75, 1)
        stages = [stage for stage, _ in net.named_children()]
        assert (stages.index("norm1") < stages.index("pool1")) == before_pool
        assert stages.index("norm2") < stages.index("pool2")
    found = rates_and_decays(model)
    assert len(found) == 10
    for layer, decay in zip(("conv1", "conv2", "local3", "local4", "fc10"), wanted["decay"], strict=True):
        assert found[f"{layer}.weight"] == pytest.approx((0.001, decay)), layer
        assert found[f"{layer}.bias"] == (0.002, 0), layer
    epochs, joins = wanted["protocol"]
    assert (cfg.epochs, joining_epoch(cfg), cfg.order, cfg.trainer.precision) == (epochs, joins, "stored", "32-true")
    assert (cfg.augment.crop, cfg.augment.random_crops, cfg.augment.mirror) == (24, True, True)


def test_normalisation_is_placed_as_in_the_layer_files() -> None:
    """Compare with layers that are combined by hand, in float64."""
    torch.manual_seed(0)
    images = 60 * torch.randn(2, 3, 24, 24, dtype=torch.float64)
    for norm, first in (("n5_before_pools", True), ("n9", False)):
        net = LocallyConnected(norm=norm).double()
        size = int(norm[1])

        def lrn(x: torch.Tensor, size: int = size) -> torch.Tensor:
            return plain_local_response_norm(x, size, 0.001 / size, 0.75, 1.0)

        def pool(x: torch.Tensor) -> torch.Tensor:
            return F.max_pool2d(x, 3, 2, ceil_mode=True)

        x = F.conv2d(images, net.conv1.weight, net.conv1.bias, padding=2).relu()
        x = pool(lrn(x)) if first else lrn(pool(x))
        x = pool(lrn(F.conv2d(x, net.conv2.weight, net.conv2.bias, padding=2).relu()))
        expected = net.fc10(net.local4(net.local3(x).relu()).relu().flatten(1))
        torch.testing.assert_close(net(images), expected, rtol=1e-9, atol=1e-12)


def test_18_percent_net_equals_its_layer_file() -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["+experiment=cifar10_18pct"])
    model = model_of(cfg)
    found = rates_and_decays(model)
    for layer, decay in {"conv1": 0.004, "conv2": 0.004, "conv3": 0.004, "fc10": 1.0}.items():
        assert found[f"{layer}.weight"] == pytest.approx((0.001, decay)), layer
        assert found[f"{layer}.bias"] == (0.002, 0), layer
    assert (cfg.epochs, joining_epoch(cfg), cfg.augment.crop, cfg.augment.mirror) == (140, 0, 32, False)
    torch.manual_seed(0)
    net: Any = model.net.double()
    images = 60 * torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def norm(x: torch.Tensor) -> torch.Tensor:
        window = (
            F.avg_pool2d(x.square(), 3, 1, padding=1) * 9
        )  # the zero padding is included in the average, so 9 times it is the sum
        return x / (1 + 0.00005 / 9 * window) ** 0.75

    x = norm(F.max_pool2d(net.conv1(images).relu(), 3, 2, ceil_mode=True))
    x = norm(F.avg_pool2d(net.conv2(x).relu(), 3, 2, ceil_mode=True))
    expected = net.fc10(F.avg_pool2d(net.conv3(x).relu(), 3, 2, ceil_mode=True).flatten(1))
    torch.testing.assert_close(net(images), expected, rtol=1e-9, atol=1e-12)


def test_figure_1_uses_no_regularisation_and_all_five_batches() -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["+experiment=figure_1"])
    assert {decay for _, decay in rates_and_decays(model_of(cfg)).values()} == {0}
    assert (cfg.augment.random_crops, cfg.augment.mirror, joining_epoch(cfg)) == (False, False, 0)


@pytest.mark.parametrize(
    ("name", "epochs", "joins", "tenth", "hundredth"),
    [
        ("cifar10_13pct", 160, 100, 140, 150),
        ("cifar10_11pct", 520, 350, 500, 510),
        ("cifar10_18pct", 140, 0, 120, 130),
        ("cifar10_11pct", 90, 61, 70, 80),
        ("cifar10_13pct", 4, 2, 2, 3),
    ],
)
def test_last_epochs_of_the_cifar_protocols_are_not_scaled_and_biases_keep_their_rate(
    name: str, epochs: int, joins: int, tenth: int, hundredth: int
) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", [f"+experiment={name}", f"epochs={epochs}"])
    assert joining_epoch(cfg) == joins
    by_hand = cfg.schedule.by_hand
    groups = {"weights": 0.001, "conv1_weights": 0.001, "biases": 0.002, "conv1_biases": 0.002}
    optimizer = PaperSGD(
        [{"name": n, "params": [torch.zeros(1, requires_grad=True)], "lr": lr} for n, lr in groups.items()]
    )
    schedule = ByHand(optimizer, epochs, by_hand.of_epochs, by_hand.changes, lr=0.001)
    seen = []
    for _ in range(epochs):
        seen.append([group["lr"] for group in optimizer.param_groups])
        schedule.after_epoch(50.0)
    parts = [0.001] * tenth + [0.0001] * (hundredth - tenth) + [0.00001] * (epochs - hundredth)
    assert [rates[0] for rates in seen] == pytest.approx(parts)
    assert [rates[1] for rates in seen] == pytest.approx(parts)
    assert {rate for rates in seen for rate in rates[2:]} == {0.002}


def test_controlled_comparison_changes_only_the_normalisation() -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        first, without, thirteen = (
            dict(leaves(compose("train", words)))
            for words in (
                ["+experiment=cifar10_lrn", "+ablation=none"],
                ["+experiment=cifar10_lrn", "+ablation=no_lrn"],
                ["+experiment=cifar10_13pct"],
            )
        )
    assert {key for key in first if first[key] != without.get(key)} == {"net.lrn"}
    # without normalisation, the net is the 13% net; net.norm then has no effect
    assert {key for key in thirteen if thirteen[key] != without.get(key)} == {"net.norm"}


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an archive in CIFAR-10's official format with 30 + 10 images and return its folder.

    Each image is a red plane, then a green plane, then a blue plane.
    """
    root = tmp_path_factory.mktemp("official")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "test_batch"]):
        images = np.stack([picture(100 * number + i, 32, 32) for i in range(10)])
        content = {"data": images.transpose(0, 3, 1, 2).reshape(10, -1), "labels": [i % 10 for i in range(10)]}
        (folder / name).write_bytes(pickle.dumps(content))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(folder, folder.name)
    return root


@pytest.fixture
def served(official: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve that archive from this machine and make torchvision's CIFAR10 download it."""

    def checksum(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(official)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = official / "cifar-10-batches-py"
    batches = ["data_batch_1", "data_batch_2", "data_batch_3"]
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", checksum(official / "cifar-10-python.tar.gz"))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, checksum(folder / name)] for name in batches])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksum(folder / "test_batch")]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": checksum(folder / "batches.meta")}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    yield
    server.shutdown()


def test_official_batches_are_downloaded_trained_on_and_evaluated(
    served: None, official: Path, cwd: Path, run_command: Run
) -> None:
    status, out, err = run_command("prepare", "data=cifar10")
    assert status == 0, err
    assert "20 train, 10 val, 10 test images of 10 classes, 32x32" in out
    store = Store("stores/cifar10")
    for split, index, number in (("train", 14, 1), ("val", 4, 2), ("test", 4, 3)):
        np.testing.assert_array_equal(store.split(split)[index], picture(100 * number + 4, 32, 32))
    assert store.classes[store.split("test").labels[2]] == "bird"

    small = ("trainer=cpu", "trainer.precision=32-true", "batch_size=8", "epochs=3")
    status, out, err = run_command("train", "+experiment=figure_1", "+ablation=tanh", *small, "run=r")
    assert status == 0, err
    result = json.loads(Path("r/result.json").read_text())
    assert (result["net"], result["activation"], result["split"], result["claim"]) == (
        "four_layer",
        "tanh",
        "test",
        None,
    )
    assert [entry["epoch"] for entry in result["history"]] == [1, 2, 3]
    assert [entry["steps"] for entry in result["history"]] == [4, 8, 12]
    assert all({"train_error", "test_error"} <= set(entry) for entry in result["history"])
    assert result["history"][-1]["test_error"] == result["centre"]["top1_error"]
    assert not Path("r/checkpoints/best.ckpt").exists()  # test images never select a checkpoint

    # a folder that already holds the batches, then damaged batches
    status, out, err = run_command("prepare", "data=cifar10", f"source={official}", "data.store=stores/second")
    assert status == 0, err
    assert np.array_equal(Store("stores/second").split("val")[9], store.split("val")[9])
    # the archive as downloaded, the folder with it, and the folder of the batches itself
    archive = cwd / "downloads/cifar-10-python.tar.gz"
    archive.parent.mkdir()
    shutil.copy(official / archive.name, archive)
    for number, source in enumerate((archive, archive.parent, official / "cifar-10-batches-py")):
        line = ("prepare", "data=cifar10", f"source={source}", f"data.store=forms/{number}")
        status, out, err = run_command(*line)
        assert status == 0, err
        assert Store(f"forms/{number}").images_sha256 == store.images_sha256
    assert sorted(path.name for path in Path("forms").iterdir()) == ["0", "1", "2"]
    (cwd / "bin/cifar-10-batches-bin").mkdir(parents=True)
    status, _, err = run_command("prepare", "data=cifar10", "source=bin", "data.store=forms/4")
    assert (status, "cifar-10-batches-bin is not the version" in err) == (2, True), err
    archive.write_bytes(archive.read_bytes()[:500])
    status, _, err = run_command("prepare", "data=cifar10", "source=downloads", "data.store=forms/4")
    assert (status, "cifar-10-python.tar.gz is damaged" in err) == (2, True), err
    (cwd / "bad").mkdir()
    with tarfile.open(official / "cifar-10-python.tar.gz") as tar:
        tar.extractall(cwd / "bad", filter="data")
    (cwd / "bad/cifar-10-batches-py/data_batch_2").write_bytes(b"no pickle")
    status, out, err = run_command("prepare", "data=cifar10", "source=bad", "data.store=stores/third")
    assert status == 2
    assert "CIFAR-10 is damaged" in err


def test_validation_errors_select_and_test_errors_are_reported(cwd: Path, run_command: Run) -> None:
    image_folder(cwd / "images", train=6, val=3)
    for name, seed, count in (
        ("cat", 50, 5),
        ("dog", 60, 2),
    ):  # no constant prediction has the same error on both splits
        for i in range(count):
            save_picture(cwd / "images" / "test" / name / f"{i}.jpg", seed + i)
    small = ("data=folder", "data.image_size=32")
    assert run_command("prepare", *small, "source=images")[0] == 0
    net = (
        "recipe=cuda_convnet",
        "schedule.by_hand.val_joins_after=null",
        "net=locally_connected",
        "epochs=2",
        "batch_size=4",
        "trainer=cpu",
        "run=r",
    )
    status, out, err = run_command("train", *small, *net)
    assert status == 0, err
    assert "12 training, 6 val, 7 test images" in out
    result = json.loads(Path("r/result.json").read_text())
    assert result["split"] == "test"
    for error, images in ((result["history"][-1]["val_error"], 6), (result["centre"]["top1_error"], 7)):
        wrong = error * images / 100
        assert wrong == pytest.approx(round(wrong), abs=1e-3)
        assert 0 < wrong < images  # no multiple of 1/6 between 0 and 1 is a multiple of 1/7
    assert Path("r/checkpoints/best.ckpt").exists()
    status, out, err = run_command("evaluate", "run=r", "split=val")
    assert status == 0, err
    measured = json.loads(Path("r/evaluation-last-val-centre.json").read_text())["centre"]["top1_error"]
    assert measured == pytest.approx(result["history"][-1]["val_error"], abs=1e-3)


def test_schedule_does_not_use_test_images(cwd: Path, run_command: Run) -> None:
    image_folder(cwd / "images", train=6, val=0)
    for name in ("cat", "dog"):
        save_picture(cwd / "images" / "test" / name / "0.jpg", 50)
    assert run_command("prepare", "data=cifar10", "source=images", "data.subset=true")[0] == 0
    status, _, err = run_command("train", "data=cifar10")
    assert status == 2
    assert "no validation images" in err


def test_schedule_rule_without_settings_in_the_recipe_is_refused(served: None, cwd: Path, run_command: Run) -> None:
    assert run_command("prepare", "data=cifar10")[0] == 0
    status, _, err = run_command("train", "+experiment=cifar10_13pct", "schedule.rule=when_error_stalls")
    assert status == 2
    assert "recipe=cuda_convnet has no schedule.when_error_stalls" in err


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data=cifar10", "net=four_layer"], "net=four_layer has no option net.init"),
        (["+experiment=figure_1", "+ablation=one_gpu"], "net=four_layer has no option net.towers"),
        (["+experiment=figure_1", "+ablation=no_lrn"], "net=four_layer has no option net.lrn"),
        (["+experiment=figure_1", "augment.crop=20", "batch_size=8"], "multiple of 8"),
        (["+experiment=figure_1", "placement=two_devices"], "net=four_layer has no second tower"),
        (["+experiment=figure_1", "stop_at=120"], "stop_at=120"),
    ],
)
def test_options_that_the_net_lacks_are_refused(
    overrides: list[str], problem: str, served: None, cwd: Path, run_command: Run
) -> None:
    assert run_command("prepare", "data=cifar10")[0] == 0
    status, _, err = run_command("train", *overrides, "schedule.rule=constant")
    assert status == 2
    assert problem in err


def test_training_stops_at_the_error_of_figure_1(served: None, cwd: Path, run_command: Run) -> None:
    assert run_command("prepare", "data=cifar10")[0] == 0
    small = ("trainer=cpu", "trainer.precision=32-true", "batch_size=8", "epochs=300")
    status, _, err = run_command("train", "+experiment=figure_1", *small, "run=r")
    assert status == 0, err
    errors = [entry["train_error"] for entry in json.loads(Path("r/result.json").read_text())["history"]]
    assert errors[-1] <= 25 < min(errors[:-1])


def test_training_error_is_measured_before_each_update(served: None, cwd: Path) -> None:
    """Compare with predictions before each update, batch by batch, including after the saved sum is restored."""
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["+experiment=figure_1"])
    from alexnet_repro.data.module import StoreData
    from alexnet_repro.data.preparation import prepare

    with initialize_config_dir(CONF, version_base="1.3"):
        prepare(compose("prepare", ["data=cifar10"]))
    store = Store("stores/cifar10")
    torch.manual_seed(0)
    model, other = new_classifier(cfg, store), new_classifier(cfg, store)
    misses = 0
    for n, batch in enumerate(StoreData(store, 8, 0, {"crop": 32}).train_dataloader()):
        misses += int((model.net(model.training_images(batch)).argmax(1) != batch.labels).sum())
        model.loss(batch)
        if n == 1:  # as if the run stopped and resumed here
            checkpoint: dict = {}
            model.on_save_checkpoint(checkpoint)
            other.load_state_dict(model.state_dict())
            other.on_load_checkpoint(checkpoint)
            model = other
    assert float(model.training_means.compute()[-1, 0]) == pytest.approx(100 * misses / 20)


def test_experiment_files_contain_their_commands() -> None:
    for file in Path(CONF, "experiment").glob("*.yaml"):
        assert f"+experiment={file.stem}" in file.read_text()


def test_two_part_protocol_is_one_run_and_resumes_exactly(served: None, cwd: Path, run_command: Run) -> None:
    """Stop before, at and after the epoch at which batch 5 joins; resumed runs are bitwise equal to the whole run."""
    assert run_command("prepare", "data=cifar10")[0] == 0
    small = ("+experiment=cifar10_13pct", "trainer=cpu", "batch_size=8", "epochs=8", "data.images_per_file=10")
    assert run_command("train", *small, "run=whole")[0] == 0
    whole = json.loads(Path("whole/result.json").read_text())
    history = whole["history"]
    assert ["val_error" in epoch for epoch in history] == [True] * 5 + [False] * 3
    assert ["test_error" in epoch for epoch in history] == [False] * 5 + [True] * 3
    assert [epoch["steps"] for epoch in history] == [
        4,
        8,
        12,
        16,
        20,
        26,
        32,
        38,
    ]  # batches from two files, then from three
    assert [len(epoch["files"]) for epoch in history] == [2] * 5 + [3] * 3
    assert not Path("whole/checkpoints/best.ckpt").exists()
    assert set(whole["nine_crop"]) == {"top1_error", "top5_error", "log_loss"}

    for stop in (3, 20, 23):  # updates
        original = Classifier.training_step

        def step(self: Classifier, batch: Any, index: int, stop: int = stop, original: Any = original) -> Any:
            if self.global_step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, batch, index)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Classifier, "training_step", step)
            assert run_command("train", *small, f"run=parts-{stop}")[0] == 130
        status, _, err = run_command("train", *small, f"run=parts-{stop}", "resume=true")
        assert status == 0, err
        resumed = json.loads(Path(f"parts-{stop}/result.json").read_text())
        for key in ("history", "centre", "ten_crop", "nine_crop", "train_sample", "steps"):
            assert resumed[key] == whole[key], key
        left, right = (
            torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
            for run in ("whole", f"parts-{stop}")
        )
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_batch_5_is_recognised_by_the_image_number(cwd: Path) -> None:
    names = ["train/a/39999.png", "train/b/00003.png", "train/b/40000.png", "test/a/00001.png", "train/a/00010.png"]
    files = [File(name, Path(name), 0, 0, split=name.split("/")[0]) for name in names]
    found = [(file.split, Path(file.name).stem) for file in in_official_order(files)]
    assert found == [("test", "00001"), ("train", "00003"), ("train", "00010"), ("train", "39999"), ("val", "40000")]
    named = [File("train/a/cat1.png", Path("x"), 0, 0, split="train"), *files]
    assert in_official_order(named) == named


def test_store_without_validation_images_is_refused_by_a_two_part_protocol(
    served: None, cwd: Path, run_command: Run
) -> None:
    image_folder(cwd / "images", train=6, val=0)
    for name in ("cat", "dog"):
        save_picture(cwd / "images" / "test" / name / "0.jpg", 50)
    assert run_command("prepare", "data=cifar10", "source=images", "data.store=stores/old", "data.subset=true")[0] == 0
    status, _, err = run_command("train", "+experiment=cifar10_13pct", "data.store=stores/old")
    assert status == 2
    assert "has no validation images, which this protocol trains on after 100 epochs" in err
