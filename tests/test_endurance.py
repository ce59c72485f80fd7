"""Kill runs, damage files and mutate images at random, and print how many of these were survived.

A few by default; as many as asked with

    pytest -m endurance --kills 100 --images 10000 --damages 500 --minutes 30
"""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIGURES, SMALL, picture
from PIL import Image

from alexnet_repro.data.images import read_image
from alexnet_repro.data.store import Store
from alexnet_repro.errors import UserError
from alexnet_repro.training.checkpoints import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.endurance]
EPOCHS = 60


def started(store: Path, run: Path, *options: str, epochs: int = EPOCHS) -> "subprocess.Popen[bytes]":
    line = [sys.executable, "-m", "alexnet_repro.train", *SMALL, f"epochs={epochs}", f"data.store={store}"]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*line, f"run={run}", "resume=true", *options], env=one, **quiet)  # type: ignore[call-overload, no-any-return]


def last(run: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return weights


def history(run: Path) -> object:
    return json.loads((run / "result.json").read_text())["history"]


def test_killed_runs_end_like_the_uninterrupted_one(
    cwd: Path, tiny_store: Path, request: pytest.FixtureRequest
) -> None:
    kills, rng = request.config.getoption("--kills"), random.Random(0)
    start = time.monotonic()
    assert started(tiny_store, cwd / "whole").wait() == 0
    usual = time.monotonic() - start
    done = runs = 0
    while done < kills:
        run, runs = cwd / f"run-{runs}", runs + 1
        for _ in range(min(rng.randint(1, 8), kills - done)):  # this many kills of one run
            process = started(tiny_store, run, "trainer.checkpoint_minutes=0.001")
            try:
                process.wait(rng.uniform(0.3, 1) * usual)
                break  # finished
            except subprocess.TimeoutExpired:
                process.send_signal(rng.choice((2, 9, 9, 15)))
                process.wait()
                done += 1
        if not (run / "result.json").exists():
            assert started(tiny_store, run).wait() == 0
        assert history(run) == history(cwd / "whole")
        ours = last(run)
        for name, value in last(cwd / "whole").items():
            assert torch.equal(ours[name], value), (run, name)
        steps = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
        assert len({tuple(line) for line in steps}) == len(steps)
        names = {path.name for path in run.iterdir()} - {"lock"}  # left by a process that was killed at its very end
        assert names == {path.name for path in (cwd / "whole").iterdir()}
        shutil.rmtree(run)
    FIGURES.append(
        f"{runs} runs, killed {done} times at random moments: all ended bit for bit like the uninterrupted one"
    )


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return a file with flipped, cut, repeated or overwritten bytes."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.randrange(min(len(content), rng.choice((64, 1000, len(content)))))
        kind = rng.randrange(5)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at : at + rng.randrange(1, 9)] = rng.randbytes(4)
        elif kind == 2:
            del content[at : at + rng.randrange(1, 200)]
        elif kind == 3:
            content[at:at] = content[at : at + rng.randrange(1, 200)]
        else:
            content = content[: max(at, 8)]
        if len(content) < 8:
            break
    return bytes(content)


def test_mutated_images_are_read_or_refused(request: pytest.FixtureRequest) -> None:
    images, rng = request.config.getoption("--images"), random.Random(1)
    whole = []
    for form, options in (
        ("JPEG", {"quality": 90}), ("JPEG", {"progressive": True}), ("PNG", {}), ("BMP", {}), ("GIF", {}), ("WEBP", {}),
        ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"}), ("PPM", {}), ("JPEG2000", {}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        Image.fromarray(picture(len(whole), 90, 70)).save(buffer, form, **options)  # type: ignore[arg-type]
        whole.append(buffer.getvalue())
    outcomes: Counter[str] = Counter()
    for i in range(images):
        data = mutated(whole[i % len(whole)], rng)
        start = time.monotonic()
        try:
            image = read_image(lambda data=data: data, 64)  # type: ignore[misc]
            assert image.shape == (64, 64, 3)
            assert image.dtype == np.uint8
            outcomes["read"] += 1
        except (OSError, ValueError):
            outcomes["refused"] += 1
        assert time.monotonic() - start < 10
    FIGURES.append(
        f"{images} mutated images: {outcomes['read']} read, {outcomes['refused']} refused, none crashed or hung"
    )


def test_damaged_files_are_named(cwd: Path, tiny_store: Path, finished: Path, request: pytest.FixtureRequest) -> None:
    damages, rng = request.config.getoption("--damages"), random.Random(2)
    checkpoint = (finished / "checkpoints/last.ckpt").read_bytes()
    weights = last(finished)
    outcomes: Counter[str] = Counter()
    for i in range(damages):
        if i % 2:
            path = cwd / "last.ckpt"
            path.write_bytes(mutated(checkpoint, rng) if i % 4 == 1 else flipped(checkpoint, rng))
            try:
                found = load_checkpoint(path)["state_dict"]
                assert all(torch.equal(found[name], value) for name, value in weights.items())
                outcomes["checkpoints harmless"] += 1  # bytes that hold no value, such as padding
            except UserError:
                outcomes["checkpoints named"] += 1
        else:
            store = cwd / "store"
            shutil.rmtree(store, ignore_errors=True)
            shutil.copytree(tiny_store, store)
            file = rng.choice(sorted(path for path in store.rglob("*") if path.is_file()))
            file.write_bytes(flipped(file.read_bytes(), rng))
            try:
                opened = Store(store)
                assert np.array_equal(opened.mean, Store(tiny_store).mean)
                for split in ("train", "val"):
                    ours, theirs = opened.split(split), Store(tiny_store).split(split)
                    assert np.array_equal(ours.labels, theirs.labels)
                    assert all(np.array_equal(ours[k], theirs[k]) for k in range(len(theirs)))
                outcomes["stores harmless"] += 1  # such as the header of an array
            except UserError:
                outcomes["stores named"] += 1
    FIGURES.append(
        f"{damages} damaged files: " + ", ".join(f"{count} {kind}" for kind, count in sorted(outcomes.items()))
    )


def flipped(data: bytes, rng: random.Random) -> bytes:
    content = bytearray(data)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def test_four_runs_at_once_share_a_store_and_memory_is_flat(
    cwd: Path,
    tiny_store: Path,
    request: pytest.FixtureRequest,
) -> None:
    minutes = request.config.getoption("--minutes")
    processes = [started(tiny_store, cwd / str(seed), f"seed={seed}") for seed in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    alone = cwd / "alone"
    assert started(tiny_store, alone, "seed=3").wait() == 0
    assert history(alone) == history(cwd / "3")
    FIGURES.append("4 runs at once on one store: each equal to the same run alone")
    if not minutes:
        return
    process = started(tiny_store, cwd / "long", epochs=10**6)
    sizes: list[tuple[float, float]] = []
    begin = time.monotonic()
    while (passed := time.monotonic() - begin) < 60 * minutes:
        time.sleep(5)
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        if passed > 60:  # after the first epochs
            sizes.append((passed / 60, pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
    process.terminate()
    process.wait()
    epochs = len(torch.load(cwd / "long/checkpoints/last.ckpt", weights_only=True)["history"])
    slope = np.polyfit(*np.array(sizes).T, 1)[0]
    FIGURES.append(f"{minutes} minutes of training ({epochs} epochs): memory grows by {slope:.3f} MB a minute")
    assert slope < 1
