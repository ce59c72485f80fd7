"""Draw the figures of the paper."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from alexnet_repro.net.alexnet import AlexNet
from alexnet_repro.net.layers import GroupedLinear
from alexnet_repro.net.placement import crossing_bytes
from alexnet_repro.page.plots import COLOURS, INK, MUTED, drawing

RIGHT, WRONG = COLOURS[2], COLOURS[5]


def figure_1(results: Sequence[dict[str, Any]]) -> Figure:
    """Draw the training error by epoch with ReLUs (solid) and tanh (dashed).

    Each net has a panel, and each seed has a line.
    """
    nets = sorted({result["net"] for result in results})
    last = max(result["history"][-1]["epoch"] for result in results)
    with drawing(7, 3.4) as figure:
        for number, net in enumerate(nets):
            axes = figure.add_subplot(1, len(nets), number + 1, xlabel="epoch", title=f"net={net}")
            if not number:
                axes.set_ylabel("training error, %")
            labelled: set[str] = set()
            for result in (result for result in results if result["net"] == net):
                name = {"relu": "ReLU"}.get(result["activation"], result["activation"])
                solid = result["activation"] == "relu"
                points = [(epoch["epoch"], epoch["train_error"]) for epoch in result["history"]]
                axes.plot(
                    *zip(*points, strict=True),
                    ls="-" if solid else "--",
                    color=COLOURS[0] if solid else COLOURS[1],
                    lw=1.2,
                    label=None if name in labelled else f"{name}, learning rate {result['lr']:g}",
                )
                labelled.add(name)
            axes.axhline(25, color=MUTED, lw=0.8)
            axes.set_ylim(0, 75)
            axes.set_xlim(0, 1.02 * last)
            axes.legend(fontsize=8)
    return figure


def figure_2(net: AlexNet) -> Figure:
    """Draw the layers of the two towers with their output sizes, and the communication between devices.

    A forward pass of one image gives the sizes. The groups of the layers give the communication, drawn as bold arrows.
    """
    device = next(net.parameters()).device
    with torch.inference_mode():
        maps = net.eval().activations(torch.zeros(1, 3, 224, 224, device=device))
    crossing = crossing_bytes(net, 1) if net.towers == 2 else {}
    layers = [(name, maps[name]) for name in maps if name != "pool5"]
    height = 0.9 * net.towers
    with drawing(9.6, 1.4 + 1.3 * net.towers, None) as figure:
        axes = figure.add_axes((0.005, 0.01, 0.99, 0.98))
        axes.set_axis_off()
        axes.set_xlim(-0.72, len(layers) + 0.02)
        axes.set_ylim(-0.75, height + 0.42)
        axes.add_patch(Rectangle((-0.6, height / 2 - 0.35), 0.42, 0.7, fc="none", ec=INK, lw=1))
        axes.text(-0.39, height / 2, "image\n3 x\n224x224", ha="center", va="center", fontsize=7)
        for x, (name, out) in enumerate(layers):
            layer = net.get_submodule(name)
            assert isinstance(layer, nn.Conv2d | GroupedLinear)
            axes.text(x + 0.36, height + 0.2, name, ha="center", weight="bold", fontsize=9)
            kernel = f"{layer.kernel_size[0]}x{layer.kernel_size[1]}" if isinstance(layer, nn.Conv2d) else "full"
            axes.text(x + 0.36, height + 0.02, kernel, ha="center", fontsize=7, color=MUTED)
            for tower in range(net.towers):
                y = 0.9 * (net.towers - 1 - tower)
                size = f"{out.shape[1] // net.towers}" + (f"\n{out.shape[2]}x{out.shape[3]}" if out.ndim == 4 else "")
                colour = COLOURS[tower]
                axes.add_patch(Rectangle((x + 0.1, y + 0.08), 0.52, 0.74, fc=colour, ec=colour, alpha=0.22))
                axes.add_patch(Rectangle((x + 0.1, y + 0.08), 0.52, 0.74, fc="none", ec=colour))
                axes.text(x + 0.36, y + 0.45, size, ha="center", va="center", fontsize=8)
                starts = [0.9 * (net.towers - 1 - t) for t in range(net.towers)] if name in crossing else [y]
                for start in starts:
                    begin = (x - 0.36, start + 0.45) if x else (-0.18, height / 2)
                    far = start != y
                    axes.add_patch(
                        FancyArrowPatch(
                            begin,
                            (x + 0.09, y + 0.45 + (0.12 if far and start > y else -0.12 if far else 0)),
                            arrowstyle="-|>",
                            mutation_scale=8,
                            shrinkA=0,
                            shrinkB=0,
                            lw=1.6 if far else 0.8,
                            color=COLOURS[5] if far else MUTED,
                        )
                    )
            if name in crossing:
                axes.text(x - 0.13, -0.14, f"{crossing[name] / 1e3:,.0f} kB", ha="center", fontsize=7, color=COLOURS[5])
        for tower in range(net.towers):
            y = 0.9 * (net.towers - 1 - tower)
            axes.text(
                -0.39, y + (0.86 if tower == 0 else -0.04), f"tower {tower}", ha="center", fontsize=7, color=MUTED
            )
        total = sum(p.numel() for p in net.parameters())
        words = f"{total:,} parameters; output sizes are before pooling"
        if crossing:
            words += "; red: bytes sent between devices, forward and backward, for one image in float32"
        axes.text(len(layers) / 2 - 0.3, -0.55, words, ha="center", fontsize=8, color=MUTED)
    return figure


def figure_3(kernels: Tensor, towers: int = 2) -> Figure:
    """Draw the first-layer kernels (maps, 3, h, w), as in Figure 3.

    The kernels of each tower are in separate rows. Each kernel is divided by its largest absolute weight. Grey is 0, and
    a kernel without colour looks grey.
    """
    rows_of = [_mosaic(part) for part in kernels.detach().float().cpu().chunk(towers)]
    with drawing(7, 0.25 + 7 * sum(m.shape[0] for m in rows_of) / rows_of[0].shape[1]) as figure:
        for axes, mosaic, tower in zip(np.atleast_1d(figure.subplots(towers, 1)), rows_of, range(towers), strict=True):
            _picture(axes, mosaic)
            if towers > 1:
                axes.set_title(f"tower {tower}", loc="left", fontsize=8, color=MUTED, pad=2)
    return figure


def _mosaic(kernels: Tensor, columns: int = 16, zoom: int = 4) -> NDArray[np.float32]:
    count, _, height, width = kernels.shape
    rows = -(-count // columns)
    mosaic = np.ones((rows * (height * zoom + 2) - 2, columns * (width * zoom + 2) - 2, 4), np.float32)
    mosaic[..., 3] = 0  # transparent between the kernels
    for i, kernel in enumerate(kernels):
        grey = 0.5 + 0.5 * kernel / kernel.abs().max().clamp(min=1e-12)
        big = grey.permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1)
        top, left = (i // columns) * (height * zoom + 2), (i % columns) * (width * zoom + 2)
        mosaic[top : top + height * zoom, left : left + width * zoom, :3] = big
        mosaic[top : top + height * zoom, left : left + width * zoom, 3] = 1
    return mosaic


def figure_4_left(
    images: Sequence[NDArray[np.uint8]], softmax: Tensor, labels: Sequence[int], names: Sequence[str]
) -> Figure:
    """Draw images (h, w, 3) with their five most probable labels as bars, as in Figure 4 (left).

    softmax: (N, classes). The correct label is below the image, and its bar is green.
    """
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    best = min(5, softmax.shape[1])
    with drawing(1.85 * columns, 2.75 * rows) as figure:
        grid = figure.add_gridspec(2 * rows, columns, height_ratios=[1.6, 1] * rows)
        for i, (image, shares, label) in enumerate(zip(images, softmax.float().cpu(), labels, strict=True)):
            row, column = divmod(i, columns)
            axes = figure.add_subplot(grid[2 * row, column])
            _picture(axes, _small(image))
            axes.set_xlabel(names[label], fontsize=8, color=INK, labelpad=2)
            axes = figure.add_subplot(grid[2 * row + 1, column])
            values, order = shares.topk(best)
            for y, (value, which) in enumerate(zip(values.tolist(), order.tolist(), strict=True)):
                axes.barh(-y, value, color=RIGHT if which == label else COLOURS[0], alpha=0.55)
                axes.text(0.02, -y, names[which], va="center", fontsize=7)
            axes.set_xlim(0, 1)
            axes.set_axis_off()
    return figure


def figure_4_right(
    queries: Sequence[NDArray[np.uint8]], found: Sequence[Sequence[NDArray[np.uint8]]], alike: Sequence[Sequence[bool]]
) -> Figure:
    """Draw each query and its nearest training images in a row, as in Figure 4 (right).

    A green frame marks an image of the query's class, a red frame an image of another class.
    """
    columns = 1 + len(found[0])
    with drawing(7, 7 / columns * len(queries) + 0.2) as figure:
        grid = figure.subplots(
            len(queries), columns, squeeze=False, gridspec_kw={"width_ratios": [1.15] + [1] * (columns - 1)}
        )
        for line, query, images, same in zip(grid, queries, found, alike, strict=True):
            _picture(line[0], _small(query))
            for axes, image, right in zip(line[1:], images, same, strict=True):
                _picture(axes, _small(image), frame=RIGHT if right else WRONG)
        grid[0][0].set_title("query", fontsize=8, color=MUTED)
        grid[0][1].set_title("nearest", fontsize=8, color=MUTED)
    return figure


def _small(image: NDArray[np.uint8], size: int = 128) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize((size, size))) if image.shape[0] > size else image


def _picture(axes: Axes, image: NDArray[Any], frame: str | None = None) -> None:
    axes.imshow(image, interpolation="none")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(frame is not None)
        spine.set_color(frame or "none")
        spine.set_linewidth(2)
