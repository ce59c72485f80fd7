"""Benchmark loading and preparing images against torchvision and DALI."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from alexnet_repro.data import photos
from alexnet_repro.data.batches import TrainImages
from alexnet_repro.data.images import read_image
from alexnet_repro.data.loader import make_loader
from alexnet_repro.data.sampler import EpochSampler
from alexnet_repro.data.shard_writer import Example
from alexnet_repro.data.split import JoinedSplits
from alexnet_repro.data.store import Store
from alexnet_repro.data.store_writer import write_store
from alexnet_repro.processes import cores


def in_turns(things: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median run time of each function in seconds.

    The functions are called in turn, ``repeats`` times each, after one untimed call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in things}
    with tqdm(total=(repeats + 1) * len(things), delay=2, leave=False) as bar:
        for turn in range(repeats + 1):
            for name, thing in things.items():
                bar.set_description(name)
                began = time.perf_counter()
                thing()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
                bar.update()
    return {name: statistics.median(times) for name, times in seconds.items()}


def picture_store(folder: Path, per_class: int, encoding: str = "raw") -> Store:
    """Write a store of patches from scikit-image's photographs."""
    patches = photos.patches(per_class, 8, 256)
    return write_store([Example(*patch) for patch in patches], photos.PHOTOGRAPHS, folder, encoding=encoding)


def forget(folder: Path) -> None:
    """Remove the files of a folder from the page cache, where the system allows it."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench_loader(device: torch.device, batch: int, repeats: int) -> tuple[dict[str, float | None], dict[str, float]]:
    """Time loading of randomly cropped and mirrored uint8 batches.

    On one core: stores of raw values and of JPEGs, from the page cache and from the disk, torchvision's ImageFolder and,
    if installed, DALI on the CPU. With a loader process per core: both stores, from the page cache, to ``device``.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        splits = {name: picture_store(folder / name, 100, name).split("train") for name in ("raw", "jpeg")}
        split = splits["raw"]
        for i in range(len(split)):
            path = folder / "files" / str(split.labels[i]) / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split[i]).save(path, quality=90)
        transform = transforms.Compose(
            [transforms.RandomCrop(224), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
        )
        files = ImageFolder(str(folder / "files"), transform)

        def ours(name: str, cold: bool = False, workers: int = 0) -> Callable[[], object]:
            # each process has as much to do as one core
            joined = JoinedSplits([splits[name]] * max(1, workers))
            images, epochs = TrainImages(joined, 0, 224), count()
            sampler = EpochSampler(len(joined), batch, 0, lambda: (next(epochs), 0))
            loader = make_loader(images, batch, workers, device if workers else None, sampler=sampler)

            def epoch() -> None:
                if cold:
                    forget(folder / name)
                for _ in loader:
                    pass

            return epoch

        def imagefolder() -> None:
            for indices in torch.randperm(len(files)).split(batch):
                torch.stack([files[i][0] for i in indices.tolist()])

        processes = cores()
        to = f"{processes} processes" + (" to the GPU" if device.type == "cuda" else "")
        loaders: dict[str, Callable[[], object]] = {
            "one core: ours": ours("raw"),
            "one core: ours, JPEG": ours("jpeg"),
            "one core, from the disk: ours": ours("raw", cold=True),
            "one core, from the disk: ours, JPEG": ours("jpeg", cold=True),
            "one core: ImageFolder": imagefolder,
            f"{to}: ours": ours("raw", workers=processes),
            f"{to}: ours, JPEG": ours("jpeg", workers=processes),
        }
        if dali := dali_loader(folder / "files", batch):
            loaders["one core: DALI, CPU"] = dali
        seconds = in_turns(loaders, repeats)
    torch.set_num_threads(threads)
    images = {name: len(split) * (processes if name.startswith(to) else 1) for name in seconds}
    speed = {f"loader, {name}": images[name] / s for name, s in seconds.items()}
    raw, encoded = seconds["one core: ours"], seconds["one core: ours, JPEG"]
    dali_seconds = seconds.get("one core: DALI, CPU")
    ratios = {
        "loader_per_core": len(split) / raw,
        "loader_jpeg_per_core": len(split) / encoded,
        "loader_vs_imagefolder": seconds["one core: ImageFolder"] / raw,
        "loader_jpeg_vs_imagefolder": seconds["one core: ImageFolder"] / encoded,
        "loader_vs_dali": dali_seconds / raw if dali_seconds else None,
    }
    return ratios, speed


def dali_loader(folder: Path, batch: int) -> Callable[[], object] | None:
    """Return a function that runs one epoch of DALI's CPU pipeline on one thread, or None without DALI."""
    try:
        dali: Any = import_module("nvidia.dali")
        fn: Any = import_module("nvidia.dali.fn")
    except ImportError:
        return None

    @dali.pipeline_def(batch_size=batch, num_threads=1, device_id=None, seed=0)
    def pipeline() -> Any:
        jpegs, labels = fn.readers.file(file_root=str(folder), random_shuffle=True, name="files")
        images = fn.decoders.image(jpegs, device="cpu", output_type=dali.types.RGB)
        crop = {"crop_pos_x": fn.random.uniform(range=(0, 1)), "crop_pos_y": fn.random.uniform(range=(0, 1))}
        mirror = fn.random.coin_flip()
        return fn.crop_mirror_normalize(
            images, dtype=dali.types.UINT8, output_layout="HWC", crop=(224, 224), mirror=mirror, **crop
        ), labels

    pipe = pipeline()
    pipe.build()
    batches = -(-pipe.epoch_size("files") // batch)

    def epoch() -> None:
        for _ in range(batches):
            pipe.run()

    return epoch


def bench_prepare(repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Time reading and resizing full-size JPEGs with one thread and all threads, against torchvision."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = []
        for n, (_, _, _, read) in enumerate(photos.patches(20, 1, 512)):
            path = folder / f"{n:04d}.jpg"
            Image.fromarray(read()).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=95)
            files.append(path)
        rescale = transforms.Compose(
            [transforms.Resize(256, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(256)]
        )

        def ours(workers: int) -> Callable[[], object]:
            def read_all() -> None:
                with ThreadPoolExecutor(workers) as threads:
                    list(threads.map(lambda path: read_image(path.read_bytes, 256), files))

            return read_all

        def torchvision() -> None:
            for path in files:
                np.asarray(rescale(Image.open(path).convert("RGB")))

        threads = cores()
        seconds = in_turns({"one": ours(1), "all": ours(threads), "torchvision": torchvision}, repeats)
    ratios = {
        "prepare_all_cores": seconds["one"] / seconds["all"],
        "prepare_vs_torchvision": seconds["torchvision"] / seconds["one"],
    }
    names = {"one": "one thread", "all": f"{threads} threads", "torchvision": "torchvision, one thread"}
    return ratios, {f"prepare: {names[name]}": len(files) / s for name, s in seconds.items()}
