"""Errors of a trained net, or of several whose predictions are averaged (Table 2), for one view and for ten crops (Section 4.1).

python -m alexnet_repro.evaluate run=runs/paper/seed-0 views=ten_crop
python -m alexnet_repro.evaluate runs=[runs/paper/seed-0,runs/paper/seed-1] views=ten_crop
"""

import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from alexnet_repro.claims.paper import expected_errors, read_claims
from alexnet_repro.claims.results import read_result
from alexnet_repro.classifier import Classifier
from alexnet_repro.cli import UserError, command
from alexnet_repro.data import StoreData
from alexnet_repro.processes import launch, launched, refuse_placement, world
from alexnet_repro.runs import circumstances, load_checkpoint, named, write_json
from alexnet_repro.scores import VIEWS, errors, gathered, save_scores, score
from alexnet_repro.store import Store
from alexnet_repro.trainers import make_trainer

# Of each choice of views=, what is measured in one pass over the images.
MEASURED_WITH: dict[str, tuple[str, ...]] = {"centre": VIEWS[:1], "ten_crop": VIEWS[:2], "nine_crop": VIEWS}
SAMPLE = 10_000  # training images at most, evenly spaced, that a trained net is measured on as it is on test images


def predict(
    trainer: L.Trainer, model: Classifier, data: StoreData, views: tuple[str, ...] = VIEWS[:2]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Predict the images of ``data.predict_split``: labels (N,) and, by view, softmax (N, classes).

    One pass gives the centre patch and the ten crops, since the centre patch is the fifth of the ten.
    """
    model.predicted_views = views
    batches: Any = trainer.predict(model, datamodule=data)
    labels, *softmax = (torch.cat(column) for column in zip(*batches, strict=True))
    return labels, dict(zip(views, softmax, strict=True))


def measure(
    trainer: L.Trainer, model: Classifier, data: StoreData, views: tuple[str, ...] = VIEWS[:2]
) -> dict[str, Tensor]:
    """Score every image of ``data.predict_split``, over all processes: by view, (N, 3) as scores.score gives them."""
    labels, softmax = predict(trainer, model, data, views)
    return {view: gathered(score(p, labels), trainer.strategy) for view, p in softmax.items()}


def table(result: dict[str, Any]) -> str:
    """A few lines for the screen: this run's errors, beside the paper's if there is a claim, and what that is worth."""
    rows = [("error, %", "top-1", "top-5", "log-loss")]
    who = f"mean of {result['members']} nets" if "members" in result else "this run"
    names = {"centre": "one view", "ten_crop": "ten crops", "nine_crop": "nine crops"}
    for view, pair in ((view, result[view]) for view in VIEWS if view in result):
        nats = f"{pair['log_loss']:.3f}" if "log_loss" in pair else ""
        rows.append((f"{who}, {names[view]}", f"{pair['top1_error']:.1f}", f"{pair['top5_error']:.1f}", nats))
    lines = []
    if claim := result["claim"]:
        paper = read_claims()[claim]
        if expected := expected_errors(claim):
            rows.append(("the paper, ten crops", f"{expected['top1_error']:.1f}", f"{expected['top5_error']:.1f}", ""))
        lines.append(f"The paper, {paper.section}, {paper.data} {paper.split}: {paper.says}")
        if {paper.data, result["data"]} == {"ilsvrc2010", "ilsvrc2012"}:
            lines.append(
                f"These are errors on {result['data']}, of other classes and images: no measure of the paper's."
            )
    if result["data"] == "photos":
        lines.append(
            "The demonstration data is not ImageNet (ten classes, each one photograph): "
            "these numbers show that everything works and can't be compared with the paper's."
        )
    elif result["data"] not in ("ilsvrc2010", "ilsvrc2012"):
        lines.append(f"{result['data']} is not ImageNet: its errors can't be set beside the paper's.")
    width = max(len(row[0]) for row in rows)
    return "\n".join(
        ["", *(f"  {name:<{width}}  {one:>6}  {five:>6}  {nats:>8}".rstrip() for name, one, five, nats in rows), *lines]
    )


def run_config(run: Path) -> DictConfig:
    """What a run was trained with. Raises UserError if that folder isn't a run's."""
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run} is not the folder of a run", "give the folder that train made, such as run=runs/paper/seed-0"
        )
    return DictConfig(OmegaConf.load(run / "config.yaml"))


def load_run(run: Path, checkpoint: str = "last") -> tuple[Classifier, DictConfig]:
    """The trained net of a run's folder and its config. Raises UserError if the folder holds none."""
    trained = run_config(run)
    path = run / "checkpoints" / f"{checkpoint}.ckpt"
    if not path.is_file():
        raise UserError(
            f"{run} has no checkpoint '{checkpoint}'",
            "choose checkpoint=last or checkpoint=best, once an epoch is done",
        )
    load_checkpoint(path)  # says it if the file is damaged
    model = Classifier.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    return model, trained


def fitting_store(path: str, model: Classifier, run: Path) -> Store:
    """The store at that path. Raises UserError if it isn't of the kind that the run's net was trained on."""
    store = Store(path)
    if store.classes != model.class_names:
        raise UserError(
            f"the store {store.path} has other classes than the net of {run} was trained on", "choose store=PATH"
        )
    if store.image_size != model.image_size:
        raise UserError(f"the store {store.path} has images of another size than the net of {run} was trained on")
    return store


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Measure a run's net, print the table, and write evaluation-<checkpoint>-<split>-<views>.json into its folder.

    Of several runs the softmax outputs are averaged, each net with the same weight, and ensemble-<their number>-... goes into
    the folder that holds the first. Raises UserError for runs that can't be measured, or not together.
    """
    if cfg.views not in MEASURED_WITH:
        raise UserError(f"there is no views={cfg.views}", f"there are: {', '.join(MEASURED_WITH)}")
    runs = chosen_runs(cfg)
    for run in runs:
        refuse_placement(cfg, run_config(run).net)
    facts = common_facts(runs) if len(runs) > 1 else {}
    processes = world(cfg)
    if processes > 1 and not launched():
        launch("evaluate", processes // cfg.trainer.nodes)
        return {}
    trainer = make_trainer(cfg)
    store_path = str(cfg.store or run_config(runs[0]).data.store)
    sums: dict[str, Tensor] = {}
    for run in runs:
        model, trained = load_run(run, cfg.checkpoint)
        store = fitting_store(store_path, model, run)
        data = StoreData(store, cfg.batch_size, trained.seed, {"crop": model.crop}, cfg.trainer.workers, cfg.split)
        labels, softmax = predict(trainer, model, data, MEASURED_WITH[cfg.views])
        if len(runs) > 1:
            alone = errors(gathered(score(softmax[cfg.views], labels), trainer.strategy))
            print(f"{run}: {alone['top1_error']:.1f} / {alone['top5_error']:.1f}")
        sums = {view: scores + sums.get(view, 0) for view, scores in softmax.items()}
    scores = {view: gathered(score(total / len(runs), labels), trainer.strategy) for view, total in sums.items()}
    result = {
        **({"run": str(runs[0])} if len(runs) == 1 else {"runs": [str(run) for run in runs]}),
        "checkpoint": cfg.checkpoint,
        "split": data.predict_split,
        "claim": claim_of(trained) if len(runs) == 1 else _claim_of_several(facts),
        "data": store.manifest.get("name", trained.data.name),
        **facts,
        "images": len(scores["centre"]),
        **{view: errors(of_view) for view, of_view in scores.items()},
        **circumstances(trainer),
    }
    print(table(result))
    if trainer.is_global_zero:
        path = runs[0] / f"evaluation-{cfg.checkpoint}-{data.predict_split}-{cfg.views}.json"
        if len(runs) > 1:
            which = hashlib.sha256(" ".join(str(run.resolve()) for run in runs).encode()).hexdigest()[:6]
            path = runs[0].parent / f"ensemble-{len(runs)}-{which}-{path.name.removeprefix('evaluation-')}"
        write_json(path, result)
        save_scores(path.with_suffix(".npz"), scores)
        print(f"written to {path}")
    return result


def chosen_runs(cfg: DictConfig) -> list[Path]:
    """The folder of run=, or those of runs=, where a folder of finished runs stands for all of them.

    Raises UserError if there are none, or one twice.
    """
    chosen = cfg.runs if cfg.run is None else cfg.run
    folders = named(chosen)
    if not folders or (cfg.run is not None and cfg.runs is not None):
        raise UserError(
            "say which run: run=FOLDER, or which several: runs=[FOLDER,FOLDER]",
            "for example run=runs/paper/seed-0, or runs=runs/paper for all its seeds",
        )
    runs = []
    for folder in folders:
        seeds = [] if (folder / "config.yaml").exists() else sorted(folder.glob("*/result.json"))
        runs += [result.parent for result in seeds] if seeds and cfg.run is None else [folder]
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError(f"runs={cfg.runs} names a run twice", "each net's predictions are to count once")
    return runs


def common_facts(runs: list[Path]) -> dict[str, Any]:
    """What the results of these runs say of how they were made, where it differs joined by "and"; and how many they are.

    Raises UserError for a run that isn't finished.
    """
    results = []
    for run in runs:
        if not (run / "result.json").is_file():
            raise UserError(f"{run} holds no finished run", "let it end first: train with resume=true")
        results.append(read_result(run / "result.json"))
    facts: dict[str, Any] = {"members": len(runs), "seeds": [result["seed"] for result in results]}
    for key in ("ablation", "recipe", "experiment", "source", "net", "batch_size", "lr"):
        different = sorted({str(result.get(key)) for result in results})
        facts[key] = results[0].get(key) if len(different) == 1 else " and ".join(different)
    facts["options"] = sorted({option for result in results for option in result.get("options", ())})
    return facts | {"seed": results[0]["seed"], "epochs": min(result["epochs"] for result in results)}


def _claim_of_several(facts: dict[str, Any]) -> str | None:
    similar = (facts["members"], facts["ablation"], facts["net"]) == (5, "none", "alexnet")
    return "five_cnns" if similar else None


def claim_of(cfg: DictConfig) -> str | None:
    """The claim of paper.yaml that a run tests: its ablation's, and none for several ablations at once or another net."""
    if cfg.net.name != "alexnet":
        return None
    claims = list(cfg.ablation.values())
    return claims[0] if len(claims) == 1 else (None if claims else cfg.claim)


if __name__ == "__main__":
    command("evaluate")
