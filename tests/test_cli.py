"""Test user errors: exit status 2, a short message that says what to do, no traceback and no lost files."""

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import image_folder
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from alexnet_repro.command_line import quoted
from alexnet_repro.configs import CONF
from alexnet_repro.training import run_folder
from alexnet_repro.training.run_folder import named

Run = Callable[..., tuple[int, str, str]]


def class_without_images(cwd: Path) -> None:
    image_folder(cwd / "source")
    (cwd / "source/train/fox").mkdir()


def source_that_links_to_itself(cwd: Path) -> None:
    (cwd / "source").symlink_to("source")


def reports_of_others(cwd: Path) -> None:
    (cwd / "page").mkdir()
    (cwd / "page/index.html").write_text("<title>My page")
    (cwd / "pictures/figures").mkdir(parents=True)
    (cwd / "numbers.json").write_text("[1]")


def class_only_in_val(cwd: Path) -> None:
    image_folder(cwd / "source")
    shutil.move(cwd / "source/val/dog", cwd / "source/val/fox")


def file_that_is_not_a_tar(cwd: Path) -> None:
    (cwd / "source").write_text("hello")


def store_of_small_images(cwd: Path) -> None:
    (cwd / "stores/folder").mkdir(parents=True)
    manifest = {
        "format": 1,
        "image_size": 32,
        "classes": ["a"],
        "splits": {},
        "sha256": {"mean.npy": ""},
        "covariance": [[1.0, 0.0, 0.0]] * 3,
    }
    (cwd / "stores/folder/manifest.json").write_text(json.dumps(manifest))
    np.save(cwd / "stores/folder/mean.npy", np.zeros((32, 32, 3), np.float32))


def store_without_images(cwd: Path) -> None:
    store_of_small_images(cwd)
    path = cwd / "stores/folder/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_size": 256}))
    np.save(cwd / "stores/folder/mean.npy", np.zeros((256, 256, 3), np.float32))


def damaged_manifest(cwd: Path) -> None:
    store_of_small_images(cwd)
    (cwd / "stores/folder/manifest.json").write_text("{")


def empty_folder(cwd: Path) -> None:
    (cwd / "source").mkdir()


def other_file_in_the_run_folder(cwd: Path) -> None:
    (cwd / "mine").mkdir()
    (cwd / "mine/thesis.tex").write_text("keep me")


def images_outside_class_folders(cwd: Path) -> None:
    image_folder(cwd / "s")
    shutil.move(cwd / "s/train/cat", cwd / "source")


def one_class(cwd: Path) -> None:
    image_folder(cwd / "source", classes=("cat",))


def damaged_compressed_tar(cwd: Path) -> None:
    image_folder(cwd / "images")
    with tarfile.open(cwd / "whole.tgz", "w:gz") as tar:
        tar.add(cwd / "images", arcname=".")
    (cwd / "source").write_bytes((cwd / "whole.tgz").read_bytes()[:20_000])


def folder_of_user_pictures(cwd: Path) -> None:
    image_folder(cwd / "source")
    image_folder(cwd / "pictures")


