"""Measure a trained net, or an ensemble of nets (Table 2), on one view or several crops (Section 4.1)."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from alexnet_repro.claims.paper import claim_of
from alexnet_repro.claims.scores import errors, save_scores, score
from alexnet_repro.claims.screen import table
from alexnet_repro.composition import task_overrides
from alexnet_repro.data.module import StoreData
from alexnet_repro.data.store import Store
from alexnet_repro.errors import UserError
from alexnet_repro.files import write_json
from alexnet_repro.training.ensemble import chosen_runs, common_facts, ensemble_claim, fitted, gain, weighted_mean
from alexnet_repro.training.launcher import meet, ran_in_processes, refuse_placement
from alexnet_repro.training.measurement import (
    MEASURED_WITH,
    checkpoint_of,
    circumstances,
    fitting_store,
    load_run,
    measure,
    predict_whole,
)
from alexnet_repro.training.run_folder import images_of, saved_config
from alexnet_repro.training.submission import refuse_gaps, write_submission
from alexnet_repro.training.trainer import make_trainer, on_gpu

UNLABELLED = "unlabelled"


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Measure one run, or an ensemble of several runs; print a table and write the result as JSON.

    For one run, the file is evaluation-<checkpoint>-<split>-<views>.json in its folder, and its name ends with the
    start of the store's checksum if the store isn't the one that the run was trained on. It ends with the precision,
    too, if there is such a file of another precision. For several runs, the mean of their softmax outputs is measured,
    and the file is ensemble-<number of runs>-... in the parent folder of the first run. With
    ``ensemble.weights=search``, the weights of the mean are fitted on every second image, and the errors are those of
    the other images. With ``split=unlabelled``, there is nothing to measure: the guesses for each image are written as
    a submission, in a text file of the same name. ``cfg.out`` is another name for either file. Raises UserError for
    runs that cannot be measured or combined, and for a file that exists.
    """
    if cfg.out is not None:
        ending = ".txt" if cfg.split == UNLABELLED else ".json"
        if not str(cfg.out).endswith(ending):
            raise UserError(f"out={cfg.out}: the name must end with {ending}", f"for example out=measured{ending}")
        out = Path(str(cfg.out))
        for path in (out, out.with_suffix(".npz")) if ending == ".json" else (out,):
            if path.exists():
                raise UserError(f"{path} exists", "remove it, or choose another name with out=PATH")
    runs = chosen_runs(cfg)
    folder = _folder(cfg, runs)
    if folder.is_dir() and not os.access(folder, os.W_OK):  # told before the work, which may take hours
        raise UserError(f"{folder} cannot be written", "choose a file in another folder with out=PATH")
    for run in runs:
        refuse_placement(cfg, saved_config(run).net)
    facts = common_facts(runs) if len(runs) > 1 else {}
    if len(runs) == 1 and cfg.ensemble.weights == "search":
        raise UserError("ensemble.weights=search needs several runs", "name them with runs=[FOLDER,FOLDER]")
    if cfg.split == UNLABELLED and cfg.ensemble.weights == "search":
        raise UserError("ensemble.weights=search needs labels", "choose a split with labels, or ensemble.weights=equal")
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
        if cfg.split == UNLABELLED:
            refuse_gaps(store)
        elif len(runs) == 1:
            scores_by_view = measure(trainer, model, data, MEASURED_WITH[cfg.views])
            break
        saved = checkpoint_of(run, cfg.checkpoint) if len(runs) > 1 else None
        softmax = predict_whole(trainer, model, data, MEASURED_WITH[cfg.views], saved)
        labels = torch.from_numpy(store.split(data.predict_split).labels)
        if cfg.split != UNLABELLED:
            alone.append(score(softmax[cfg.views], labels))
            own = errors(alone[-1])
            print(f"{run}: {own['top1_error']:.1f} / {own['top5_error']:.1f}")
        for view, scores in softmax.items():
            members.setdefault(view, []).append(scores)
            if cfg.ensemble.weights == "equal":  # the sum is enough
                members[view] = [sum(members[view])]  # type: ignore[list-item]
    if cfg.split == UNLABELLED:
        (total,) = members[cfg.views]
        path = _file(cfg, runs, store, "submission", UNLABELLED, ".txt")
        if trainer.is_global_zero:
            print(f"written to {path}: {len(total)} lines, with {write_submission(path, total, store)}")
        return {}
    if len(runs) > 1:
        scores_by_view = _mean_scores(cfg, members, alone, labels, facts)
    result = {
        **({"run": str(runs[0])} if len(runs) == 1 else {"runs": [str(run) for run in runs]}),
        "checkpoint": cfg.checkpoint,
        "split": data.predict_split,
        "claim": claim_of(trained) if len(runs) == 1 else ensemble_claim(facts),
        "data": store.manifest.get("name", trained.data.name),
        **facts,
        "images": len(scores_by_view["centre"]),
        "held_out": store.manifest.get("held_out") or None,
        "images_sha256": store.images_sha256,
        **{view: errors(scores) for view, scores in scores_by_view.items()},
        **circumstances(trainer),
    }
    print(table(result))
    if trainer.is_global_zero:
        path = _apart(_file(cfg, runs, store, "evaluation", data.predict_split, ".json"), result["precision"])
        write_json(path, result)
        save_scores(path.with_suffix(".npz"), scores_by_view)
        print(f"written to {path}")
    return result


