"""Errors of a trained net, or of several whose predictions are averaged (Table 2), for one view and for ten crops (Section 4.1)."""

import hashlib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from alexnet_repro.claims.paper import claim_of
from alexnet_repro.claims.results import read_result
from alexnet_repro.claims.scores import errors, gathered, save_scores, score
from alexnet_repro.claims.screen import table
from alexnet_repro.cli import task_overrides
from alexnet_repro.data.module import StoreData
from alexnet_repro.errors import UserError
from alexnet_repro.provenance import write_json
from alexnet_repro.training.launcher import ran_in_processes, refuse_placement
from alexnet_repro.training.measurement import (
    MEASURED_WITH,
    circumstances,
    fitting_store,
    load_run,
    predict,
    run_config,
)
from alexnet_repro.training.run_folder import named
from alexnet_repro.training.trainer import make_trainer


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
    if ran_in_processes(cfg, "evaluate", task_overrides()):
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
            alone = errors(gathered(score(softmax[cfg.views], labels), trainer))
            print(f"{run}: {alone['top1_error']:.1f} / {alone['top5_error']:.1f}")
        sums = {view: scores + sums.get(view, 0) for view, scores in softmax.items()}
    scores = {view: gathered(score(total / len(runs), labels), trainer) for view, total in sums.items()}
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
