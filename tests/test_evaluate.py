"""Compare ten-crop and centre predictions with single patches, and ensembles with the mean of their members."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from hydra import compose, initialize_config_dir

from alexnet_repro.claims.paper import claim_of
from alexnet_repro.claims.results import read_results
from alexnet_repro.claims.scores import VIEWS, errors, read_scores, save_scores, score
from alexnet_repro.claims.screen import table
from alexnet_repro.claims.verdict import judge
from alexnet_repro.configs import CONF
from alexnet_repro.data.augment import centre_crop, nine_crop
from alexnet_repro.data.batches import ValBatch
from alexnet_repro.data.images import read_image
from alexnet_repro.data.manifest import manifest_checksum
from alexnet_repro.data.module import StoreData
from alexnet_repro.data.store import Store
from alexnet_repro.training.classifier import Classifier
from alexnet_repro.training.ensemble import common_facts, ensemble_claim, fitted
from alexnet_repro.training.measurement import load_run, measure, predict_whole
from alexnet_repro.training.run import train
from alexnet_repro.training.setup import new_classifier
from alexnet_repro.training.trainer import make_trainer
from tests.conftest import save_picture, small_alexnet_options

Run = Callable[..., tuple[int, str, str]]
Pair = tuple[list[Path], torch.Tensor, torch.Tensor]


def test_prediction_is_the_mean_softmax_of_ten_patches(small_store: Path) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["recipe=as_run"])
    store = Store(small_store)
    torch.manual_seed(0)
    model = new_classifier(cfg, store).eval()
    split = store.split("val")
    count = 18  # more than predict_step processes at once
    images = torch.stack([torch.from_numpy(split[i % 6].copy()) for i in range(count)])
    with torch.no_grad():
        centre, ten = model.predict_step(ValBatch(images, torch.zeros(count, dtype=torch.long)), 0)
        mean = torch.from_numpy(store.mean)[16:240, 16:240]
        for n in (0, 5, 16, 17):
            patches = []
            for top, left in ((0, 0), (0, 32), (32, 0), (32, 32), (16, 16)):
                patch = images[n, top : top + 224, left : left + 224].float()
                patches += [patch - mean, patch.flip(1) - mean]
            softmax = torch.stack([model.net(p.permute(2, 0, 1)[None])[0].softmax(0) for p in patches])
            torch.testing.assert_close(ten[n], softmax.mean(0), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(centre[n], softmax[8], atol=1e-5, rtol=1e-4)
        single = model.net(model.views(ValBatch(images[:2], torch.zeros(2)), centre_crop)).softmax(1)
        torch.testing.assert_close(centre[:2], single, atol=1e-5, rtol=1e-4)


def test_only_the_scores_of_each_image_are_kept(trained: Path, small_store: Path, tmp_path: Path) -> None:
    # the softmax of all 4.45 million images of +experiment=fall_2009 would take 180 GB for each view
    model, cfg = load_run(trained)
    data = StoreData(Store(small_store), 4, 0, {"crop": model.crop}, 0)
    trainer = make_trainer(cfg, tmp_path)
    measured = measure(trainer, model, data)
    rows = [part.shape[1] for batch in trainer.predict_loop.predictions for part in batch]
    assert set(rows) == {3}
    softmax = predict_whole(trainer, model, data, VIEWS[:2], None)
    labels = torch.from_numpy(Store(small_store).split(data.predict_split).labels)
    assert list(measured) == list(softmax)
    for view in softmax:
        assert softmax[view].shape == (len(labels), model.classes)
        torch.testing.assert_close(measured[view], score(softmax[view], labels))


def test_errors_equal_a_count() -> None:
    softmax = torch.eye(10)[torch.tensor([0, 1, 2, 3])] * 0.5 + torch.arange(10) / 100
    labels = torch.tensor([0, 1, 9, 0])  # the labels rank first, first, second and last
    nats = -torch.tensor([0.5 + 0.00, 0.5 + 0.01, 0.09, 0.00]).clamp(min=torch.finfo().tiny).log().mean()
    assert errors(score(softmax, labels)) == {
        "top1_error": 50.0,
        "top5_error": 25.0,
        "log_loss": pytest.approx(float(nats), abs=1e-4),
    }


def test_scores_of_each_image_are_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (50,))
    by_view = {view: score(torch.randn(50, 10).softmax(1), labels) for view in ("centre", "ten_crop")}
    save_scores(tmp_path / "predictions.npz", by_view)
    kept = read_scores(tmp_path / "predictions.npz")
    assert list(kept) == ["centre", "ten_crop"]
    for view, scores in by_view.items():
        assert kept[view] == pytest.approx(scores.double().numpy(), rel=1e-6)


def test_nine_crops_are_an_unmirrored_grid_of_positions() -> None:
    images = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8)
    crops = nine_crop(images, 4)
    for number, (top, left) in enumerate(itertools.product((0, 2, 4), repeat=2)):
        assert torch.equal(crops[:, number], images[:, :, top : top + 4, left : left + 4])


def test_table_shows_the_papers_errors_and_names_the_data() -> None:
    view = {"top1_error": 12.34, "top5_error": 1.0}
    protocol = {"net": "alexnet", "ablation": "no_lrn", "epochs": 90, "batch_size": 128, "lr": 0.01, "split": "val"}
    result = {**protocol, "claim": "no_lrn", "data": "imagenette", "images": 50_000, "centre": view, "ten_crop": view}
    text = table(result)
    assert "42.1" not in text  # never beside errors on other data
    assert "Section 3.3" in text
    assert "1.4 / 1.2 higher" in text
    assert "imagenette is not ImageNet" in text
    assert re.search(r"from the paper's difference, ten crops +42\.1 +19\.4", table({**result, "data": "ilsvrc2012"}))
    assert re.search(r"the paper, ten crops +40\.7 +18\.2", table({**result, "data": "ilsvrc2012", "claim": "one_cnn"}))
    assert "cannot be compared" not in table({**result, "data": "ilsvrc2012"})
    assert "cannot be compared with the paper's: other data" in table({**result, "data": "ilsvrc2010"})
    assert "cannot be compared with the paper's: 1 epochs" in table({**result, "data": "ilsvrc2012", "epochs": 1})
    with initialize_config_dir(CONF, version_base="1.3"):
        claims = {
            data: claim_of(compose("train", [f"data={data}"])) for data in ("ilsvrc2010", "ilsvrc2012", "imagenette")
        }
    assert claims == {"ilsvrc2010": "table1_cnn", "ilsvrc2012": "one_cnn", "imagenette": "one_cnn"}
    assert "40.7" not in table({**result, "claim": None})


@pytest.fixture(scope="module")
def pair(small_alexnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Return two runs that disagree, their softmax on the training images, (2, 12, classes), and the labels."""
    folder = tmp_path_factory.mktemp("pair")
    runs = [folder / name for name in ("seed-0", "seed-1")]
    shutil.copytree(small_alexnet, runs[0])
    with initialize_config_dir(CONF, version_base="1.3"):
        train(compose("train", [*small_alexnet_options(small_alexnet.parent), "seed=1", f"run={runs[1]}"]))
    store = Store(small_alexnet.parent / "store")
    split, mean = store.split("train"), torch.from_numpy(store.mean)
    images = torch.stack([(torch.from_numpy(split[i].copy()).float() - mean)[7:103, 7:103] for i in range(len(split))])
    nets, logits = [], []
    for run in runs:
        path = run / "checkpoints" / "last.ckpt"
        model = Classifier.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()
        nets.append((path, torch.load(path, weights_only=True)))
        with torch.no_grad():
            logits.append(model.net(images.permute(0, 3, 1, 2)))
    # Barely trained nets predict the same for every image. Rescale their logits so that they separate the classes, one
    # net more confidently than the other, and so that the error of their mean differs from both errors.
    labels = torch.tensor([int(label) for label in split.labels])
    shares = [torch.linspace(0.2, 0.8, 5).tolist()] * 2  # of the images, roughly, that a net takes for the first class
    for *cuts, sure in itertools.product(*shares, torch.logspace(-1, 1, 21).tolist()):
        shifts = [
            torch.stack([each[:, 0].quantile(1 - cut), each[:, 1].quantile(cut)])
            for each, cut in zip(logits, cuts, strict=True)
        ]
        centred = [(each - shift) / each.std(0).mean() for each, shift in zip(logits, shifts, strict=True)]
        softmaxes = torch.stack([centred[0].softmax(1), (sure * centred[1]).softmax(1)])
        if len({top1_error(softmax, labels) for softmax in (*softmaxes, softmaxes.mean(0))}) == 3:
            break
    for (path, checkpoint), each, shift, factor in zip(nets, logits, shifts, (1, sure), strict=True):
        checkpoint["state_dict"]["net.fc8.bias"] -= shift
        for name in ("weight", "bias"):
            checkpoint["state_dict"][f"net.fc8.{name}"] *= factor / each.std(0).mean()
        torch.save(checkpoint, path)
    return runs, softmaxes, labels


