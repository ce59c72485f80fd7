"""Colour content of the first layer's kernels (Section 6.1, Figure 3)."""

from torch import Tensor


def colour_content(conv1_weight: Tensor, towers: int = 2) -> list[float]:
    """Return the fraction of each tower's conv1 kernel energy that is colour, from 0 (grey) to 1.

    The grey part of a kernel is the mean of its RGB weights at each position; the colour part is the remainder. Random
    weights have a colour fraction of 2/3. According to Section 6.1, the kernels of one GPU are "largely color-agnostic"
    and the kernels of the other are "largely color-specific".

    conv1_weight: (maps, 3, 11, 11).
    """
    fractions = []
    for kernels in conv1_weight.detach().float().chunk(towers):
        colour = kernels - kernels.mean(1, keepdim=True)
        fractions.append(float(colour.square().sum() / kernels.square().sum()))
    return fractions
