"""Test complete runs on a store of 12 images: the files they write, and that resuming changes nothing."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import SMALL, stopping_after_an_epoch

from alexnet_repro.claims.scores import read_kernels, read_scores, top_k_misses
from alexnet_repro.files import write_json
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.training import classifier, saving
from alexnet_repro.training.classifier import Classifier
from alexnet_repro.training.saving import KeepLast

Run = Callable[..., tuple[int, str, str]]
SHORT = (
    "data=folder",
    "trainer=cpu",
    "trainer.precision=32-true",
    "batch_size=5",
    "epochs=2",
    "optim.lr=0.001",
    "net.width=0.25",
)


@pytest.fixture(scope="module")
def short(small_store: Path) -> tuple[str, ...]:
    """Return the options of a run of two epochs of three updates."""
    return (*SHORT, f"data.store={small_store}")


@pytest.fixture(scope="module")
def finished(short: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run, made in a separate process."""
    folder = tmp_path_factory.mktemp("finished")
    line = [sys.executable, "-m", "alexnet_repro.train", *short, "run=whole"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "whole" / "stdout").write_text(done.stdout)
    (folder / "whole" / "stderr").write_text(done.stderr)
    return folder / "whole"


def last_checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_equal_runs(one: Path, other: Path) -> None:
    """Assert that weights, velocities, learning rates, schedule, metrics and errors are bitwise equal."""
    left, right = last_checkpoint(one), last_checkpoint(other)
    assert left["global_step"] == right["global_step"] == 6
    assert left["state_dict"].keys() == right["state_dict"].keys()
    for name, value in left["state_dict"].items():
        assert torch.equal(value, right["state_dict"][name]), name
    for a, b in zip(left["optimizer_states"], right["optimizer_states"], strict=True):
        assert a["param_groups"] == b["param_groups"]
        assert all(torch.equal(a["state"][i]["momentum_buffer"], b["state"][i]["momentum_buffer"]) for i in a["state"])
    assert left["schedule"] == right["schedule"]
    assert metrics(one) == metrics(other)
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    assert results[0]["ten_crop"] == results[1]["ten_crop"]
    assert results[0]["centre"] == results[1]["centre"]