MISTAKES = [
    ("train", ["+ablation=no_lnr"], None, "did you mean no_lrn?"),
    ("train", ["data=imagenet"], None, "there are: "),
    ("train", ["recipe=papper"], None, "did you mean paper?"),
    ("train", ["epoch=3"], None, "epoch"),
    ("train", ["+epoch=3"], None, "there is no option 'epoch'"),
    ("train", ["ablation=no_lrn"], None, "+ablation="),
    ("train", ["optim.learning_rate=1"], None, "optim.learning_rate"),
    ("train", ["epochs=many"], None, "epochs=many: this must be a whole number, such as"),
    ("train", ["epochs=0"], None, "at least 1"),
    ("train", ["batch_size=1.5"], None, "whole number"),
    ("train", ["seed=-1"], None, "seed=-1"),
    ("train", ["optim.lr=0"], None, "optim.lr=0"),
    ("train", ["epochs="], None, "epochs"),
    ("train", ["epochs"], None, "epochs"),
    ("train", ["data=imagenette"], None, "prepare data=imagenette source=PATH"),
    ("train", ["data=folder"], store_of_small_images, "are 32x32, this net's data is 256x256"),
    ("train", ["data=folder"], store_without_images, "no images in its split 'train'"),
    ("train", ["data=folder"], damaged_manifest, "is damaged"),
    ("train", ["run=mine"], other_file_in_the_run_folder, "taken by something that isn't a run"),
    ("train", ["net.lrn_n=4"], None, "must be odd"),
    ("train", ["net.dropout=2"], None, "dropout"),
    ("train", ["augment.crop=300"], None, "augment.crop=300: the images are 256x256"),
    ("train", ["net.image_size=200"], None, "takes patches of another size"),
    ("train", ["optim.weight_decay=-1"], None, "weight_decay"),
    ("train", ["schedule.rule=when_error_stalls", "schedule.when_error_stalls.factor=1"], None, "must be above 1"),
    ("train", ["schedule.when_error_stalls.factor=5"], None, "has no effect with schedule.rule=by_hand"),
    ("train", ["trainer.devices=0"], None, "trainer.devices=0: this must be at least 1"),
    ("train", ["net.dropout=half"], None, "net.dropout=half: this must be a number, such as 0.5"),
    ("train", ["net.lrn=5"], None, "net.lrn=5: this must be true or false"),
    ("train", ["optim.momentum=null"], None, "optim.momentum=null: this must be a number"),
    ("train", ["net.activation=gelu"], None, "must be one of relu, tanh, abs_tanh, sigmoid"),
    ("train", ["augment.mean=none"], None, "must be one of patch, centre"),
    ("train", ["+ablation=[one_gpu,no_communication]"], None, "no communication"),
    ("train", ["+ablation=no_lrn", "net.lrn=true"], None, "+ablation=no_lrn is not in effect"),
    ("train", ["trainer=gpu"], None, "trainer"),
    ("train", ["trainer.precision=7"], None, "trainer"),
    ("train", ["trainer.workers=100000000000000000000"], None, "this must be at most 256"),
    ("train", ["net.lrn_beta=1e300"], None, "this must be at most 1e+30"),
    ("train", ["schedule.when_error_stalls.times=400"], None, "this must be at most 100, such as 3"),
    ("train", ["recipe=true"], None, "there is no recipe=true"),
    ("train", ["+ablation=[1]"], None, "there is no ablation=[1]"),
    ("train", ["-m", "seed=range(2,0)"], None, "makes no jobs"),
    ("train", ["logger=mlflow"], None, "there are: csv, tensorboard, wandb"),
    ("train", ["logger=wandb", "logger.mode=loud"], None, "logger.mode=loud"),
    ("prepare", ["data=imagenette"], None, "say where it is with source=PATH"),
    ("prepare", ["data=imagenette", "source=nowhere"], None, "there is nothing at source=nowhere"),
    ("prepare", ["data=folder", "source=source"], empty_folder, "there are no files"),
    ("prepare", ["data=folder", "source=source"], class_without_images, "hold no images: train/fox"),
    ("prepare", ["data=folder", "source=source"], class_only_in_val, "have no training images: fox"),
    ("prepare", ["data=folder", "source=source"], source_that_links_to_itself, "source"),
    ("prepare", ["data=folder", "source=source"], file_that_is_not_a_tar, "neither a folder nor a tar"),
    ("prepare", ["data=folder", "source=source"], one_class, "has only one class: cat"),
    ("prepare", ["data=folder", "source=source"], damaged_compressed_tar, "source=source is damaged"),
    (
        "prepare",
        ["data=folder", "source=source", "data.store=pictures", "overwrite=true"],
        folder_of_user_pictures,
        "isn't a store",
    ),
    (
        "prepare",
        ["data=folder", "source=source", "data.store=source/store"],
        folder_of_user_pictures,
        "would be inside its source",
    ),
    ("prepare", ["data=folder", "source=source"], images_outside_class_folders, "is in no class folder"),
    ("prepare", ["data=folder", "verify=true"], None, "there is no store at stores/folder"),
    ("report", ["out=page"], reports_of_others, "page/index.html is not a file of an earlier report"),
    ("report", ["out=pictures"], reports_of_others, "pictures/figures is not a folder of an earlier report"),
    ("bench", ["out=numbers.json"], reports_of_others, "is not a file of an earlier benchmark"),
    ("evaluate", [], None, "run=FOLDER"),
    ("evaluate", ["run=nowhere"], None, "nowhere is not the folder of a run"),
    ("evaluate", ["run=nowhere", "views=twelve"], None, "one of centre, ten_crop"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "arrange", "expected"),
    MISTAKES,
    ids=[f"{m[0]} {' '.join(m[1])}"[:60] + f" {i}" for i, m in enumerate(MISTAKES)],
)
def test_user_errors_are_reported_briefly_without_a_traceback(
    name: str, arguments: list[str], arrange: Callable[[Path], None] | None, expected: str, cwd: Path, run_command: Run
) -> None:
    if name == "train" and not any(a.startswith("data=") for a in arguments):
        arguments = [*arguments, "data.train_per_class=2", "data.val_per_class=1"]  # a small store is quick to prepare
    if arrange:
        arrange(cwd)
    before = sorted(p for p in cwd.rglob("*") if p.is_file())
    status, _, err = run_command(name, *arguments)
    assert status == 2, err
    messages = [line for line in err.splitlines() if not line.startswith(("preparing", "\rpreparing")) and line.strip()]
    assert expected in err
    assert "Traceback" not in err
    assert len(messages) <= 3, messages
    assert messages[0].startswith("error: ") or messages[-2].startswith("error: "), messages
    assert all(p.exists() for p in before)
    assert not list(cwd.glob("runs/**/config.yaml"))  # a run that cannot start does not occupy its folder
    assert not list(cwd.glob("runs/**/result.json"))


