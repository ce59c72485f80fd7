"""How fast it is, beside plain baselines measured in the same run: ratios travel between machines, seconds don't.

python -m alexnet_repro.bench [only=step|loader|eval|placement|memory|prepare] [out=FILE.json]

Everything is repeated in turns (one of each, then again), and medians are compared.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import run as run_process
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from alexnet_repro.bench_data import bench_loader, bench_prepare, in_turns
from alexnet_repro.classifier import Classifier
from alexnet_repro.cli import UserError, command
from alexnet_repro.data import EpochSampler, TrainBatch, TrainImages, ValBatch
from alexnet_repro.net import AlexNet
from alexnet_repro.optim import PaperSGD, parameter_groups
from alexnet_repro.placement import Link, crossing_bytes, keep_tower
from alexnet_repro.runs import machine
from alexnet_repro.trainers import fast_bfloat16, keep_freed_memory

PARTS = ("prepare", "loader", "step", "eval", "placement", "memory")
AS_RUN: dict[str, Any] = {"init": "as_run", "lrn_alpha": 2e-5, "layer1_order": "norm_pool_relu", "same_map_norm": True}


class TorchLRN(nn.Module):
    """torch.nn.LocalResponseNorm inside each tower: what one would write first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        return torch.cat([self.norm(tower) for tower in x.chunk(2, 1)], 1)


def plain_alexnet() -> AlexNet:
    """The paper's net with torch's own normalisation."""
    net = AlexNet()
    net.norm = TorchLRN()
    return net


def training_step(net: nn.Module, images: Tensor, labels: Tensor, precision: str) -> Callable[[], None]:
    """One update as a function: forward, loss, backward, PaperSGD."""
    optimizer = PaperSGD(parameter_groups(net, 1e-6, 0.0005, 1, True))
    device = images.device.type

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits = net(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def random_batch(count: int, device: torch.device, channels_last: bool = True) -> tuple[Tensor, Tensor]:
    """Noise with the deviation of natural images, and labels."""
    generator = torch.Generator().manual_seed(0)
    images = 60 * torch.randn(count, 3, 224, 224, generator=generator)
    labels = torch.randint(1000, (count,), generator=generator)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(device, memory_format=memory_format), labels.to(device)


def bench_step(batch: int, repeats: int, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """Training steps: with and without normalisation, beside torchvision's alexnet and torch's own normalisation."""
    ratios: dict[str, float] = {}
    speed: dict[str, float] = {}
    nets: dict[str, tuple[Callable[[], nn.Module], bool]] = {
        "paper": (AlexNet, True),
        "paper, no_lrn": (lambda: AlexNet(lrn=False), True),
        "as_run": (lambda: AlexNet(**AS_RUN), True),
        "as_run, no_lrn": (lambda: AlexNet(**AS_RUN | {"lrn": False}), True),
        "paper with torch's LRN": (plain_alexnet, True),
        "torchvision alexnet, channels last": (models.alexnet, True),
        "torchvision alexnet": (models.alexnet, False),
    }
    for precision in ("bf16", "fp32"):
        steps = {}
        for name, (make, channels_last) in nets.items():
            if precision == "fp32" and name.startswith("as_run"):
                continue
            net = make().to(device)
            if channels_last:
                net.to(memory_format=torch.channels_last)
            steps[name] = training_step(net.train(), *random_batch(batch, device, channels_last), precision)
        seconds = in_turns(steps, repeats)
        speed |= {f"step {precision}: {name}": batch / s for name, s in seconds.items()}
        torchvision = min(s for name, s in seconds.items() if name.startswith("torchvision"))
        ratios[f"lrn_step_{precision}"] = seconds["paper, no_lrn"] / seconds["paper"]
        ratios[f"vs_torchvision_{precision}"] = torchvision / seconds["paper"]
        ratios[f"torch_lrn_step_{precision}"] = seconds["paper, no_lrn"] / seconds["paper with torch's LRN"]
        if precision == "bf16":
            ratios["as_run_lrn_step_bf16"] = seconds["as_run, no_lrn"] / seconds["as_run"]
        if precision == ("bf16" if fast_bfloat16() else "fp32"):
            share = augmentation_seconds(batch, repeats, device) / seconds["paper"]
            ratios["augmentation_share_of_step"] = share
    return ratios, speed


def classifier() -> Classifier:
    """The printed recipe's module with a made-up mean image and covariance."""
    augment = {"crop": 224, "mean": "patch", "colour_noise": 0.1, "colour_unit": "eigenvalue", "colour_divisor": 1}
    augment |= {"colour_noise_epochs": None, "jitter": 0}
    return Classifier(
        {"name": "alexnet", "classes": 1000},
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0005, "bias_rate": 1, "bias_decay": True},
        {"rule": "constant", "by_hand": {"of_epochs": 1}},
        augment,
        1,
        256,
        [str(i) for i in range(1000)],
        0,
        np.full((256, 256, 3), 120, np.float32),
        np.diag([1.0, 2.0, 3.0]),
    )


def augmentation_seconds(batch: int, repeats: int, device: torch.device) -> float:
    """Mean subtraction and colour noise of a batch, on the training device (Sections 2 and 4.1)."""
    model = classifier().to(device)
    rng = np.random.default_rng(0)
    tops, lefts, mirror = (torch.from_numpy(rng.integers(0, n, batch)) for n in (33, 33, 2))
    drawn = torch.randn(batch, 3)
    patches = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8)
    columns = (patches, torch.zeros(batch).long(), tops, lefts, mirror.bool(), drawn, drawn)
    one = TrainBatch._make([*(column.to(device) for column in columns), 0, batch])

    def augmentation() -> None:
        model.training_images(one)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return in_turns({"augmentation": augmentation}, max(repeats, 9))["augmentation"]


