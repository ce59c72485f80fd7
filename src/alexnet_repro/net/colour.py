"""How much of the first layer's kernels is colour (Section 6.1, Figure 3)."""

from torch import Tensor


def colour_content(conv1_weight: Tensor, towers: int = 2) -> list[float]:
    """(maps, 3, 11, 11) -> for each tower the share of its first kernels' energy that is colour, from 0 (grey) to 1.

    The energy of what is left of the RGB weights when their mean, the grey part, is taken off each. Weights as they are drawn
    have 2/3. Section 6.1: the kernels of one GPU are "largely color-agnostic", those of the other "largely color-specific".
    """
    shares = []
    for kernels in conv1_weight.detach().float().chunk(towers):
        colour = kernels - kernels.mean(1, keepdim=True)
        shares.append(float(colour.square().sum() / kernels.square().sum()))
    return shares