def _mean_scores(
    cfg: DictConfig, members: dict[str, list[Tensor]], alone: list[Tensor], labels: Tensor, facts: dict[str, Any]
) -> dict[str, Tensor]:
    """Return the scores (N, 3) of an ensemble's mean softmax by view, and add its weights or its gain to ``facts``.

    members: the members' softmax (N, classes) by view, or, with equal weights, their sum.
    alone: the scores of each member.
    """
    if cfg.ensemble.weights == "search":
        facts["weights"], measured = fitted(members[cfg.views], labels)
        print(f"weights, fitted on every second image: {', '.join(f'{weight:.2f}' for weight in facts['weights'])}")
        equal = errors(score(weighted_mean(members[cfg.views])[measured], labels[measured]))
        print(f"equal weights on the other images: {equal['top1_error']:.1f} / {equal['top5_error']:.1f}")
        return {
            view: score(weighted_mean(softmax, facts["weights"])[measured], labels[measured])
            for view, softmax in members.items()
        }
    scores_by_view = {view: score(total / len(alone), labels) for view, (total,) in members.items()}
    facts["gain"] = {"view": cfg.views, **gain(alone, scores_by_view[cfg.views])}
    lower = facts["gain"]["top1_error"]
    print(
        f"averaging lowers the top-1 error by {lower['value']:.1f} points ({lower['low']:.1f} to {lower['high']:.1f})"
    )
    return scores_by_view


def _folder(cfg: DictConfig, runs: list[Path]) -> Path:
    """Return the folder of what was found: that of out, or of the run, or the one that holds the first of several."""
    if cfg.out is not None:
        return Path(str(cfg.out)).parent
    return runs[0] if len(runs) == 1 else runs[0].parent


def _file(cfg: DictConfig, runs: list[Path], store: Store, kind: str, split: str, ending: str) -> Path:
    """Return where to write what was found, in a folder that is created if needed."""
    folder = _folder(cfg, runs)
    if cfg.out is not None:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(str(cfg.out))
    trained_on = images_of(saved_config(runs[0]), store)
    elsewhere = "" if trained_on in (None, store.images_sha256) else f"-{store.images_sha256[:8]}"
    name = f"{cfg.checkpoint}-{split}-{cfg.views}{elsewhere}{ending}"
    if len(runs) == 1:
        return folder / f"{kind}-{name}"
    digest = hashlib.sha256(" ".join(str(run.resolve()) for run in runs).encode()).hexdigest()[:6]
    fitted_name = "fitted-" if cfg.ensemble.weights == "search" else ""
    kind = "ensemble" if kind == "evaluation" else f"{kind}-ensemble"
    return folder / f"{kind}-{len(runs)}-{digest}-{fitted_name}{name}"


def _apart(path: Path, precision: str) -> Path:
    """Return ``path``, or, if it holds what was measured in another precision, a name that ends with this one."""
    try:
        other = json.loads(path.read_text())["precision"]
    except (OSError, ValueError, KeyError, TypeError):  # there is no such file, or none of use
        return path
    return path if other == precision else path.with_name(f"{path.stem}-{precision}{path.suffix}")
