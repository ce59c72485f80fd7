"""Measure a trained net, or an ensemble of nets (Table 2), on one view or several crops (Section 4.1)."""

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
from alexnet_repro.training.launcher import meet, ran_in_processes, refuse_placement
from alexnet_repro.training.measurement import (
    MEASURED_WITH,
    circumstances,
    fitting_store,
    load_run,
    predict,
)
from alexnet_repro.training.run_folder import named, saved_config
from alexnet_repro.training.trainer import make_trainer, on_gpu


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Measure one run, or an ensemble of several runs; print a table and write the result as JSON.

    For one run, the file is evaluation-<checkpoint>-<split>-<views>.json in its folder. For several runs, the softmax
    outputs are averaged with equal weights, and the file is ensemble-<number of runs>-... in the parent folder of the
    first run. Raises UserError for runs that cannot be measured or combined.
    """
    if cfg.views not in MEASURED_WITH:
        raise UserError(f"there is no views={cfg.views}", f"there are: {', '.join(MEASURED_WITH)}")
    runs = chosen_runs(cfg)
    for run in runs:
        refuse_placement(cfg, saved_config(run).net)
    facts = common_facts(runs) if len(runs) > 1 else {}
    if ran_in_processes(cfg, "evaluate", task_overrides()):
        return {}
    meet(cfg, on_gpu(cfg))
    trainer = make_trainer(cfg, runs[0])
    store_path = str(cfg.store or saved_config(runs[0]).data.store)
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
        "claim": claim_of(trained) if len(runs) == 1 else _ensemble_claim(facts),
        "data": store.manifest.get("name", trained.data.name),
        **facts,
        "images": len(scores["centre"]),
        **{view: errors(view_scores) for view, view_scores in scores.items()},
        **circumstances(trainer),
    }
    print(table(result))
    if trainer.is_global_zero:
        path = runs[0] / f"evaluation-{cfg.checkpoint}-{data.predict_split}-{cfg.views}.json"
        if len(runs) > 1:
            digest = hashlib.sha256(" ".join(str(run.resolve()) for run in runs).encode()).hexdigest()[:6]
            path = runs[0].parent / f"ensemble-{len(runs)}-{digest}-{path.name.removeprefix('evaluation-')}"
        write_json(path, result)
        save_scores(path.with_suffix(".npz"), scores)
        print(f"written to {path}")
    return result


def chosen_runs(cfg: DictConfig) -> list[Path]:
    """Return the run folders that ``run`` or ``runs`` names.

    A folder of several runs in ``runs`` stands for all finished runs in it. Raises UserError if no run is named, if
    both options are given, or if a run is named twice.
    """
    chosen = cfg.runs if cfg.run is None else cfg.run
    folders = named(chosen)
    if not folders or (cfg.run is not None and cfg.runs is not None):
        raise UserError(
            "say which run to evaluate: run=FOLDER, or runs=[FOLDER,FOLDER] for an ensemble",
            "for example run=runs/paper/seed-0, or runs=runs/paper for all its seeds",
        )
    runs = []
    for folder in folders:
        seeds = [] if (folder / "config.yaml").exists() else sorted(folder.glob("*/result.json"))
        runs += [result.parent for result in seeds] if seeds and cfg.run is None else [folder]
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError(f"runs={cfg.runs} names a run twice", "name each run of an ensemble once")
    return runs


def common_facts(runs: list[Path]) -> dict[str, Any]:
    """Return how the runs of an ensemble were trained, with their number and seeds.

    Values that differ between runs are joined by "and". Raises UserError for an unfinished run.
    """
    results = []
    for run in runs:
        if not (run / "result.json").is_file():
            raise UserError(f"{run} holds no finished run", "finish it first: train with resume=true")
        results.append(read_result(run / "result.json"))
    facts: dict[str, Any] = {"members": len(runs), "seeds": [result["seed"] for result in results]}
    for key in ("ablation", "recipe", "experiment", "source", "net", "batch_size", "lr"):
        different = sorted({str(result.get(key)) for result in results})
        facts[key] = results[0].get(key) if len(different) == 1 else " and ".join(different)
    facts["options"] = sorted({option for result in results for option in result.get("options", ())})
    return facts | {"seed": results[0]["seed"], "epochs": min(result["epochs"] for result in results)}


def _ensemble_claim(facts: dict[str, Any]) -> str | None:
    is_ensemble_of_table_2 = (facts["members"], facts["ablation"], facts["net"]) == (5, "none", "alexnet")
    return "five_cnns" if is_ensemble_of_table_2 else None
