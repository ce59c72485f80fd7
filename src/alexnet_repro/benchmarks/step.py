"""Benchmark training steps, augmentation and evaluation in one process."""

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from alexnet_repro.benchmarks.loading import in_turns
from alexnet_repro.claims.scores import VIEWS
from alexnet_repro.data.batches import TrainBatch, ValBatch
from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.build import compiled
from alexnet_repro.training.classifier import Classifier
from alexnet_repro.training.optim import PaperSGD, parameter_groups
from alexnet_repro.training.trainer import fast_bfloat16

STEPS = 20  # training steps on a GPU that are timed together
COMPILED = ("paper", "paper, no_lrn")  # also measured with each trainer.compile, on a GPU
IMAGES = 90 * 1_281_167  # of 90 epochs of ILSVRC-2012
# Seconds per update of 128 images that an H100 needs at least in bfloat16, by arithmetic: 529 GFLOP at 300 TFLOP/s, and
# reading and writing weights, momenta and activations.
FLOOR = 0.0029
AS_RUN: dict[str, Any] = {"init": "as_run", "lrn_alpha": 2e-5, "layer1_order": "norm_pool_relu", "same_map_norm": True}


class TorchLRN(nn.Module):
    """Local response normalisation of each tower with torch.nn.LocalResponseNorm, as a baseline."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised responses, (N, C, H, W)."""
        return torch.cat([self.norm(tower) for tower in x.chunk(2, 1)], 1)


def plain_alexnet() -> AlexNet:
    """Return the paper's net with PyTorch's normalisation."""
    net = AlexNet()
    net.norm1, net.norm2 = TorchLRN(), TorchLRN()
    return net


