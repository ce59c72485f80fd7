"""Train a net with one of the recipes, measure it, and compare it with the paper."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from alexnet_repro.claims.paper import claim_of
from alexnet_repro.claims.scores import VIEWS, errors, save_scores
from alexnet_repro.claims.screen import table
from alexnet_repro.command_line import in_quotes
from alexnet_repro.composition import task_overrides
from alexnet_repro.data.module import StoreData
from alexnet_repro.data.store import Store
from alexnet_repro.errors import Interrupted
from alexnet_repro.files import write_json
from alexnet_repro.net.colour import colour_content
from alexnet_repro.processes import rank
from alexnet_repro.sweep import sweeping
from alexnet_repro.training.checkpoints import load_checkpoint, newest, refuse_other_run
from alexnet_repro.training.classifier import Classifier
from alexnet_repro.training.launcher import meet, ran_in_processes, world
from alexnet_repro.training.measurement import circumstances, measure, measure_training_sample
from alexnet_repro.training.passed_on import other_loggers, own_callbacks, trainer_options
from alexnet_repro.training.plan import default_run
from alexnet_repro.training.run_folder import (
    abandon,
    choices,
    csv_logger,
    done_before,
    open_run,
    refuse_taken,
    remove_if_empty,
    wait_for,
)
from alexnet_repro.training.saving import KeepBest, KeepEpochs, KeepLast
from alexnet_repro.training.setup import check, joining_epoch, new_classifier, open_store, part_per_class
from alexnet_repro.training.trainer import make_trainer, on_gpu
from alexnet_repro.training.transfer import in_result, start_from_pretrained
from alexnet_repro.training.wandb_run import finish_wandb, wandb_logger
from alexnet_repro.training.watch import Watchman


def train(cfg: DictConfig) -> dict[str, Any]:
    """Start or resume one run in its folder, and return the content of its result.json.

    Raises UserError for options, stores or folders that cannot be used, and Interrupted if a signal stops the run,
    after saving it.
    """
    check(cfg)
    store = open_store(cfg)
    if cfg.run is None:
        cfg.run = str(default_run(cfg))
    run = Path(str(cfg.run))
    # a repeated sweep does only the remaining runs
    if (sweeping() or cfg.resume) and (done := done_before(run, cfg, store)):
        print(f"{run} is finished already")
        return done
    if rank() == 0:
        refuse_taken(run, cfg, store)
    if ran_in_processes(cfg, "train", [*task_overrides(), f"run={in_quotes(str(run))}"]):
        return json.loads((run / "result.json").read_text())
    L.seed_everything(cfg.seed, verbose=False)
    model = new_classifier(cfg, store)
    start_from_pretrained(cfg, model, run)
    meet(cfg, on_gpu(cfg))
    measuring = make_trainer(cfg, run)
    if rank() > 0:
        wait_for(run)
        return work(cfg, run, store, model, measuring)
    lock = open_run(run, cfg, store)  # after all user input has been validated
    try:
        return work(cfg, run, store, model, measuring)
    except BaseException:
        abandon(run)
        raise
    finally:
        lock.release()
        remove_if_empty(run)


def work(cfg: DictConfig, run: Path, store: Store, model: Classifier, measuring: L.Trainer) -> dict[str, Any]:
    """Train and measure in the run's folder, which this process or process 0 has locked.

    Raises UserError if the checkpoint cannot be resumed, and Interrupted if a signal stops the run.
    """
    checkpoints, last = run / "checkpoints", newest(run)
    steps_done, epochs = 0, cfg.epochs
    if last:
        checkpoint = load_checkpoint(last, to_resume=True)
        refuse_other_run(last, checkpoint, model, store.images_sha256)
        steps_done, history = checkpoint["global_step"], checkpoint["history"]
        if cfg.stop_at is not None and history and history[-1]["train_error"] < cfg.stop_at:
            epochs = history[-1]["epoch"]  # it stopped there, but was not measured
        del checkpoint
    loggers: list[Logger] = [csv_logger(run, steps_done)]
    if cfg.logger.get("wandb") and rank() == 0:
        loggers.append(wandb_logger(cfg, run, ablation_of(cfg)))
    loggers += other_loggers(cfg, run)
    keep_last = KeepLast(checkpoints / "last.ckpt", cfg.trainer.checkpoint_minutes)
    watchman = Watchman(cfg.watch.plateau_steps, cfg.watch.every)
    callbacks: list[Callback] = [watchman, *own_callbacks(cfg), KeepEpochs(checkpoints, cfg.keep_epochs)]
    if store.watched_split == "val" and joining_epoch(cfg) is None:  # test images never select a checkpoint
        callbacks.append(
            KeepBest(
                checkpoints,
                "best",
                "val/top1_error",
                mode="min",
                save_weights_only=True,
                enable_version_counter=False,
                save_on_train_epoch_end=True,  # after the epoch is in the history
            )
        )
    callbacks.append(keep_last)  # after KeepBest, so that last.ckpt knows the best error
    if cfg.stop_at is not None:
        callbacks.append(
            EarlyStopping(
                "train/top1_error", stopping_threshold=cfg.stop_at, patience=cfg.epochs, check_on_train_epoch_end=True
            )
        )
    trainer = make_trainer(
        cfg,
        run,
        max_epochs=epochs,
        logger=loggers,
        callbacks=callbacks,
        enable_checkpointing=True,
        **trainer_options(cfg),
        reload_dataloaders_every_n_epochs=1 if joining_epoch(cfg) else 0,  # the training images change when val joins
    )
    patches = {key: cfg.augment[key] for key in ("crop", "random_crops", "mirror", "share")}
    data = StoreData(
        store,
        cfg.batch_size,
        cfg.seed,
        patches,
        cfg.trainer.workers,
        order=cfg.order,
        images_per_file=cfg.data.get("images_per_file"),
        val_joins_after=joining_epoch(cfg),
        train_per_class=part_per_class(cfg),
    )
    parameters = sum(p.numel() for p in model.net.parameters())
    splits = {"train": "training", store.watched_split: store.watched_split, store.measured_split: store.measured_split}
    counts = {split: len(store.split(split)) for split in splits} | {"train": len(data.train_images())}
    images = ", ".join(f"{counts[split]:,} {word}" for split, word in splits.items())
    print(
        f"recipe={cfg.recipe} ablation={ablation_of(cfg)} data={cfg.data.name}: {parameters:,} parameters, "
        f"{images} images, "
        f"{world(cfg)} x {trainer.strategy.root_device.type} {trainer.precision}\n{'resuming' if last else 'writing'} {run}"
    )
    if cfg.data.source == "embedded":
        print("data=photos sets its own epochs, batch size, learning rate and schedule: conf/data/photos.yaml")
    if cfg.trainer.compile != "off":
        model.compile_training(cfg.trainer.compile)
    if trainer.precision == "64-true":
        model.double()  # otherwise Lightning would load the checkpoint as float32, and round it
    try:
        trainer.fit(model, data, ckpt_path=last, weights_only=True)
        seconds = keep_last.seconds  # without the time that measuring takes
        store.refuse_changes()
        scores = measure(measuring, model, data, VIEWS if cfg.recipe == "cuda_convnet" else VIEWS[:2])
        measured = {view: errors(of_view) for view, of_view in scores.items()}
        train_sample = measure_training_sample(measuring, model, data)
        final = {f"{view}/{name}": error for view, of_view in measured.items() for name, error in of_view.items()}
        kernels = load_checkpoint(keep_last.path)["state_dict"].get("net.conv1.weight")
        if kernels is not None and (kernels.ndim != 4 or kernels.shape[1] != 3):  # a net of one's own
            kernels = None
        colour = [] if kernels is None else colour_content(kernels, cfg.net.get("towers", 1))
        final |= {f"colour_content/tower{tower}": share for tower, share in enumerate(colour)}
        for logger in loggers[1:]:
            logger.log_metrics(final)
    except (KeyboardInterrupt, SystemExit):
        if trainer.state.finished:
            raise Interrupted(f"{run} is trained; the same command with resume=true measures it") from None
        raise
    finally:
        finish_wandb(loggers)
    result = {
        "claim": claim_of(cfg),
        **in_result(cfg, model),
        "ablation": ablation_of(cfg),
        "recipe": cfg.recipe,
        **choices(task_overrides()),
        "scale": cfg.scale,
        "data": store.manifest.get("name", cfg.data.name),  # what the images are, whatever the command line says
        # the name only: the path differs between machines
        "source": Path(store.manifest["source"]).name if store.manifest.get("source") else None,
        "net": cfg.net.name,
        "activation": cfg.net.get("activation", ""),
        "lrn": cfg.net.get("lrn", False),
        "seed": cfg.seed,
        "lr": cfg.optim.lr,
        "batch_size": cfg.batch_size,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "left_plateau": watchman.left_plateau,
        "of_epochs": cfg.schedule.by_hand.of_epochs if cfg.schedule.rule == "by_hand" else None,
        "split": data.predict_split,
        "images": len(scores["centre"]),
        "train_images": counts["train"],
        "classes": len(store.classes),
        "held_out": store.manifest.get("held_out") or None,
        "images_sha256": store.images_sha256,
        **measured,
        "train_sample": train_sample,
        "parameters": parameters,
        "colour_content": [round(share, 4) for share in colour],  # of the first layer's kernels, by tower (Figure 3)
        "seconds": round(seconds, 1),
        "placement": cfg.placement.name,
        "compile": cfg.trainer.compile,
        **circumstances(trainer),
        "hardware": ", then ".join(keep_last.hardware),
        "trained_with": keep_last.versions,  # more than one if the run was resumed with other versions
        "history": [
            {key if store.has("val") else key.replace("val", "test"): value for key, value in epoch.items()}
            for epoch in model.history
        ],
    }
    if trainer.is_global_zero:
        save_scores(run / "predictions.npz", scores, kernels)
        write_json(run / "result.json", result)
    print(table(result))
    print(f"finished after {result['seconds']:.0f} seconds; results and checkpoints are in {run}")
    return result


def ablation_of(cfg: DictConfig) -> str:
    """Return the names of a run's ablations, joined by +, or 'none'."""
    return "+".join(cfg.ablation) or "none"
