"""Benchmark loading and preparing images against torchvision and DALI."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from alexnet_repro.data import photos
from alexnet_repro.data.images import read_image
from alexnet_repro.data.module import EpochSampler, TrainImages
from alexnet_repro.data.store import Store
from alexnet_repro.data.store_writer import Example, write_store


def in_turns(things: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median run time of each function in seconds.

    The functions are called in turn, ``repeats`` times each, after one untimed call.
    """
    for thing in things.values():
        thing()
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(repeats):
        for name, thing in things.items():
            began = time.perf_counter()
            thing()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def picture_store(folder: Path, per_class: int) -> Store:
    """Write a store of patches from scikit-image's photographs."""
    patches = photos.patches(per_class, 8, 256)
    return write_store([Example(*patch) for patch in patches], photos.PHOTOGRAPHS, folder)


def bench_loader(batch: int, repeats: int) -> tuple[dict[str, float | None], dict[str, float]]:
    """Time loading of randomly cropped and mirrored uint8 batches on one core.

    Compares our loader with torchvision's ImageFolder and, if installed, DALI on the CPU.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        split = picture_store(folder / "store", 100).split("train")
        for i in range(len(split)):
            path = folder / "jpeg" / str(split.labels[i]) / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split[i]).save(path, quality=90)
        images = TrainImages(split, 0, 224)
        transform = transforms.Compose(
            [transforms.RandomCrop(224), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
        )
        files = ImageFolder(str(folder / "jpeg"), transform)
        epoch = 0

        def ours() -> None:
            nonlocal epoch
            for part in EpochSampler(len(split), batch, 0, lambda: epoch * -(-len(split) // batch)):
                images.__getitems__(part)
            epoch += 1

        def imagefolder() -> None:
            for indices in torch.randperm(len(files)).split(batch):
                torch.stack([files[i][0] for i in indices.tolist()])

        loaders: dict[str, Callable[[], object]] = {"ours": ours, "ImageFolder": imagefolder}
        if dali := dali_loader(folder / "jpeg", batch):
            loaders["DALI, CPU"] = dali
        seconds = in_turns(loaders, repeats)
    torch.set_num_threads(threads)
    speed = {f"loader, one core: {name}": len(split) / s for name, s in seconds.items()}
    ratios = {
        "loader_per_core": len(split) / seconds["ours"],
        "loader_vs_imagefolder": seconds["ImageFolder"] / seconds["ours"],
        "loader_vs_dali": seconds["DALI, CPU"] / seconds["ours"] if "DALI, CPU" in seconds else None,
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

        cores = os.cpu_count() or 1
        seconds = in_turns({"one": ours(1), "all": ours(cores), "torchvision": torchvision}, repeats)
    ratios = {
        "prepare_all_cores": seconds["one"] / seconds["all"],
        "prepare_vs_torchvision": seconds["torchvision"] / seconds["one"],
    }
    names = {"one": "one thread", "all": f"{cores} threads", "torchvision": "torchvision, one thread"}
    return ratios, {f"prepare: {names[name]}": len(files) / s for name, s in seconds.items()}