def top1_error(softmax: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the top-1 error in percent."""
    return round(100 * (softmax.argmax(1) != labels).double().mean().item(), 4)


def test_ensemble_predicts_with_the_mean_softmax(pair: Pair, cwd: Path, run_command: Run) -> None:
    runs, softmaxes, labels = pair
    assert (
        len({top1_error(softmax, labels) for softmax in (*softmaxes, softmaxes.mean(0))}) == 3
    )  # otherwise the test would prove nothing
    status, out, err = run_command(
        "evaluate", f"runs=[{runs[0]},{runs[1]}]", "split=train", "trainer=cpu", "trainer.precision=32-true"
    )
    assert (status, err) == (0, "")
    assert f"{runs[1]}: {top1_error(softmaxes[1], labels):.1f} / " in out
    assert "mean of 2 nets, one view" in out
    (path,) = runs[0].parent.glob("ensemble-2-*-last-train-centre.json")
    result = json.loads(path.read_text())
    assert result["centre"]["top1_error"] == top1_error(softmaxes.mean(0), labels)
    assert (result["members"], result["seeds"], result["recipe"], result["claim"]) == (2, [0, 1], "as_run", None)
    wrong = (torch.stack([*softmaxes, softmaxes.mean(0)]).argmax(2) != labels).double()
    lower = 100 * (wrong[:2].mean(0) - wrong[2])  # of each image
    found = result["gain"]["top1_error"]
    assert found["value"] == pytest.approx(lower.mean().item(), abs=1e-3)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * lower.std().item() / len(lower) ** 0.5, abs=1e-3)
    assert f"averaging lowers the top-1 error by {found['value']:.1f} points" in out


def test_weights_are_fitted_on_one_half_and_measured_on_the_other(pair: Pair, cwd: Path, run_command: Run) -> None:
    runs, softmaxes, labels = pair
    status, out, err = run_command(
        "evaluate", f"runs=[{runs[0]},{runs[1]}]", "split=train", "trainer=cpu", "trainer.precision=32-true",
        "ensemble.weights=search",
    )  # fmt: skip
    assert (status, err) == (0, "")
    (path,) = runs[0].parent.glob("ensemble-2-*-fitted-last-train-centre.json")
    result = json.loads(path.read_text())
    assert result["images"] == 6
    weights = torch.tensor(result["weights"])[:, None, None]
    mean = (weights * softmaxes).sum(0) / weights.sum()
    assert result["centre"]["top1_error"] == top1_error(mean[1::2], labels[1::2])
    assert "weights, fitted on every second image" in out
    assert run_command("evaluate", f"run={runs[0]}", "ensemble.weights=search")[0] == 2


def test_search_ends_where_no_change_of_one_weight_lowers_the_top5_error() -> None:
    """Try all values of each weight. One net is right about the even classes, the other about the odd ones, and less sure."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 20, (400,), generator=generator)
    logits = torch.randn(2, 400, 20, generator=generator)
    for net, sure in enumerate((3.0, 1.5)):
        knows = labels % 2 == net
        logits[net, knows, labels[knows]] += sure
    members = list(logits.softmax(2))
    weights, measured = fitted(members, labels)
    assert measured.tolist() == list(range(1, 400, 2))

    def misses(pair: tuple[float, float]) -> int:
        mean = (pair[0] * members[0] + pair[1] * members[1])[::2]
        return int((mean.topk(5).indices != labels[::2, None]).all(1).sum())

    grid = [i / 20 for i in range(21)]
    found = misses((weights[0], weights[1]))
    assert found < misses((1.0, 1.0))
    assert all(misses((value, weights[1])) >= found for value in grid)  # no change of one weight is better
    assert all(misses((weights[0], value)) >= found for value in grid)


def test_folder_of_runs_selects_all_runs_and_may_contain_equals_signs(pair: Pair, cwd: Path, run_command: Run) -> None:
    (cwd / "runs").mkdir()
    seeds = cwd / "runs" / "paper-epochs=1"
    shutil.copytree(pair[0][0].parent, seeds)
    for options in (["runs=runs/paper-epochs=1"], [f"runs=[{seeds}/seed-0, runs/paper-epochs=1/seed-1]"]):
        status, out, err = run_command("evaluate", *options, "trainer=cpu")
        assert (status, err) == (0, "")
        assert "mean of 2 nets" in out
    status, _, err = run_command("evaluate", "run=runs/paper-epochs=1/seed-0", "trainer=cpu")
    assert (status, err) == (0, "")
    assert (seeds / "seed-0" / "evaluation-last-val-centre.json").is_file()


def test_evaluations_of_two_stores_or_precisions_are_kept_apart(
    small_alexnet: Path, cwd: Path, run_command: Run
) -> None:
    """Other training images make it another store."""
    run = shutil.copytree(small_alexnet, cwd / "r")
    other = shutil.copytree(small_alexnet.parent / "store", cwd / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["sha256"]["train/00000.npy"] = 64 * "0"
    manifest["checksum"] = manifest_checksum(manifest)
    (other / "manifest.json").write_text(json.dumps(manifest))
    precisions = [f"trainer.precision={precision}" for precision in ("32-true", "bf16-mixed", "32-true")]
    for options in (*([precision] for precision in precisions), ["store=other"]):
        status, _, err = run_command("evaluate", "run=r", "trainer=cpu", *options)
        assert status == 0, err
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, _, err = run_command("evaluate", "run=r", "trainer=cpu", "out=here/m.json")
    assert status == 0, err
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert kept == before  # a run that cannot be written can be measured
    assert json.loads(Path("here/m.json").read_text())["centre"] == errors(
        torch.from_numpy(read_scores(Path("here/m.npz"))["centre"])
    )
    assert read_results(Path("here")) == []
    status, _, err = run_command("evaluate", "run=r", "out=here/m.json")
    assert (status, "m.json exists" in err) == (2, True), err
    names = {path.name for path in run.glob("evaluation-*.json")}
    ends = {"": "32-true", "-bf16-mixed": "bf16-mixed", f"-{Store(other).images_sha256[:8]}": None}
    assert names == {f"evaluation-last-val-centre{end}.json" for end in ends}
    for end, precision in ends.items():
        measured = json.loads((run / f"evaluation-last-val-centre{end}.json").read_text())
        assert precision in (None, measured["precision"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say which run"),
        (["runs=[]"], "say which run"),
        (["run=2012"], "2012 is not the folder of a run"),
        (["run=a", "runs=[b,c]"], "say which run"),
        (["runs=[a,a]"], "names a run twice"),
        (["runs=[a,unfinished]"], "unfinished holds no finished run"),
        (["runs=[a,damaged]"], "damaged/result.json is damaged"),
        (["runs=[a,empty]"], "empty/result.json lacks recipe"),
        (["runs=[a,nothing]"], "nothing is not the folder of a run"),
        (["ensemble=five_cnns"], "runs/paper-ilsvrc2012/seed-0 is not the folder of a run"),
    ],
)
def test_invalid_runs_are_refused(
    options: list[str], message: str, small_alexnet: Path, cwd: Path, run_command: Run
) -> None:
    for name in ("a", "unfinished"):
        (cwd / name).mkdir()
        shutil.copy(small_alexnet / "config.yaml", cwd / name)
    shutil.copy(small_alexnet / "result.json", cwd / "a")
    shutil.copytree(cwd / "a", cwd / "damaged")
    (cwd / "damaged" / "result.json").write_text("{")
    shutil.copytree(cwd / "a", cwd / "empty")
    (cwd / "empty" / "result.json").write_text("{}")
    status, _, err = run_command("evaluate", *options)
    assert status == 2
    assert message in err


def test_folder_that_cannot_be_written_is_told_before_the_work(
    small_alexnet: Path, cwd: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alexnet_repro.training.evaluation.load_run", lambda *_: pytest.fail("it began to work"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != small_alexnet)  # root may write anywhere
    status, _, err = run_command("evaluate", f"run={small_alexnet}", "trainer=cpu")
    assert (status, f"{small_alexnet} cannot be written" in err) == (2, True), err


def test_ensembles_of_table_2_are_recognised() -> None:
    plain = {"ablation": "none", "net": "alexnet"}
    assert ensemble_claim({**plain, "members": 5}) == "five_cnns"
    assert ensemble_claim({**plain, "members": 7, "pretrained_members": 2}) == "seven_cnns"
    assert ensemble_claim({**plain, "members": 7}) is None
    assert ensemble_claim({**plain, "members": 5, "pretrained_members": 2}) is None


def test_an_ensemble_with_the_papers_errors_decides_seven_cnns(tmp_path: Path) -> None:
    runs = []
    for number in range(7):
        runs.append(tmp_path / str(number))
        runs[-1].mkdir()
        facts = {"net": "alexnet", "recipe": "as_run", "ablation": "none", "data": "ilsvrc2012", "scale": "full"}
        facts |= {"seed": number % 5, "epochs": 91, "of_epochs": 91, "batch_size": 128, "lr": 0.01}  # type: ignore[dict-item]
        facts |= {"centre": {"top1_error": 40.0, "top5_error": 18.0, "log_loss": 1.7}}  # type: ignore[dict-item]
        if number > 4:
            facts |= {"experiment": "one_cnn_pretrained", "pretraining": "fine_tuned"}
        (runs[-1] / "result.json").write_text(json.dumps(facts))
    pair = {"top1_error": 36.7, "top5_error": 15.4, "log_loss": 1.5}
    measured = {"ten_crop": pair, "centre": pair, "split": "val", "images": 50_000, "precision": "32-true", "file": ""}
    ensemble: Any = {**common_facts(runs), "data": "ilsvrc2012", **measured}
    assert ensemble["experiment"] is None
    (found,) = judge([ensemble])["seven_cnns"]
    assert found.verdict == "one seed, inside"  # an ensemble is one sample


WNIDS = [f"n0144{i}" + "0" * 3 for i in range(6)]
NUMBERS = [4, 1, 6, 3, 2, 5]  # of these classes in the development kit


@pytest.fixture
def entrants(cwd: Path, run_command: Run) -> tuple[list[Path], Path]:
    """Return two runs, and a source with ILSVRC's unlabelled test images and its kit, of which ``store`` was made."""
    for number, wnid in enumerate(WNIDS):
        for split, count in (("train", 2), ("val", 1)):
            for i in range(count):
                save_picture(cwd / "source" / split / wnid / f"{i}.JPEG", seed=10 * number + i + (split == "val") * 5)
    for i in (3, 1, 2, 4):
        save_picture(cwd / "source" / "test" / f"ILSVRC2012_test_0000000{i}.JPEG", seed=100 + i)
    kit = cwd / "source" / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    rows = np.array(list(zip(NUMBERS, WNIDS, strict=True)), dtype=[("ILSVRC2012_ID", float), ("WNID", object)])
    scipy.io.savemat(kit / "meta.mat", {"synsets": rows})
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n")
    options = ["data=folder", "data.image_size=110", "data.store=store"]
    status, out, err = run_command("prepare", *options, "source=source")
    assert (status, "12 train, 6 val, 4 unlabelled" in out) == (0, True), out + err
    runs = []
    for seed in (0, 1):
        runs.append(cwd / f"seed-{seed}")
        with initialize_config_dir(CONF, version_base="1.3"):
            train(compose("train", [*small_alexnet_options(cwd), f"seed={seed}", f"run={runs[-1]}"]))
        # Replace the last layer, so that the guesses for the images differ.
        path = runs[-1] / "checkpoints" / "last.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        logits = torch.stack(outputs(path, cwd / "source"))
        weight, bias = (checkpoint["state_dict"][f"net.fc8.{name}"] for name in ("weight", "bias"))
        scale = 1 / logits.std(0)
        weight *= scale[:, None]
        bias.copy_((bias - logits.mean(0)) * scale)
        torch.save(checkpoint, path)
    return runs, cwd / "source"


def outputs(checkpoint: Path, source: Path) -> list[torch.Tensor]:
    """Return the logits of each test image, in the order of their numbers, for the central patch."""
    model = Classifier.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True).eval()
    mean, found = torch.from_numpy(Store(source.parent / "store").mean), []
    for i in range(1, 5):
        image = read_image((source / "test" / f"ILSVRC2012_test_0000000{i}.JPEG").read_bytes, 110)
        patch = (torch.tensor(image).float() - mean)[7:103, 7:103]
        with torch.no_grad():
            found.append(model.net(patch.permute(2, 0, 1)[None])[0])
    return found


def test_submission_holds_the_five_most_probable_classes(
    entrants: tuple[list[Path], Path], cwd: Path, run_command: Run
) -> None:
    runs, source = entrants
    softmax = [torch.stack(outputs(run / "checkpoints" / "last.ckpt", source)).softmax(1) for run in runs]
    options = ["split=unlabelled", "trainer=cpu", "trainer.precision=32-true"]
    wanted = {}
    for line, mean in ((f"run={runs[0]}", softmax[0]), (f"runs=[{runs[0]},{runs[1]}]", sum(softmax))):
        order = torch.as_tensor(mean).argsort(1, descending=True)[:, :5]
        wanted[line] = [" ".join(str(NUMBERS[label]) for label in row) for row in order.tolist()]
        assert len(set(wanted[line])) > 2, "otherwise the order of the images would not be tested"
        status, out, err = run_command("evaluate", line, *options)
        assert (status, "4 lines" in out) == (0, True), out + err
        (path,) = [
            path for path in cwd.rglob("submission-*.txt") if path.parent == (runs[0] if "run=" in line else cwd)
        ]
        assert path.read_text().splitlines() == wanted[line]
    assert len({str(lines) for lines in wanted.values()}) == 2
    status, _, err = run_command("evaluate", f"runs=[{runs[0]},{runs[1]}]", *options, "ensemble.weights=search")
    assert (status, "needs labels" in err) == (2, True)
    shutil.rmtree(source / "ILSVRC2012_devkit_t12")
    again = ["prepare", "data=folder", "data.image_size=110", "source=source", "data.store=store", "overwrite=true"]
    assert run_command(*again)[0] == 0
    status, out, err = run_command("evaluate", f"run={runs[0]}", *options)
    assert (status, "WordNet IDs" in out) == (0, True), out + err
    latest = max(runs[0].glob("submission-last-unlabelled-centre*.txt"), key=lambda path: path.stat().st_mtime_ns)
    first = latest.read_text().split()[0]
    assert NUMBERS[WNIDS.index(first)] == int(wanted[f"run={runs[0]}"][0].split()[0])
    (source / "test" / "ILSVRC2012_test_00000002.JPEG").write_bytes(b"no image")
    assert run_command(*again)[0] == 0
    converted = ["data=folder", "data.image_size=110", "source=store", "data.store=copy", "encoding=jpeg"]
    assert run_command("prepare", *converted)[0] == 0
    for store in ("store", "copy"):
        status, _, err = run_command("evaluate", f"run={runs[0]}", f"store={store}", *options)
        assert (status, "lacks 1 of the images to be submitted" in err) == (2, True), err


def test_softmax_of_members_is_saved_and_read_again(pair: Pair, cwd: Path, run_command: Run) -> None:
    """Measure an ensemble, then again with changed files in its members' folders, which must decide what is used."""
    fresh = shutil.ignore_patterns("softmax-*")
    runs = [Path(shutil.copytree(run, cwd / run.name, ignore=fresh)) for run in pair[0]]
    line = ("evaluate", f"runs=[{runs[0]},{runs[1]}]", "split=train", "trainer=cpu", "trainer.precision=32-true")

    def measured() -> tuple[str, dict[str, float]]:
        status, out, err = run_command(*line)
        assert (status, err) == (0, "")
        (path,) = cwd.glob("ensemble-2-*-last-train-centre.json")
        return out, json.loads(path.read_text())["centre"]

    out, first = measured()
    assert "read from" not in out
    out, second = measured()
    assert (second, out.count("read from")) == (first, 2)
    saved = runs[1] / "softmax-last-train-centre.npz"
    with np.load(saved) as arrays:
        assert arrays["centre"] == pytest.approx(pair[1][1].numpy(), abs=1e-5)
        changed = {**arrays, "centre": arrays["centre"][:, ::-1]}
    np.savez(saved, **changed)
    assert measured()[1] != first  # it is really used
    checkpoint = torch.load(runs[1] / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["epoch"] += 1
    torch.save(checkpoint, runs[1] / "checkpoints" / "last.ckpt")  # other bytes, same net
    out, third = measured()
    assert (third, out.count("read from")) == (first, 1)
    saved.write_bytes(saved.read_bytes()[:200])
    assert measured()[1] == first
