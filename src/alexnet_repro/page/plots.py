"""Draw what was measured, with matplotlib, in colours for light and dark pages."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from alexnet_repro.page.intervals import reach

INK, MUTED = "#111213", "#77787a"  # a page can replace these with its own colours
COLOURS = ("#3b78c9", "#d9772b", "#2f9e67", "#b8479f", "#8a6d3b", "#c64545", "#4aa3b5", "#7a68c9")
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
def drawing(width: float, height: float, layout: Any = "constrained") -> Iterator[Figure]:
    """Start a figure of so many inches in the style of the report."""
    with mpl.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout=layout)


def training_curves(runs: Sequence[tuple[str, list[dict[str, float]]]]) -> Figure:
    """Draw the errors of runs by epoch, in percent: training solid, validation or test dashed.

    runs: the name and the history of each.
    """
    with drawing(7, 3.6) as figure:
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
    with drawing(7, 1.1 + 0.32 * len(rows)) as figure:
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


def colour_shares(rows: Mapping[str, Sequence[Sequence[float]]], random: float = 2 / 3) -> Figure:
    """Draw the share of colour in the first layer's kernels of each tower, in percent: a line for each seed.

    rows: {label: shares of each seed, by tower}. random: the share of random kernels.
    """
    with drawing(7, 0.9 + 0.36 * len(rows)) as figure:
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
    with drawing(7, 3.3) as figure:
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
