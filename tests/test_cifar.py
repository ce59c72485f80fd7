"""The small nets of Sections 3.1 and 3.3, CIFAR-10's official files, and the experiments on them."""

import functools
import hashlib
import http.server
import json
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.nn import functional as F
from torchvision.datasets import CIFAR10

from alexnet_repro.cifar import FourLayer, LocalConv2d, LocallyConnected
from alexnet_repro.cli import CONF, leaves
from alexnet_repro.optim import ByHand, PaperSGD, parameter_groups
from alexnet_repro.store import Store
from alexnet_repro.train import new_classifier
from tests.conftest import image_folder, picture, save_picture

Run = Callable[..., tuple[int, str, str]]


def parameters(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def test_local_layer_equals_a_loop_over_places() -> None:
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


def test_sizes_are_those_of_the_layer_files() -> None:
    images = torch.zeros(2, 3, 24, 24)
    # 64 5x5x3 + 64, 64 5x5x64 + 64, 36 places x (9 x 64 x maps + maps), 36 x (9 x maps x 32 + 32), 1152 x 10 + 10
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


def test_decay_and_rates_of_each_layer_are_those_of_2012() -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        eleven = compose("train", ["+experiment=cifar10_lrn"])
        thirteen = compose("train", ["+experiment=cifar10_lrn", "+ablation=thirteen_percent"])
        plain = compose("train", ["+experiment=figure_1"])
    for cfg, net, fc10 in ((eleven, LocallyConnected(), 0.01), (thirteen, LocallyConnected(local3_maps=32), 0.004)):
        optim = {key: value for key, value in OmegaConf.to_container(cfg.optim).items() if key != "momentum"}  # type: ignore[union-attr]
        got = {
            id(p): (group["weight_decay"], group["lr"])
            for group in parameter_groups(net, **optim)
            for p in group["params"]
        }
        decay = {"conv1": 0, "conv2": 0, "local3": 0.004, "local4": 0.004, "fc10": fc10}
        assert len(got) == 10
        for name, p in net.named_parameters():
            layer, _, kind = name.partition(".")
            assert got[id(p)] == (pytest.approx((decay[layer], 0.001) if kind == "weight" else (0, 0.002))), name
    assert plain.optim.weight_decay == 0
    assert not plain.augment.random_crops
    assert not plain.augment.mirror


@pytest.mark.parametrize(("epochs", "tenth", "hundredth"), [(520, 500, 510), (90, 70, 80), (40, 20, 30), (4, 2, 3)])
def test_the_last_epochs_of_the_2012_cifar_protocol_are_not_scaled(epochs: int, tenth: int, hundredth: int) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["+experiment=cifar10_lrn"]).schedule.by_hand
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = PaperSGD([{"name": "weights", "params": [parameter], "lr": 0.001}])
    schedule = ByHand(optimizer, epochs, cfg.of_epochs, cfg.changes)
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        schedule.after_epoch(50.0)
    parts = [0.001] * tenth + [0.0001] * (hundredth - tenth) + [0.00001] * (epochs - hundredth)
    assert seen == pytest.approx(parts)


def test_the_controlled_comparison_changes_the_norm_alone() -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfgs = [
            dict(leaves(compose("train", ["+experiment=cifar10_lrn", f"+ablation={name}"])))
            for name in ("none", "no_lrn")
        ]
    assert {key for key in cfgs[0] if cfgs[0][key] != cfgs[1].get(key)} == {"net.lrn"}


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive in CIFAR-10's official format with 30 + 10 images: planes of red, green and blue, one after the other."""
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
    """torchvision's CIFAR10 fetches that archive from this machine."""

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


def test_official_batches_are_downloaded_trained_on_and_measured(
    served: None, official: Path, cwd: Path, run_command: Run
) -> None:
    status, out, err = run_command("prepare", "data=cifar10")
    assert status == 0, err
    assert "30 train, 10 test images of 10 classes, 32x32" in out
    store = Store("stores/cifar10")
    for split, number in (("train", 1), ("test", 3)):
        np.testing.assert_array_equal(
            store.split(split)[10 * (split == "train") + 4], picture(100 * number + 4, 32, 32)
        )
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
    assert not Path("r/checkpoints/best.ckpt").exists()  # the test images choose nothing

    # a folder that has the batches already; damaged ones
    status, out, err = run_command("prepare", "data=cifar10", f"source={official}", "data.store=stores/second")
    assert status == 0, err
    assert np.array_equal(Store("stores/second").split("train")[29], store.split("train")[29])
    (cwd / "bad").mkdir()
    with tarfile.open(official / "cifar-10-python.tar.gz") as tar:
        tar.extractall(cwd / "bad", filter="data")
    (cwd / "bad/cifar-10-batches-py/data_batch_2").write_bytes(b"no pickle")
    status, out, err = run_command("prepare", "data=cifar10", "source=bad", "data.store=stores/third")
    assert status == 2
    assert "CIFAR-10 is damaged" in err


