"""Run docs/python.md, and test train(), Classifier's defaults and recipes, and what the command line passes on."""

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from alexnet_repro import AlexNet, Classifier, Store, StoreData, train
from alexnet_repro.composition import composed
from alexnet_repro.configs import CONF
from alexnet_repro.errors import UserError
from alexnet_repro.training import recipes
from alexnet_repro.training.setup import new_classifier
from tests.conftest import SMALL

ROOT = Path(CONF).parent
PAGE = (ROOT / "docs/python.md").read_text()
Run = Callable[..., tuple[int, str, str]]


def test_the_page_runs_as_it_is(cwd: Path) -> None:
    program = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)) + "\nmain()\n"
    Path("page.py").write_text(program)
    line = [sys.executable, "page.py", "epochs=1", "net.width=0.25", "+ablation=no_lrn", "trainer=cpu", "batch_size=40"]
    line += ["data.train_per_class=20", "data.val_per_class=5"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.parts[1] for path in Path().glob("runs/*/*/result.json")} == {
        "paper-data.train_per_class=20-data.val_per_class=5-epochs=1-net.width=0.25",
        "paper-no_lrn-batch_size=40-data.train_per_class=20-data.val_per_class=5-epochs=1-net.width=0.25",
    }


def test_defaults_of_the_classifier_are_the_printed_recipe() -> None:
    cfg: Any = OmegaConf.to_container(composed("train", ["recipe=paper", "data=ilsvrc2012"]), resolve=True)
    defaults = {name: p.default for name, p in inspect.signature(Classifier).parameters.items()}
    assert defaults["optim"] == cfg["optim"]
    assert defaults["augment"] == cfg["augment"]
    assert defaults["epochs"] == cfg["epochs"]
    assert defaults["image_size"] == cfg["data"]["image_size"]
    assert defaults["schedule"]["rule"] == cfg["schedule"]["rule"]
    assert defaults["schedule"]["when_error_stalls"] == cfg["schedule"]["when_error_stalls"]
    assert inspect.signature(StoreData).parameters["batch_size"].default == cfg["batch_size"]
    assert inspect.signature(StoreData).parameters["order"].default == cfg["order"]
    net = {name: p.default for name, p in inspect.signature(AlexNet).parameters.items() if name != "classes"}
    assert {**net, "floor_pools": []} == {key: value for key, value in cfg["net"].items() if key != "name"}
    assert sum(p.numel() for p in Classifier().parameters()) == 60_965_224


@pytest.mark.parametrize("recipe", ["paper", "as_run"])
def test_from_recipe_is_what_the_command_line_builds(recipe: str, small_store: Path) -> None:
    store = Store(small_store)
    options = [
        f"recipe={recipe}",
        "data=ilsvrc2012",
        "epochs=4",
        "net.width=0.25",
        "optim.lr=0.02",
        "augment.mirror=false",
    ]
    torch.manual_seed(0)
    expected = new_classifier(composed("train", options), store)
    torch.manual_seed(0)
    changes: dict[str, Any] = {"net": {"width": 0.25}, "optim": {"lr": 0.02}, "augment": {"mirror": False}}
    model = Classifier.from_recipe(recipe, classes=2, epochs=4, image_size=256, **changes)
    data = StoreData(store, batch_size=3)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(accelerator="cpu", **quiet).validate(model, data, verbose=False)
    assert model.hparams == expected.hparams
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_unknown_recipes_and_wrong_classes_raise_value_errors() -> None:
    with pytest.raises(ValueError, match="one of paper, as_run"):
        Classifier.from_recipe("alexnet")
    with pytest.raises(ValueError, match="classes=3"):
        Classifier(classes=3, class_names=["a", "b"])
    assert Classifier(class_names=["a", "b"], net={"width": 1 / 16}).classes == 2
    assert recipes.with_changes({"by_hand": {"a": 1, "b": 2}}, {"by_hand": {"b": 3}}) == {"by_hand": {"a": 1, "b": 3}}


def small(store: Path) -> dict[str, Any]:
    """Return the options SMALL as keyword arguments."""
    options: dict[str, Any] = {"data.store": store}
    for option in SMALL:
        key, _, value = option.partition("=")
        options[key] = OmegaConf.create(f"value: {value}").value
    return options


def test_train_takes_options_and_equals_the_command(cwd: Path, tiny_store: Path, run_command: Run) -> None:
    result = train(**small(tiny_store), ablation=["none"], run="mine")
    assert result == json.loads((cwd / "mine" / "result.json").read_text())
    status, _, err = run_command("train", *SMALL, f"data.store={tiny_store}", "+ablation=none", "run=typed")
    assert status == 0, err
    typed = json.loads((cwd / "typed" / "result.json").read_text())
    differing = {key for key in result if result[key] != typed[key]}
    assert differing <= {"command", "seconds"}
    assert result["command"].startswith("python -m alexnet_repro.train ")
    with pytest.raises(UserError, match="holds a finished run"):
        train(**small(tiny_store), ablation=["none"], run="mine")
    with pytest.raises(UserError, match=r"seed=-1: this must be at least 0"):
        train(seed=-1)
    with pytest.raises(TypeError, match="not both"):
        train(composed("train"), seed=1)