def test_user_error_in_a_real_process_exits_with_status_2(cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alexnet_repro.train", "+ablation=nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert "no_lrn" in done.stderr


@pytest.mark.parametrize("name", ["train", "export"])
def test_help_explains_the_options_and_may_be_cut_off(name: str, cwd: Path) -> None:
    call = f"set -o pipefail; {sys.executable} -m alexnet_repro.{name} --help"
    whole = subprocess.run(["bash", "-c", call], capture_output=True, text=True)
    assert (whole.returncode, whole.stderr) == (0, "")
    assert whole.stdout.startswith(f"# python -m alexnet_repro.{name}")
    assert "+GROUP=NAME" in whole.stdout
    cut = subprocess.run(["bash", "-c", f"{call} | head -1"], capture_output=True, text=True)
    assert (cut.returncode, cut.stderr) == (0, "")


def test_closed_output_is_no_error(cwd: Path) -> None:
    line = (
        f"{sys.executable} -m alexnet_repro.prepare data.train_per_class=2 data.val_per_class=1 data.image_size=8 >&-"
    )
    done = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to"), MemoryError()])
def test_too_little_memory_is_told_in_two_lines(
    error: Exception, cwd: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out_of_memory(cfg: DictConfig) -> None:
        raise error

    monkeypatch.setattr("alexnet_repro.training.evaluation.evaluate", run_out_of_memory)
    status, _, err = run_command("evaluate", "run=r")
    assert (status, len(err.splitlines())) == (2, 2), err
    assert "too little memory" in err
    assert "choose a smaller batch_size" in err


def test_internal_error_keeps_its_traceback_and_exits_with_status_1(cwd: Path) -> None:
    program = (
        "import sys, alexnet_repro.training.evaluation, alexnet_repro.cli as cli\n"
        "alexnet_repro.training.evaluation.evaluate = lambda cfg: 1 / 0\n"
        "sys.argv = ['x']; cli.command('evaluate')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "paper"),
        (
            ["seed=3", "trainer=cpu", "logger=wandb", "resume=true", "trainer.workers=2", "watch.every=0"],
            "paper",
        ),
        (["data=photos"], "paper"),
        (["+ablation=no_lrn"], "paper-no_lrn"),
        (["optim.lr=1", "data=ilsvrc2012", "+ablation=no_lrn"], "paper-no_lrn-ilsvrc2012-optim.lr=1"),
        (["data.store=/fast/photos"], "paper"),  # a copy of the store on another disk
        (["data.store=/x/y", "trainer.precision=32-true"], "paper-store=y-trainer.precision=32-true"),
        (["+ablation=none"], "paper"),
        (["+ablation=[no_lrn,no_dropout]", "data=imagenette"], "paper-no_lrn,no_dropout-imagenette"),
        (["optim.lr=0.003", "epochs=2"], "paper-epochs=2-optim.lr=0.003"),
    ],
)
def test_run_name_lists_the_chosen_options(overrides: list[str], name: str) -> None:
    assert run_folder.run_name("paper", overrides, ["data=photos", "net=alexnet"]) == name


@pytest.mark.parametrize(
    ("typed", "runs"),
    [
        ("run=a,b/seed-0", ["a,b/seed-0"]),
        ("runs=a,b/seed-0", ["a,b/seed-0"]),
        ("runs=[x=1,a,b/seed-0, c]", ["x=1", "a,b/seed-0", "c"]),
        ("runs=2012_07", ["2012_07"]),
        ("runs=[2012_07,1e3]", ["2012_07", "1e3"]),
        ("runs=[]", []),
        ("run=~/a/seed-0", ["/home/me/a/seed-0"]),
    ],
)
def test_names_of_runs_with_commas_and_digits_are_taken_as_typed(
    typed: str, runs: list[str], cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("a,b/seed-0", "x=1", "c"):
        Path(name).mkdir(parents=True)
    with initialize_config_dir(CONF, version_base="1.3"):
        for sweep in (False, True):
            cfg = compose("evaluate", [quoted(typed, sweep)])
            assert [str(run) for run in named(cfg[typed.partition("=")[0]])] == runs


def test_lists_of_runs_can_be_swept(cwd: Path, run_command: Run) -> None:
    _, out, _ = run_command("evaluate", "-m", "runs=[a,b],[c]", "views=centre,ten_crop")
    jobs = [line.split()[0] for line in out.splitlines() if line.startswith("  runs=")]
    assert jobs == ["runs=[a,b]", "runs=[a,b]", "runs=[c]", "runs=[c]"]


def test_several_runs_without_brackets_are_told_to_be_a_list(cwd: Path, run_command: Run) -> None:
    status, _, err = run_command("evaluate", "runs=a,b")
    assert (status, "takes a list: runs=[FOLDER,FOLDER]" in err) == (2, True), err


@pytest.mark.parametrize("schedule", sorted(file.stem for file in Path(CONF, "schedule").glob("run_*.yaml")))
def test_schedule_of_the_log_can_be_chosen(schedule: str, cwd: Path, run_command: Run) -> None:
    line = ("recipe=as_run", "data=ilsvrc2012", f"schedule={schedule}")
    assert "there is no store" in run_command("train", *line)[2]
