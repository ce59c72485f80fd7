"""Benchmarks that run in separate processes: placement on two devices, and peak memory."""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from subprocess import run as run_process
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from alexnet_repro.benchmarks.step import random_batch, training_step
from alexnet_repro.data.batches import TrainImages
from alexnet_repro.data.sampler import EpochSampler
from alexnet_repro.data.split import Split, shard_name
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.placement import Link, crossing_bytes, keep_tower
from alexnet_repro.processes import cores
from alexnet_repro.training.trainer import fast_bfloat16, keep_freed_memory


def bench_placement(batch: int, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Time two processes, each with one tower and half of the cores, against one process with all.

    Raises AssertionError if the bytes sent between the processes differ from ``crossing_bytes``.
    """
    steps = max(repeats, 3)
    one: list[float] = []
    two: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "result.json"
        for turn in range(2):
            for processes, times in ((1, one), (2, two)):
                arguments = (processes, batch, steps, str(out), f"file://{temporary}/meeting-{turn}")
                if processes == 1:
                    _placed_steps(0, *arguments)
                else:
                    torch.multiprocessing.spawn(_placed_steps, arguments, nprocs=2)
                result = json.loads(out.read_text())
                times += result["seconds"]
    seconds = {"one": statistics.median(one), "two": statistics.median(two)}
    print(f"\n  sent by each device in a step of {batch} images   MB   share of step time")
    expected = crossing_bytes(AlexNet(), batch, result["element"])
    for layer, sent in result["bytes"].items():
        print(f"    {layer:<8} {sent / 1e6:>37.2f} {result['link_seconds'][layer] / sum(result['seconds']):>14.1%}")
        if sent != expected[layer]:
            raise AssertionError(f"{layer}: {sent} bytes sent, expected {expected[layer]}")
    ratios = {
        "two_process_efficiency": seconds["one"] / seconds["two"],
        "crossing_bytes_per_step": float(sum(expected.values())),
    }
    return ratios, {f"placement: {name} process(es)": batch / s for name, s in seconds.items()}


def _placed_steps(rank: int, processes: int, batch: int, steps: int, out: str, meeting: str) -> None:
    """Time training steps of the whole net, or of tower ``rank`` when ``processes`` is 2.

    Process 0 writes the result to ``out`` as JSON.
    """
    keep_freed_memory()
    precision = "bf16" if fast_bfloat16() else "fp32"
    torch.manual_seed(0)
    net, link = AlexNet(), None
    if processes == 2:
        torch.set_num_threads(max(1, cores() // 2))
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        link = Link(None, rank)
        keep_tower(net, link)
    net.to(memory_format=torch.channels_last)
    step = training_step(net.train(), *random_batch(batch, torch.device("cpu")), precision)
    step()
    if link:
        link.bytes.clear()
        link.seconds.clear()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        result: dict[str, Any] = {"seconds": seconds, "element": 2 if precision == "bf16" else 4}
        if link:
            result["bytes"] = {layer: sent // steps for layer, sent in link.bytes.items()}
            result["link_seconds"] = dict(link.seconds)
        Path(out).write_text(json.dumps(result))
    if link:
        dist.destroy_process_group()


def bench_memory(batch: int, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Measure peak memory of the net with and without LRN, and of reading a small and a large store.

    Each measurement runs in its own process, with trainer.keep_memory=false because retained freed memory counts as
    resident.
    """
    measured: dict[str, list[float]] = {"ours": [], "plain": [], "store 1": [], "store 10": []}
    for _ in range(repeats):
        for what, samples in measured.items():
            code = f"from alexnet_repro.benchmarks.processes import peak; print('peak', peak({what!r}, {batch}))"
            done = run_process([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            output = next(line for line in done.stdout.splitlines() if line.startswith("peak"))
            samples.append(float(output.split()[1]))
    peaks = {what: statistics.median(samples) for what, samples in measured.items()}
    ratios = {
        "memory_vs_plain": peaks["ours"] / peaks["plain"],
        "memory_store_10x": peaks["store 10"] / peaks["store 1"],
    }
    return ratios, {f"memory: {what}": peak for what, peak in peaks.items()}


def peak(what: str, batch: int) -> float:
    """Return the peak resident memory of this process in MB.

    The workload is two float32 training steps ("ours", "plain") or one epoch of reading a store ("store N", N x 1024
    images).
    """
    if what.startswith("store"):
        with tempfile.TemporaryDirectory() as temporary:
            split = _empty_split(Path(temporary), 1024 * int(what.split()[1]))
            images = TrainImages(split, 0, 224)
            highest = 0.0
            for part in EpochSampler(len(split), batch, 0, lambda: (0, 0)):
                images.__getitems__(part)
                highest = max(highest, _resident("RssAnon"))
            return highest
    net = AlexNet(lrn=what == "ours").to(memory_format=torch.channels_last)
    step = training_step(net.train(), *random_batch(batch, torch.device("cpu")), "fp32")
    step()
    step()
    return _resident("VmHWM")


def _resident(kind: str) -> float:
    """Return this process's memory in MB.

    VmHWM is the peak resident memory. RssAnon excludes pages shared with the page cache.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[kind].split()[0]) / 1024


def _empty_split(folder: Path, count: int) -> Split:
    shards = [1024] * (count // 1024)
    for number in range(len(shards)):
        np.save(folder / shard_name(number), np.zeros((1024, 256, 256, 3), np.uint8))
    np.save(folder / "labels.npy", np.zeros(count, np.int64))
    return Split(folder, shards, 256)