def training_step(
    net: nn.Module, images: Tensor, labels: Tensor, precision: str, compile: str = "off"
) -> Callable[[], None]:
    """Return a function that runs training steps: forward, loss, backward, PaperSGD update.

    It runs one step on a CPU, and STEPS on a GPU, whose host runs ahead of it. compile: as trainer.compile.
    """
    optimizer = PaperSGD(parameter_groups(net, 1e-6, 0.0005, 1, True))
    device = images.device.type
    forward: Callable[[Tensor], Tensor] = net if compile == "off" else compiled(net, compile)
    numbers = count()

    def step() -> None:
        for _ in range(steps_per_call(images.device)):
            if isinstance(net, AlexNet):
                net.draw_dropout(0, next(numbers))
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                logits = forward(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def steps_per_call(device: torch.device) -> int:
    """Return how many training steps a call of ``training_step``'s function runs."""
    return STEPS if device.type == "cuda" else 1


def random_batch(images: int, device: torch.device, channels_last: bool = True) -> tuple[Tensor, Tensor]:
    """Return Gaussian images (images, 3, 224, 224) and labels (images,).

    The images have the standard deviation of natural images.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = 60 * torch.randn(images, 3, 224, 224, generator=generator)
    labels = torch.randint(1000, (images,), generator=generator)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return pixels.to(device, memory_format=memory_format), labels.to(device)


def bench_step(batch: int, repeats: int, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """Time training steps with and without LRN, against torchvision's AlexNet and PyTorch's LRN.

    On a GPU, also compiled and as CUDA graphs. bfloat16 is left out where the processor only emulates it.
    """
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
    gpu = device.type == "cuda"
    if gpu:  # as in training, see trainer.py
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
    fast = fast_bfloat16(gpu)
    if not fast:
        print("  without bfloat16, which this processor only emulates")
    for precision in ("bf16", "fp32") if fast else ("fp32",):
        steps = {}
        for name, (make, channels_last) in nets.items():
            modes = ("off", "default", "graphs") if gpu and precision == "bf16" and name in COMPILED else ("off",)
            for mode in modes:
                net = make().to(device)
                if channels_last:
                    net.to(memory_format=torch.channels_last)
                label = name if mode == "off" else f"{name}, compile={mode}"
                inputs = random_batch(batch, device, channels_last)
                steps[label] = training_step(net.train(), *inputs, precision, mode)
        seconds = {name: s / steps_per_call(device) for name, s in in_turns(steps, repeats).items()}
        speed |= {f"step {precision}: {name}": batch / s for name, s in seconds.items()}
        torchvision = min(s for name, s in seconds.items() if name.startswith("torchvision"))
        ratios[f"lrn_step_{precision}"] = seconds["paper, no_lrn"] / seconds["paper"]
        ratios[f"vs_torchvision_{precision}"] = torchvision / seconds["paper"]
        ratios[f"torch_lrn_step_{precision}"] = seconds["paper, no_lrn"] / seconds["paper with torch's LRN"]
        ratios[f"as_run_lrn_step_{precision}"] = seconds["as_run, no_lrn"] / seconds["as_run"]
        if gpu:
            ours = {name: s for name, s in seconds.items() if name.startswith("paper") and "torch" not in name}
            for name, s in ours.items():
                print(
                    f"  {precision}: {name}: {1000 * s:.2f} ms per update, {IMAGES / batch * s / 3600:.2f} h for 90 epochs"
                )
            if precision == "bf16" and batch == 128 and "H100" in torch.cuda.get_device_name():
                ratios["floor_share_bf16"] = FLOOR / min(s for name, s in ours.items() if "no_lrn" not in name)
        if precision == ("bf16" if fast else "fp32"):
            share = augmentation_seconds(batch, repeats, device) / seconds["paper"]
            ratios["augmentation_share_of_step"] = share
    return ratios, speed


def classifier() -> Classifier:
    """Return a Classifier with the printed recipe and a synthetic mean image and covariance."""
    mean, covariance = np.full((256, 256, 3), 120, np.float32), np.diag([1.0, 2.0, 3.0])
    return Classifier(schedule={"rule": "constant"}, epochs=1, mean=mean, covariance=covariance)


def augmentation_seconds(batch: int, repeats: int, device: torch.device) -> float:
    """Return the seconds for mean subtraction and colour noise of one batch (Sections 2 and 4.1)."""
    model = classifier().to(device)
    rng = np.random.default_rng(0)
    tops, lefts, mirror = (torch.from_numpy(rng.integers(0, n, batch)) for n in (33, 33, 2))
    noise = torch.randn(batch, 3)
    patches = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8)
    columns = (patches, torch.zeros(batch).long(), tops, lefts, mirror.bool(), noise, noise)
    train_batch = TrainBatch._make([*(column.to(device) for column in columns), 0, batch, 0])

    def augmentation() -> None:
        model.training_images(train_batch)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return in_turns({"augmentation": augmentation}, max(repeats, 9))["augmentation"]


def bench_eval(batch: int, repeats: int, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """Time ten crops per image against one view of ten times as many images.

    Both go from uint8 images to averaged probabilities.
    """
    model = classifier().to(device).eval()
    number = max(batch // 4, 16)
    images = ValBatch(
        torch.randint(0, 256, (number, 256, 256, 3), dtype=torch.uint8).to(device),
        torch.zeros(number).long().to(device),
    )
    repeated = ValBatch(images.images.repeat(10, 1, 1, 1), images.labels.repeat(10))

    def predict(val_batch: ValBatch, ten: bool) -> Callable[[], None]:
        def prediction() -> None:
            model.predicted_views = VIEWS[:2] if ten else VIEWS[:1]
            with (
                torch.inference_mode(),
                torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device.type == "cuda")),
            ):
                model.predict_step(val_batch, 0)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return prediction

    seconds = in_turns({"one view": predict(repeated, False), "ten crops": predict(images, True)}, repeats)
    ratio = {"ten_crop_efficiency": seconds["one view"] / seconds["ten crops"]}
    return ratio, {
        "eval: one view": 10 * number / seconds["one view"],
        "eval: ten crops": number / seconds["ten crops"],
    }