def bench_eval(batch: int, repeats: int, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """Ten crops against ten times one view, from uint8 images to averaged probabilities."""
    model = classifier().to(device).eval()
    count = max(batch // 4, 16)
    images = ValBatch(
        torch.randint(0, 256, (count, 256, 256, 3), dtype=torch.uint8).to(device), torch.zeros(count).long().to(device)
    )
    tens = ValBatch(images.images.repeat(10, 1, 1, 1), images.labels.repeat(10))

    def predict(of: ValBatch, ten: bool) -> Callable[[], None]:
        def prediction() -> None:
            model.predicts_ten_crops = ten
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16()):
                model.predict_step(of, 0)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return prediction

    seconds = in_turns({"one view": predict(tens, False), "ten crops": predict(images, True)}, repeats)
    ratio = {"ten_crop_efficiency": seconds["one view"] / seconds["ten crops"]}
    return ratio, {"eval: one view": 10 * count / seconds["one view"], "eval: ten crops": count / seconds["ten crops"]}


def bench_placement(batch: int, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Two processes of one tower and one thread each, against one process with two threads; and what crosses."""
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
    print(f"\n  what crosses in a step of {batch} images (each device sends)   MB   share of the step's time")
    expected = crossing_bytes(AlexNet(), batch, result["element"])
    for layer, sent in result["bytes"].items():
        print(f"    {layer:<8} {sent / 1e6:>52.2f} {result['link_seconds'][layer] / sum(result['seconds']):>14.1%}")
        if sent != expected[layer]:
            raise AssertionError(f"{layer}: {sent} bytes crossed, by arithmetic {expected[layer]}")
    ratios = {
        "two_process_efficiency": seconds["one"] / seconds["two"],
        "crossing_bytes_per_step": float(sum(expected.values())),
    }
    return ratios, {f"placement: {name} process(es)": batch / s for name, s in seconds.items()}


def _placed_steps(rank: int, processes: int, batch: int, steps: int, out: str, meeting: str) -> None:
    """Times of training steps in this process, one of two towers or the whole net; written by process 0."""
    keep_freed_memory()
    precision = "bf16" if fast_bfloat16() else "fp32"
    torch.manual_seed(0)
    net, link = AlexNet(), None
    if processes == 2:
        torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
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
    """Peak resident memory, each in processes of its own: ours and the plain net without LRN; a store and one of ten times.

    With trainer.keep_memory=false: kept, freed memory counts as resident.
    """
    measured: dict[str, list[float]] = {"ours": [], "plain": [], "store 1": [], "store 10": []}
    for _ in range(repeats):
        for what, peaks_of in measured.items():
            code = f"from alexnet_repro.bench import peak; print('peak', peak({what!r}, {batch}))"
            done = run_process([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            said = next(line for line in done.stdout.splitlines() if line.startswith("peak"))
            peaks_of.append(float(said.split()[1]))
    peaks = {what: statistics.median(peaks_of) for what, peaks_of in measured.items()}
    ratios = {
        "memory_vs_plain": peaks["ours"] / peaks["plain"],
        "memory_store_10x": peaks["store 10"] / peaks["store 1"],
    }
    return ratios, {f"memory: {what}": peak for what, peak in peaks.items()}


def peak(what: str, batch: int) -> float:
    """Peak resident megabytes of this process after doing it: two training steps in float32, or reading a store."""
    if what.startswith("store"):
        with tempfile.TemporaryDirectory() as temporary:
            split = _empty_split(Path(temporary), 1024 * int(what.split()[1]))
            images = TrainImages(split, 0, 224)
            most = 0.0
            for part in EpochSampler(len(split), batch, 0, lambda: 0):
                images.__getitems__(part)
                most = max(most, _resident("RssAnon"))
            return most
    net = AlexNet(lrn=what == "ours").to(memory_format=torch.channels_last)
    step = training_step(net.train(), *random_batch(batch, torch.device("cpu")), "fp32")
    step()
    step()
    return _resident("VmHWM")


def _resident(kind: str) -> float:
    """Megabytes of this process in memory: VmHWM, the most so far; RssAnon, without what the page cache shares."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[kind].split()[0]) / 1024


def _empty_split(folder: Path, count: int) -> Any:
    from alexnet_repro.store import Split, shard_name

    shards = [1024] * (count // 1024)
    for number in range(len(shards)):
        np.save(folder / shard_name(number), np.zeros((1024, 256, 256, 3), np.uint8))
    np.save(folder / "labels.npy", np.zeros(count, np.int64))
    return Split(folder, shards, 256)


def bench(cfg: DictConfig) -> dict[str, Any]:
    """Measure what ``cfg.only`` names, print one table, and write it to ``cfg.out``."""
    if cfg.only is not None and cfg.only not in PARTS:
        raise UserError(f"there is no only={cfg.only}", f"there are: {', '.join(PARTS)}")
    device = torch.device("cuda" if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    batch, repeats = cfg.batch_size, cfg.repeats
    parts: dict[str, Callable[[], Any]] = {
        "step": lambda: bench_step(batch, repeats, device),
        "loader": lambda: bench_loader(batch, repeats),
        "eval": lambda: bench_eval(batch, repeats, device),
        "placement": lambda: bench_placement(batch, repeats),
        "memory": lambda: bench_memory(batch, min(repeats, 3)),
        "prepare": lambda: bench_prepare(repeats),
    }
    ratios: dict[str, float | None] = {}
    speed: dict[str, float] = {}
    for name in [cfg.only] if cfg.only else PARTS:
        print(f"measuring {name} ...", flush=True)
        if name in ("step", "eval"):
            keep_freed_memory()  # trainer.keep_memory=true; for the baselines, too
        more, faster = parts[name]()
        ratios |= more
        speed |= faster
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
    if cfg.out:
        Path(str(cfg.out)).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    command("bench")