def test_validation_images_choose_and_test_images_are_reported(cwd: Path, run_command: Run) -> None:
    image_folder(cwd / "images", train=6, val=3)
    for name, seed, count in (("cat", 50, 5), ("dog", 60, 2)):  # no constant answer has the same error on both
        for i in range(count):
            save_picture(cwd / "images" / "test" / name / f"{i}.jpg", seed + i)
    small = ("data=folder", "data.image_size=32")
    assert run_command("prepare", *small, "source=images")[0] == 0
    net = ("recipe=cuda_convnet", "net=locally_connected", "epochs=2", "batch_size=4", "trainer=cpu", "run=r")
    status, out, err = run_command("train", *small, *net)
    assert status == 0, err
    assert "12 training, 6 val, 7 test images" in out
    result = json.loads(Path("r/result.json").read_text())
    assert result["split"] == "test"
    for error, images in ((result["history"][-1]["val_error"], 6), (result["centre"]["top1_error"], 7)):
        wrong = error * images / 100
        assert wrong == pytest.approx(round(wrong), abs=1e-3)
        assert 0 < wrong < images  # which no 6th is a 7th of
    assert Path("r/checkpoints/best.ckpt").exists()
    status, out, err = run_command("evaluate", "run=r", "split=val")
    assert status == 0, err
    measured = json.loads(Path("r/evaluation-last-val-centre.json").read_text())["centre"]["top1_error"]
    assert measured == pytest.approx(result["history"][-1]["val_error"], abs=1e-3)


def test_a_schedule_does_not_look_at_test_images(served: None, cwd: Path, run_command: Run) -> None:
    assert run_command("prepare", "data=cifar10")[0] == 0
    status, _, err = run_command(
        "train",
        "data=cifar10",
        "net=four_layer",
        "augment.crop=32",
        "recipe=cuda_convnet",
        "schedule.rule=when_error_stalls",
    )
    assert status == 2
    assert "no validation images" in err


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data=cifar10", "net=four_layer"], "net=four_layer has no init, lrn_alpha, layer1_order, same_map_norm"),
        (["+experiment=figure_1", "+ablation=one_gpu"], "net=four_layer has no towers"),
        (["+experiment=figure_1", "+ablation=no_lrn"], "net=four_layer has no lrn"),
        (["+experiment=figure_1", "augment.crop=20"], "multiple of 8"),
        (["+experiment=figure_1", "placement=two_devices"], "net=four_layer has no second tower"),
        (["+experiment=figure_1", "stop_at=120"], "stop_at=120"),
    ],
)
def test_what_a_net_does_not_have_is_refused(
    overrides: list[str], problem: str, served: None, cwd: Path, run_command: Run
) -> None:
    assert run_command("prepare", "data=cifar10")[0] == 0
    status, _, err = run_command("train", *overrides, "schedule.rule=constant")
    assert status == 2
    assert problem in err


def test_training_ends_at_the_error_of_figure_1(served: None, cwd: Path, run_command: Run) -> None:
    assert run_command("prepare", "data=cifar10")[0] == 0
    small = ("trainer=cpu", "trainer.precision=32-true", "batch_size=8", "epochs=300")
    status, _, err = run_command("train", "+experiment=figure_1", *small, "run=r")
    assert status == 0, err
    errors = [entry["train_error"] for entry in json.loads(Path("r/result.json").read_text())["history"]]
    assert errors[-1] <= 25 < min(errors[:-1])


def test_training_error_is_that_of_the_images_as_they_were_met(served: None, cwd: Path) -> None:
    """Against predictions made one batch at a time, before each update, also over a resumption's saved sum."""
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["+experiment=figure_1"])
    from alexnet_repro.data import StoreData
    from alexnet_repro.prepare import prepare

    with initialize_config_dir(CONF, version_base="1.3"):
        prepare(compose("prepare", ["data=cifar10"]))
    store = Store("stores/cifar10")
    torch.manual_seed(0)
    model, other = new_classifier(cfg, store), new_classifier(cfg, store)
    misses = 0
    for n, batch in enumerate(StoreData(store, 8, 0, {"crop": 32}).train_dataloader()):
        misses += int((model.net(model.training_images(batch)).argmax(1) != batch.labels).sum())
        model.loss(batch)
        if n == 1:  # as if stopped and resumed here
            checkpoint: dict = {}
            model.on_save_checkpoint(checkpoint)
            other.load_state_dict(model.state_dict())
            other.on_load_checkpoint(checkpoint)
            model = other
    assert float(model.train_error.compute()) == pytest.approx(100 * misses / 30)


def test_experiments_name_their_commands() -> None:
    for file in Path(CONF, "experiment").glob("*.yaml"):
        assert f"+experiment={file.stem}" in file.read_text()