def test_run_writes_its_documented_files_and_fields(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["ablation"] == "none"
    assert (result["recipe"], result["data"], result["net"], result["claim"]) == (
        "paper",
        "folder",
        "alexnet",
        "one_cnn",
    )
    assert (result["seed"], result["epochs"], result["steps"]) == (0, 2, 6)
    convolutions = 24 * (363 + 1) + 64 * (300 + 1) + 96 * (576 + 1) + 96 * (432 + 1) + 64 * (432 + 1)
    assert result["parameters"] == convolutions + 1024 * (64 * 36 + 1) + 1024 * (1024 + 1) + 2 * (1024 + 1)
    for view in ("centre", "ten_crop"):
        assert set(result[view]) == {"top1_error", "top5_error", "log_loss"}
        assert 0 <= result[view]["top1_error"] <= 100
        assert result[view]["top5_error"] == 0  # there are only two classes
    kept = read_scores(finished / "predictions.npz")
    for view in ("centre", "ten_crop"):
        top1, top5, nats = kept[view].mean(0)
        assert [100 * top1, 100 * top5, nats] == pytest.approx(list(result[view].values()), abs=1e-3)
    conv1 = last_checkpoint(finished)["state_dict"]["net.conv1.weight"]
    assert read_kernels(finished / "predictions.npz") == pytest.approx(conv1.numpy(), rel=1e-3, abs=1e-6)
    assert result["history"][-1]["val_loss"] == pytest.approx(result["centre"]["log_loss"], abs=1e-3)
    assert result["train_sample"]["images"] == 12
    assert (result["images"], result["held_out"], result["left_plateau"]) == (6, None, None)
    assert {"hardware", "versions", "commit", "command", "seconds", "precision"} <= set(result)
    assert result["command"].startswith("python -m alexnet_repro.train data=folder")
    assert result["command"].endswith(" run=whole")  # as typed
    validated = [row for row in metrics(finished) if row["val/top1_error"]]
    assert [row["epoch"] for row in validated] == ["0", "1"]
    assert float(validated[-1]["val/top1_error"]) == pytest.approx(result["centre"]["top1_error"])
    assert (finished / "checkpoints/best.ckpt").exists()
    table = (finished / "stdout").read_text()
    assert "40.7" in table
    assert "folder is not ImageNet" in table


def test_run_prints_no_warnings(finished: Path) -> None:
    printed = (finished / "stderr").read_text()
    assert "warn" not in printed.lower()
    assert ".py" not in printed


def test_checkpoint_loads_without_other_arguments(finished: Path) -> None:
    path = finished / "checkpoints/last.ckpt"
    model = Classifier.load_from_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(state["net.conv1.weight"], model.net.conv1.weight.cpu())
    assert model.mean.std() > 1


def test_finished_run_is_not_overwritten(
    finished: Path, short: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, run_command: Run
) -> None:
    monkeypatch.chdir(finished.parent)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    status, _, err = run_command("train", *short, "run=whole")
    assert status == 2
    assert "holds a finished run" in err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_evaluate_equals_the_errors_of_the_run(
    finished: Path, monkeypatch: pytest.MonkeyPatch, run_command: Run
) -> None:
    monkeypatch.chdir(finished.parent)
    result = json.loads((finished / "result.json").read_text())
    status, out, err = run_command(
        "evaluate", "run=whole", "views=ten_crop", "trainer=cpu", "trainer.precision=32-true", "batch_size=4"
    )
    assert status == 0, err
    evaluated = json.loads((finished / "evaluation-last-val-ten_crop.json").read_text())
    assert evaluated["ten_crop"] == result["ten_crop"]
    assert evaluated["centre"] == result["centre"]
    assert "ten crops" in out
    assert run_command("evaluate", "run=whole", "trainer=cpu", "trainer.precision=32-true")[0] == 0
    assert json.loads((finished / "evaluation-last-val-ten_crop.json").read_text()) == evaluated
    one_view = json.loads((finished / "evaluation-last-val-centre.json").read_text())
    assert one_view["centre"] == result["centre"]
    assert "ten_crop" not in one_view


def stop_after(steps: int, short: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, run_command: Run) -> None:
    """Start the run 'parts' and send it a stop signal during update number ``steps``."""
    original = Classifier.training_step

    def training_step(self: Classifier, batch: object, batch_idx: int) -> torch.Tensor:
        if self.global_step == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", training_step)
        status, _, err = run_command("train", *short, "run=parts")
    assert status == 130, err
    assert "resume=true" in err


@pytest.mark.parametrize(
    ("steps", "workers"),
    [
        pytest.param(2, "null", marks=pytest.mark.slow),
        pytest.param(3, "null", marks=pytest.mark.slow),
        pytest.param(4, "2", marks=pytest.mark.slow),
    ],
)
def test_resumed_run_equals_uninterrupted_run(
    steps: int,
    workers: str,
    finished: Path,
    short: tuple[str, ...],
    cwd: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_command: Run,
) -> None:
    options = (*short, f"trainer.workers={workers}")
    stop_after(steps, options, monkeypatch, run_command)
    assert last_checkpoint(cwd / "parts")["global_step"] == steps
    assert run_command("train", *options, "run=parts")[0] == 2  # refused without resume=true
    status, _, err = run_command("train", *options, "run=parts", "optim.lr=0.5", "resume=true")
    assert status == 2
    assert "optim.lr=0.5 (was 0.001)" in err
    torch.manual_seed(12345)
    status, _, err = run_command("train", *options, "run=parts", "resume=true")
    assert status == 0, err
    # Runs are bitwise equal only in fresh processes, as in the test of a killed run. In this process, the state of the
    # heap affects how some kernels round.
    one, other = last_checkpoint(cwd / "parts"), last_checkpoint(finished)
    assert one["global_step"] == other["global_step"] == 6
    for name, value in one["state_dict"].items():
        if not name.endswith(".bias"):
            assert (value - other["state_dict"][name]).norm() <= 1e-3 * value.norm(), name
    assert one["schedule"] == other["schedule"]
    rows = [[(row["epoch"], row["step"]) for row in metrics(run)] for run in (cwd / "parts", finished)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("asked_in", [None, 2])
def test_epochs_shorter_than_writing_are_not_all_saved(
    asked_in: int | None, tiny_store: Path, cwd: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and the last epoch are, and the one in which a signal asks the run to stop."""
    saved, save = [], KeepLast._save

    def watched(self: KeepLast, trainer: L.Trainer) -> None:
        saved.append(trainer.current_epoch)
        save(self, trainer)

    def ask_to_stop(model: Classifier) -> None:
        if model.current_epoch == asked_in:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(KeepLast, "_save", watched)
    monkeypatch.setattr(Classifier, "on_validation_epoch_start", ask_to_stop)
    monkeypatch.setattr(saving, "LONG_WRITING", 0)
    monkeypatch.setattr(saving, "WRITING_SHARE", 1e9)
    line = ("train", *SMALL, f"data.store={tiny_store}", "run=r", "epochs=5")
    status, _, err = run_command(*line)
    assert (status, saved) == ((0, [0, 4]) if asked_in is None else (130, [0, 2])), err
    if asked_in is not None:
        monkeypatch.setattr(Classifier, "on_validation_epoch_start", lambda model: None)
        assert run_command(*line, "resume=true")[0] == 0
        assert saved[2:] == [3, 4]
        assert [epoch["epoch"] for epoch in json.loads((cwd / "r/result.json").read_text())["history"]] == [
            1,
            2,
            3,
            4,
            5,
        ]


@pytest.mark.slow
def test_compiled_run_equals_an_eager_one_within_rounding_and_resumes_exactly(
    tiny_store: Path, cwd: Path, run_command: Run
) -> None:
    line = ("train", *SMALL, f"data.store={tiny_store}", "optim.lr=0.001")
    with stopping_after_an_epoch():
        assert run_command(*line, "run=parts", "trainer.compile=default")[0] == 130
    for options in (
        ("run=parts", "trainer.compile=default", "resume=true"), ("run=whole", "trainer.compile=default"), ("run=eager",)
    ):  # fmt: skip
        status, _, err = run_command(*line, *options)
        assert status == 0, err
    parts, whole, eager = (last_checkpoint(cwd / run)["state_dict"] for run in ("parts", "whole", "eager"))
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    for name, value in eager.items():
        assert (whole[name].double() - value).norm() <= 1e-5 * value.double().norm(), name
    assert json.loads((cwd / "whole/result.json").read_text())["compile"] == "default"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{}, {"layer1_order": "norm_pool_relu", "same_map_norm": True}])
def test_compiled_net_has_the_gradients_of_the_eager_net(recipe: dict[str, Any]) -> None:
    """The whole net is a single graph, with its own operators for normalisation and dropout in it."""
    images, gradients = 60 * torch.randn(2, 3, 224, 224), []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = AlexNet(10, init="as_run", **recipe).to(memory_format=torch.channels_last)
        net.draw_dropout(1, 2)
        forward = torch.compile(net.forward, fullgraph=True, dynamic=False) if compiled else net
        torch.nn.functional.cross_entropy(forward(images), torch.tensor([1, 7])).backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    for name, value in gradients[0].items():
        assert (gradients[1][name] - value).norm() <= 1e-5 * value.norm(), name


def test_nets_of_a_sweep_can_all_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses to compile one function for a ninth net that differs from the others."""

    def with_a_fast_backend(net: torch.nn.Module, mode: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return torch.compile(net.forward, backend="eager", dynamic=False, fullgraph=True)  # type: ignore[no-any-return]

    monkeypatch.setattr(classifier, "compiled", with_a_fast_backend)
    augment, schedule = {"crop": 64, "mean": "patch", "colour_unit": "eigenvalue"}, {"rule": "constant"}
    for sixteenths in range(1, 11):
        net = {"name": "alexnet", "classes": 2, "image_size": 64, "width": sixteenths / 16}
        model = Classifier(None, net, {}, schedule, augment, 1, 64, ["a", "b"], 0)
        model.compile_training("default")
        assert model._compiled is not None
        assert model._compiled(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.slow
def test_resumed_run_of_the_2012_recipe_has_the_scheduled_learning_rates(
    short: tuple[str, ...], cwd: Path, monkeypatch: pytest.MonkeyPatch, run_command: Run
) -> None:
    """With 3 epochs, rates fall after 1 (23 of 93), 2 (51) and 3 (78), and conv1 is frozen after 2 (72)."""
    options = (*short, "recipe=as_run", "epochs=3")
    stop_after(2, options, monkeypatch, run_command)
    assert run_command("train", *options, "run=parts", "resume=true")[0] == 0
    groups = {g["name"]: g["lr"] for g in last_checkpoint(cwd / "parts")["optimizer_states"][0]["param_groups"]}
    assert groups == pytest.approx({"weights": 1e-6, "biases": 2e-4, "conv1_weights": 0, "conv1_biases": 0})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_all_processes_saves_a_checkpoint_with_workers(
    number: signal.Signals, short: tuple[str, ...], cwd: Path
) -> None:
    """Send a signal to every process of the group, as a terminal does, and timeout, Slurm and containers."""
    line = [sys.executable, "-m", "alexnet_repro.train", *short, "run=parts", "epochs=200", "trainer.workers=2"]
    with subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        for _ in range(1200):
            time.sleep(0.05)
            if (cwd / "parts/checkpoints/last.ckpt").exists():
                break
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "resume=true" in err
    assert "Traceback" not in err
    assert last_checkpoint(cwd / "parts")["global_step"] >= 3


@pytest.mark.slow
def test_killed_run_resumes_from_its_last_epoch(finished: Path, short: tuple[str, ...], cwd: Path) -> None:
    line = [sys.executable, "-m", "alexnet_repro.train", *short, "run=parts"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(1200):
            time.sleep(0.05)
            if (cwd / "parts/checkpoints/last.ckpt").exists():
                break
        process.kill()
    assert subprocess.run([*line, "resume=true"], capture_output=True, check=False).returncode == 0
    assert_equal_runs(cwd / "parts", finished)


@pytest.mark.slow
def test_wandb_logs_offline_without_an_api_key(
    short: tuple[str, ...], cwd: Path, monkeypatch: pytest.MonkeyPatch, run_command: Run
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(cwd))
    monkeypatch.setenv("NETRC", str(cwd / "netrc"))
    status, out, err = run_command("train", *short, "run=r", "epochs=1", "logger=wandb")
    assert status == 0, err
    assert "wandb sync r/wandb/offline-run-" in out
    assert list((cwd / "r/wandb").glob("offline-run-*/run-*.wandb"))
    assert (cwd / "r/metrics.csv").exists()
    refused = [
        ("WANDB_MODE", "loud", "'online', 'offline'"),
        ("WANDB_BASE_URL", "nowhere", "valid URL"),
        ("WANDB_API_KEY", "short", "40+ characters"),
        ("ANYTHING", "", "Invalid project name 'a/b'"),
    ]
    for name, value, problem in refused:
        environment = {**os.environ, name: value}
        line = [*short, "run=q", "epochs=1", "logger=wandb", *(["logger.project=a/b"] if name == "ANYTHING" else [])]
        done = subprocess.run(
            [sys.executable, "-m", "alexnet_repro.train", *line],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert (done.returncode, problem in done.stderr) == (2, True), done.stderr
        assert ("Traceback" in done.stderr, Path("q").exists()) == (False, False)


def test_top_k_misses_equal_a_count() -> None:
    scores = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.4, 0.4, 0.2], [0.3, 0.35, 0.35]])
    labels = torch.tensor([0, 2, 1, 2])
    # in the third row the label ties with one other class for first place, and in the fourth row too
    assert top_k_misses(scores, labels, 1).tolist() == [0, 1, 0.5, 0.5]
    assert top_k_misses(scores, labels, 2).tolist() == [0, 0, 0, 0]
    assert top_k_misses(torch.full((1, 10), 0.1), torch.tensor([3]), 5).item() == pytest.approx(0.5)
    assert top_k_misses(torch.full((1, 4), float("nan")), torch.tensor([3]), 5).item() == 1


def test_json_files_are_written_completely_or_not_at_all(cwd: Path) -> None:
    write_json(cwd / "result.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(cwd / "result.json", {"a": object()})
    assert json.loads((cwd / "result.json").read_text()) == {"a": 1}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["paper", "as_run", "cuda_convnet"])
def test_two_runs_of_one_command_give_the_same_bytes(recipe: str, small_store: Path, cwd: Path) -> None:
    options = [
        "data=folder",
        f"data.store={small_store}",
        "epochs=1",
        "batch_size=6",
        "trainer=cpu",
        f"recipe={recipe}",
    ]
    if recipe == "cuda_convnet":
        options += ["net=locally_connected", "optim.decay_multiples=null", "schedule.by_hand.val_joins_after=null"]
    written = []
    for run in ("a", "b"):
        line = [sys.executable, "-m", "alexnet_repro.train", *options, f"run={run}"]
        subprocess.run(line, cwd=cwd, capture_output=True, check=True)
        content = torch.load(cwd / run / "checkpoints/last.ckpt", weights_only=True)
        result = json.loads((cwd / run / "result.json").read_text())
        different = {"seconds", "command"}
        scores = (cwd / run / "predictions.npz").read_bytes()
        written.append((content, {k: v for k, v in result.items() if k not in different}, scores))
    (first, result, scores), (second, other_result, other_scores) = written
    assert result == other_result
    assert scores == other_scores
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    for state, other in zip(first["optimizer_states"], second["optimizer_states"], strict=True):
        for index, buffers in state["state"].items():
            assert torch.equal(buffers["momentum_buffer"], other["state"][index]["momentum_buffer"])
