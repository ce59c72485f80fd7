"""How much of the first layer's kernels is colour (Section 6.1, Figure 3)."""

from torch import Tensor


def colour_content(conv1_weight: Tensor, towers: int = 2) -> list[float]:
    """Return, for each tower, the share of the energy of its first kernels that is colour: from 0 (grey) to 1.

    The grey part of a kernel is the mean of its RGB weights at each position; the rest is colour. Random weights have a
    share of 2/3. Section 6.1: the kernels of one GPU are "largely color-agnostic", those of the other "largely
    color-specific".

    conv1_weight: (maps, 3, 11, 11).
    """
    shares = []
    for kernels in conv1_weight.detach().float().chunk(towers):
        colour = kernels - kernels.mean(1, keepdim=True)
        shares.append(float(colour.square().sum() / kernels.square().sum()))
    return shares
