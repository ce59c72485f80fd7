"""Benchmark speed and memory against plain baselines in the same run.

Ratios carry over between machines; seconds do not. Measurements alternate between the candidates, and their medians are
compared.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from alexnet_repro.benchmarks.loading import bench_loader, bench_prepare
from alexnet_repro.benchmarks.processes import bench_memory, bench_placement
from alexnet_repro.benchmarks.step import bench_eval, bench_step
from alexnet_repro.errors import UserError
from alexnet_repro.files import refuse_other_content, write_json
from alexnet_repro.provenance import machine
from alexnet_repro.training.trainer import keep_freed_memory


def bench(cfg: DictConfig) -> dict[str, Any]:
    """Run the benchmark ``cfg.only``, or all of them, print the results and write them to ``cfg.out``.

    Raises UserError if ``cfg.out`` cannot be written, or is a file that no earlier benchmark wrote.
    """
    out = Path(str(cfg.out)) if cfg.out else None
    if out:
        if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
            raise UserError(f"out={out} cannot be written", "choose a file in a folder that exists")
        refuse_other_content(out, b'"ratios"', "benchmark", "choose another one with out=FILE")
    device = torch.device("cuda" if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    batch, repeats = cfg.batch_size, cfg.repeats
    parts: dict[str, Callable[[], Any]] = {
        "step": lambda: bench_step(batch, repeats, device),
        "loader": lambda: bench_loader(device, batch, repeats),
        "eval": lambda: bench_eval(batch, repeats, device),
        "placement": lambda: bench_placement(batch, repeats),
        "memory": lambda: bench_memory(batch, min(repeats, 3)),
        "prepare": lambda: bench_prepare(repeats),
    }
    ratios: dict[str, float | None] = {}
    speed: dict[str, float] = {}
    for name in [cfg.only] if cfg.only else parts:
        if device.type == "cuda" and name in ("placement", "memory"):
            print(f"{name} is measured on a CPU: trainer.accelerator=cpu only={name}")
            continue
        print(f"measuring {name} ...", flush=True)
        if name in ("step", "eval"):
            keep_freed_memory()  # trainer.keep_memory=true, for the baselines too
        part_ratios, part_speed = parts[name]()
        ratios |= part_ratios
        speed |= part_speed
    memory = {name: speed.pop(name) for name in list(speed) if name.startswith("memory")}
    result = {**machine(device), "batch_size": batch, "repeats": repeats, "ratios": ratios, "images_per_s": speed}
    result |= {"megabytes": memory} if memory else {}
    width = max(map(len, [*speed, *memory, *ratios]))
    print()
    for unit, table in (("images/s", speed), ("MB", memory)):
        for name, value in table.items():
            print(f"  {name:<{width}}  {value:>10.1f} {unit}")
    print()
    for name, ratio in ratios.items():
        print(f"  {name:<{width}}  {'not installed' if ratio is None else f'{ratio:>10.3f}'}")
    if out:
        write_json(out, result)
    return result