def test_train_leaves_a_foreign_hydra_alone(cwd: Path, tiny_store: Path) -> None:
    (cwd / "theirs").mkdir()
    (cwd / "theirs" / "config.yaml").write_text("mine: 1\n")
    with hydra.initialize_config_dir(str(cwd / "theirs"), version_base="1.3"):
        train(**small(tiny_store))
        assert hydra.compose("config").mine == 1
        cfg = composed("train", [*SMALL, f"data.store={tiny_store}", "seed=1"])
        cfg.optim.momentum = 0.5
        assert train(cfg)["options"].count("optim.momentum=0.5") == 1
    assert not GlobalHydra.instance().is_initialized()
    assert len(list(cwd.glob("runs/*/seed-*"))) == 2


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("trainer.max_epochs=3", "set epochs=N"),
        ("+trainer.max_epochs=3", "set epochs=N"),
        ("trainer.max_tine=3", "did you mean trainer.max_time?"),
        ("trainer.acelerator=cpu", "did you mean trainer.accelerator?"),
        ("trainer.strategy=ddp", "placement.replicas"),
        ("trainer.fast_dev_run=true", "data.train_per_class"),
        ("trainer.limit_train_batches=many", "trainer: "),
        ("callbacks=lr_monitr", "did you mean lr_monitor?"),
        ("+callbacks.a._target_=os.getcwd", "callbacks"),
        ("logger=[wandb,tensorbord]", "there is no logger"),
    ],
)
def test_options_that_lightning_does_not_have_are_told(
    option: str, told: str, cwd: Path, tiny_store: Path, run_command: Run
) -> None:
    status, _, err = run_command("train", *SMALL, f"data.store={tiny_store}", option)
    assert status == 2, err
    assert told in err
    assert len(err.splitlines()) <= 3
    assert not list(cwd.glob("runs/*/seed-0/result.json"))


def test_options_of_lightning_are_passed_on_and_recorded(cwd: Path, tiny_store: Path, run_command: Run) -> None:
    pytest.importorskip("tensorboard")
    options = ["trainer.limit_train_batches=1", "trainer.gradient_clip_val=0.5", "trainer.profiler=simple"]
    options += ["logger=tensorboard", "callbacks=lr_monitor"]
    status, _, err = run_command("train", *SMALL, f"data.store={tiny_store}", *options)
    assert status == 0, err
    (path,) = cwd.glob("runs/*/seed-0/result.json")
    result = json.loads(path.read_text())
    assert [entry["steps"] for entry in result["history"]] == [1, 2]
    changing = {"callbacks=lr_monitor", "trainer.limit_train_batches=1", "trainer.gradient_clip_val=0.5"}
    assert changing <= set(result["options"])
    assert "trainer.profiler=simple" not in result["options"]
    assert "trainer.gradient_clip_val=0.5" in path.parent.parent.name or len(path.parent.parent.name) > 190
    assert list((path.parent / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_config_dir_of_ones_own(cwd: Path, tiny_store: Path) -> None:
    """A callback, an ablation and a data set of a user's folder, in a process of its own."""
    mine = cwd / "mine"
    for group in ("callbacks", "ablation", "data"):
        (mine / group).mkdir(parents=True)
    stop = "stop:\n  _target_: lightning.pytorch.callbacks.EarlyStopping\n  monitor: val/top1_error\n  stopping_threshold: 101\n"
    (mine / "callbacks/stop.yaml").write_text(stop)
    (mine / "ablation/slow.yaml").write_text("# @package _global_\nablation: {slow: null}\noptim: {lr: 0.0001}\n")
    data = f"# @package _global_\ndata: {{name: theirs, source: yours, store: {tiny_store}, image_size: 32, train_per_class: null}}\n"
    (mine / "data/theirs.yaml").write_text(data)
    own = [option for option in SMALL if not option.startswith("data")]
    line = [sys.executable, "-m", "alexnet_repro.train", "--config-dir", os.fspath(mine), *own]
    line += ["data=theirs", "+ablation=slow", "callbacks=stop", "epochs=5"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = cwd.glob("runs/*/seed-0/result.json")
    assert path.parent.parent.name.startswith("cuda_convnet-slow-four_layer-theirs-")
    result = json.loads(path.read_text())
    assert (result["ablation"], result["lr"], result["epochs"]) == ("slow", 0.0001, 1)
    done = subprocess.run([*line, "optim.lr=1"], capture_output=True, text=True, check=False)
    assert "+ablation=slow is not in effect" in done.stderr


def test_part_of_a_data_set(cwd: Path, tiny_store: Path, run_command: Run) -> None:
    options = ("train", *SMALL, f"data.store={tiny_store}", "data.train_per_class=2", "batch_size=2")
    status, out, err = run_command(*options)
    assert status == 0, err
    assert "4 training" in out
    (path,) = cwd.glob("runs/*/seed-0/result.json")
    result = json.loads(path.read_text())
    assert (result["train_images"], result["classes"]) == (4, 2)
    assert [entry["steps"] for entry in result["history"]] == [2, 4]
    assert "data.train_per_class=2" in result["options"]
    data = [StoreData(Store(tiny_store), seed=seed, train_per_class=2).train_images() for seed in (0, 0, 1)]
    whole = Store(tiny_store).split("train")
    shown = [[part[i].tobytes() for i in range(len(part))] for part in data]
    assert shown[0] == shown[1] != shown[2]
    assert [part.labels.tolist() for part in data] == [[0, 0, 1, 1]] * 3
    assert set(shown[0]) <= {whole[i].tobytes() for i in range(len(whole))}
    status, _, err = run_command(*options[:-1], "batch_size=6", "run=other")
    assert (status, "only 4 training images" in err) == (2, True)


def test_list_of_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "alexnet_repro"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for command in ("train", "evaluate", "prepare", "report", "bench", "features", "export", "convert", "compare_2012"):
        assert f"python -m alexnet_repro.{command} " in done.stdout
