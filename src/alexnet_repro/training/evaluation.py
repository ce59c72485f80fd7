"""Measure a trained net, or an ensemble of nets (Table 2), on one view or several crops (Section 4.1)."""

import hashlib
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from alexnet_repro.claims.paper import claim_of
from alexnet_repro.claims.scores import errors, gathered, save_scores, score
from alexnet_repro.claims.screen import table
from alexnet_repro.cli import task_overrides
from alexnet_repro.data.module import StoreData
from alexnet_repro.errors import UserError
from alexnet_repro.provenance import write_json
from alexnet_repro.training.ensemble import chosen_runs, common_facts, ensemble_claim, fitted, gain, weighted_mean
from alexnet_repro.training.launcher import meet, ran_in_processes, refuse_placement
from alexnet_repro.training.measurement import (
    MEASURED_WITH,
    circumstances,
    fitting_store,
    load_run,
    predict,
)
from alexnet_repro.training.run_folder import saved_config
from alexnet_repro.training.trainer import make_trainer, on_gpu


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Measure one run, or an ensemble of several runs; print a table and write the result as JSON.

    For one run, the file is evaluation-<checkpoint>-<split>-<views>.json in its folder. For several runs, the mean of
    their softmax outputs is measured, and the file is ensemble-<number of runs>-... in the parent folder of the first
    run. With ``ensemble.weights=search``, the weights of the mean are fitted on every second image, and the errors are
    those of the other images. Raises UserError for runs that cannot be measured or combined.
    """
    if cfg.views not in MEASURED_WITH:
        raise UserError(f"there is no views={cfg.views}", f"there are: {', '.join(MEASURED_WITH)}")
    runs = chosen_runs(cfg)
    for run in runs:
        refuse_placement(cfg, saved_config(run).net)
    facts = common_facts(runs) if len(runs) > 1 else {}
    if len(runs) == 1 and cfg.ensemble.weights == "search":
        raise UserError("ensemble.weights=search needs several runs", "name them with runs=[FOLDER,FOLDER]")
    if ran_in_processes(cfg, "evaluate", task_overrides()):
        return {}
    meet(cfg, on_gpu(cfg))
    trainer = make_trainer(cfg, runs[0])
    store_path = str(cfg.store or saved_config(runs[0]).data.store)
    members: dict[str, list[Tensor]] = {}  # softmax of every member, by view
    alone: list[Tensor] = []  # scores of every member
    for run in runs:
        model, trained = load_run(run, cfg.checkpoint)
        store = fitting_store(store_path, model, run)
        data = StoreData(store, cfg.batch_size, trained.seed, {"crop": model.crop}, cfg.trainer.workers, cfg.split)
        labels, softmax = predict(trainer, model, data, MEASURED_WITH[cfg.views])
        if len(runs) > 1:
            alone.append(gathered(score(softmax[cfg.views], labels), trainer))
            own = errors(alone[-1])
            print(f"{run}: {own['top1_error']:.1f} / {own['top5_error']:.1f}")
        if cfg.ensemble.weights == "search":
            softmax = {view: gathered(scores, trainer) for view, scores in softmax.items()}
        for view, scores in softmax.items():
            members.setdefault(view, []).append(scores)
            if cfg.ensemble.weights == "equal":  # the sum is enough
                members[view] = [sum(members[view])]  # type: ignore[list-item]
    if cfg.ensemble.weights == "search":
        labels = gathered(labels[:, None], trainer).squeeze(1).to(torch.int64)
        facts["weights"], measured = fitted(members[cfg.views], labels)
        print(f"weights, fitted on every second image: {', '.join(f'{weight:.2f}' for weight in facts['weights'])}")
        equal = errors(score(weighted_mean(members[cfg.views])[measured], labels[measured]))
        print(f"equal weights on the other images: {equal['top1_error']:.1f} / {equal['top5_error']:.1f}")
        scores_by_view = {
            view: score(weighted_mean(softmax, facts["weights"])[measured], labels[measured])
            for view, softmax in members.items()
        }
    else:
        scores_by_view = {
            view: gathered(score(total / len(runs), labels), trainer) for view, (total,) in members.items()
        }
    if len(runs) > 1 and cfg.ensemble.weights == "equal":
        facts["gain"] = {"view": cfg.views, **gain(alone, scores_by_view[cfg.views])}
        lower = facts["gain"]["top1_error"]
        print(
            f"averaging lowers the top-1 error by {lower['value']:.1f} points ({lower['low']:.1f} to {lower['high']:.1f})"
        )
    result = {
        **({"run": str(runs[0])} if len(runs) == 1 else {"runs": [str(run) for run in runs]}),
        "checkpoint": cfg.checkpoint,
        "split": data.predict_split,
        "claim": claim_of(trained) if len(runs) == 1 else ensemble_claim(facts),
        "data": store.manifest.get("name", trained.data.name),
        **facts,
        "images": len(scores_by_view["centre"]),
        **{view: errors(scores) for view, scores in scores_by_view.items()},
        **circumstances(trainer),
    }
    print(table(result))
    if trainer.is_global_zero:
        path = runs[0] / f"evaluation-{cfg.checkpoint}-{data.predict_split}-{cfg.views}.json"
        if len(runs) > 1:
            digest = hashlib.sha256(" ".join(str(run.resolve()) for run in runs).encode()).hexdigest()[:6]
            fitted_name = "fitted-" if cfg.ensemble.weights == "search" else ""
            name = path.name.removeprefix("evaluation-")
            path = runs[0].parent / f"ensemble-{len(runs)}-{digest}-{fitted_name}{name}"
        write_json(path, result)
        save_scores(path.with_suffix(".npz"), scores_by_view)
        print(f"written to {path}")
    return result
