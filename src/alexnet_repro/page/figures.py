"""Draw the figures of the paper and the report with matplotlib, in colours for light and dark pages."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
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
from alexnet_repro.page.intervals import reach

INK, MUTED = "#111213", "#77787a"  # a page can replace these with its own colours
COLOURS = ("#3b78c9", "#d9772b", "#2f9e67", "#b8479f", "#8a6d3b", "#c64545", "#4aa3b5", "#7a68c9")
RIGHT, WRONG = COLOURS[2], COLOURS[5]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "alexnet_repro",  # equal figures give equal files
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def _figure(width: float, height: float, layout: Any = "constrained") -> Iterator[Figure]:
    with mpl.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout=layout)


def training_curves(runs: Sequence[tuple[str, list[dict[str, float]]]]) -> Figure:
    """Draw the errors of runs by epoch, in percent: training solid, validation or test dashed.

    runs: the name and the history of each.
    """
    with _figure(7, 3.6) as figure:
        axes = figure.add_subplot(xlabel="epoch", ylabel="top-1 error, %")
        for colour, (name, history) in zip(COLOURS, runs, strict=False):
            epochs = [epoch["epoch"] for epoch in history]
            axes.plot(epochs, [epoch["train_error"] for epoch in history], color=colour, lw=1.4, label=name)
            measured = "val_error" if any("val_error" in epoch for epoch in history) else "test_error"
            axes.plot(epochs, [epoch.get(measured, np.nan) for epoch in history], color=colour, lw=1.4, ls="--")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    return figure


def forest(rows: Sequence[dict[str, Any]], unit: str) -> Figure:
    """Draw a forest plot of measured changes with their 95% intervals, and the paper's changes.

    rows: dicts with label, value, interval (low, high) or None, and paper (the paper's value) or None. unit: the label
    of the axis. One effect that is much larger than the others is an arrow at the edge, with its number.
    """
    far = 1.05 * reach((row["value"], *(row["interval"] or ()), row["paper"] or 0.0) for row in rows)
    with _figure(7, 1.1 + 0.32 * len(rows)) as figure:
        axes = figure.add_subplot(xlabel=unit, xlim=(-far, far))
        axes.axvline(0, color=MUTED, lw=0.8)
        for y, row in enumerate(reversed(rows)):
            if row["interval"] is not None:
                axes.plot(row["interval"], (y, y), color=COLOURS[0], lw=1.6)
            face = COLOURS[0] if row["interval"] else "none"
            if abs(row["value"]) <= far:
                axes.plot(row["value"], y, "o", color=COLOURS[0], ms=5, mfc=face)
            else:
                right = row["value"] > 0
                edge = math.copysign(0.98 * far, row["value"])
                axes.plot(edge, y, ">" if right else "<", color=COLOURS[0], ms=6, mfc=face)
                axes.text(
                    0.95 * edge,
                    y,
                    f"{row['value']:+.1f}",
                    va="center",
                    ha="right" if right else "left",
                    color=INK,
                    fontsize=8,
                )
            if row["paper"] is not None:
                axes.plot(row["paper"], y, "D", color=COLOURS[1], ms=5)
        axes.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)], color=INK)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.plot([], [], "o-", color=COLOURS[0], label="measured, with 95% interval")
        if any(row["interval"] is None for row in rows):
            axes.plot([], [], "o", color=COLOURS[0], mfc="none", label="measured, one seed (no interval)")
        if any(row["paper"] is not None for row in rows):
            axes.plot([], [], "D", color=COLOURS[1], label="the paper, on its own data")
        figure.legend(loc="outside upper left", ncols=3, fontsize=8)
    return figure


def figure_1(results: Sequence[dict[str, Any]]) -> Figure:
    """Draw the training error by epoch with ReLUs (solid) and tanh (dashed).

    Each net has a panel, and each seed has a line.
    """
    nets = sorted({result["net"] for result in results})
    last = max(result["history"][-1]["epoch"] for result in results)
    with _figure(7, 3.4) as figure:
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
    with _figure(9.6, 1.4 + 1.3 * net.towers, None) as figure:
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
    with _figure(7, 0.25 + 7 * sum(m.shape[0] for m in rows_of) / rows_of[0].shape[1]) as figure:
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


def colour_shares(rows: Mapping[str, Sequence[Sequence[float]]], random: float = 2 / 3) -> Figure:
    """Draw the share of colour in the first layer's kernels of each tower, in percent: a line for each seed.

    rows: {label: shares of each seed, by tower}. random: the share of random kernels.
    """
    with _figure(7, 0.9 + 0.36 * len(rows)) as figure:
        axes = figure.add_subplot(xlabel="share of colour in the energy of the kernels, %", xlim=(0, 80))
        axes.axvline(100 * random, color=MUTED, lw=0.8, ls=":", label="random kernels")
        for y, seeds in enumerate(reversed(list(rows.values()))):
            for number, shares in enumerate(seeds):
                height = y + 0.5 * ((number + 0.5) / len(seeds) - 0.5)
                low, high = 100 * min(shares), 100 * max(shares)
                axes.plot((low, high), (height, height), color=MUTED, lw=1)
                if len(shares) > 1:
                    axes.plot(low, height, "o", color=COLOURS[0], ms=4)
                axes.plot(high, height, "o", color=COLOURS[1], ms=4, mfc=COLOURS[1] if len(shares) > 1 else "none")
        axes.plot([], [], "o", color=COLOURS[0], ms=4, label="less coloured tower")
        axes.plot([], [], "o", color=COLOURS[1], ms=4, label="more coloured tower")
        axes.set_yticks(range(len(rows)), list(rows)[::-1], color=INK)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        figure.legend(loc="outside upper left", ncols=3, fontsize=8)
    return figure


def similarity(names: Sequence[str], alike: NDArray[np.float64]) -> Figure:
    """Draw how alike the layers of nets with different seeds are.

    names: of L layers. alike: (pairs, L, L), linear CKA. Left: the same layer of both nets, each pair, and the mean.
    Right: each layer with each other layer, mean over the pairs.
    """
    layers = range(len(names))
    mean = alike.mean(0)
    mean = (mean + mean.T) / 2  # the order of two seeds means nothing
    with _figure(7, 3.3) as figure:
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.25, 1]})
        for pair in alike:
            left.plot(layers, np.diag(pair), "o", color=COLOURS[0], ms=3, mfc="none", alpha=0.5)
        left.plot(layers, np.diag(mean), color=COLOURS[0], lw=1.4)
        left.set_ylim(min(0.0, float(np.nanmin(alike))), 1.02)
        left.set_title("the same layer of two nets", fontsize=9)
        left.set_ylabel("linear CKA")
        left.set_xticks(layers, names, rotation=45, ha="right", color=INK)
        right.imshow(mean, vmin=0, vmax=1, cmap="Blues", origin="lower")
        for i, line in enumerate(mean):
            for j, value in enumerate(line):
                right.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5, color="white" if value > 0.6 else "#111111")  # fmt: skip
        right.set_title("every layer with every layer, x 100", fontsize=9)
        right.set_xticks(layers, names, rotation=45, ha="right", color=INK)
        right.set_yticks(layers, names, color=INK)
    return figure


def figure_4_left(
    images: Sequence[NDArray[np.uint8]], softmax: Tensor, labels: Sequence[int], names: Sequence[str]
) -> Figure:
    """Draw images (h, w, 3) with their five most probable labels as bars, as in Figure 4 (left).

    softmax: (N, classes). The correct label is below the image, and its bar is green.
    """
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    best = min(5, softmax.shape[1])
    with _figure(1.85 * columns, 2.75 * rows) as figure:
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
    with _figure(7, 7 / columns * len(queries) + 0.2) as figure:
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
