"""Dropout (Section 4.2) with masks that are a function of seed, update, layer, tower, image and neuron."""

import torch
from torch import Tensor, nn

from alexnet_repro.net import dropout_gpu

WORD = 0xFFFFFFFF  # mask of 32 bits


class Dropout(nn.Module):
    """Dropout as printed (Section 4.2): no rescaling in training, outputs scaled by 1 - p in testing.

    After ``draw_from(seed, step)``, whether a neuron is dropped depends only on (seed, step, layer, tower, image,
    neuron), through the counter-based generator Philox. The same neurons are therefore dropped on every device and in
    every precision, in a resumed run, and however towers and replicas are placed. Before the first call of
    ``draw_from``, masks come from PyTorch's global generator.

    p: probability of setting an output to zero.
    towers: number of towers; each tower has its own mask.
    layer: number of the layer; layers have independent masks.

    Raises ValueError unless 0 <= p < 1.
    """

    source: Tensor

    def __init__(self, p: float = 0.5, towers: int = 2, layer: int = 0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout={p}: this must be a probability, at least 0 and below 1")
        self.p, self.layer = p, layer
        self.towers = list(range(towers))  # towers whose neurons the input holds, concatenated in this order
        # Both words of the seed, the step and the first row. A tensor, so that a CUDA graph reads the current values.
        self.register_buffer("source", torch.zeros(4, dtype=torch.int64), persistent=False)
        self.drawn_from_source = False

    def draw_from(self, seed: int, step: int, first: int = 0) -> None:
        """Set the seed and training step that determine the masks of subsequent forward passes.

        first: position in the global batch of the first row of the input.
        """
        self.drawn_from_source = True
        for i, value in enumerate((seed & WORD, seed >> 32 & WORD, step & WORD, first)):
            self.source[i].fill_(value)  # unlike a copy, this does not make the host wait for a GPU

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (N, neurons): masked in training mode, scaled in evaluation mode."""
        if self.p == 0:
            return x
        if not self.training:
            return x * (1 - self.p)
        if self.drawn_from_source:
            rows, neurons = x.shape[0], x.shape[1] // len(self.towers)
            kept = kept_neurons(self.source, rows, neurons, self.layer, self.towers, self.p)
        else:
            kept = torch.rand(x.shape, device=x.device) >= self.p
        return x * kept

    def extra_repr(self) -> str:
        """Return the probability for print(net)."""
        return f"p={self.p}"


@torch.library.custom_op("alexnet_repro::kept_neurons", mutates_args=())
def kept_neurons(source: Tensor, rows: int, neurons: int, layer: int, towers: list[int], p: float) -> Tensor:
    """Return which neurons are kept, (rows, towers * neurons), each with probability 1 - p.

    source: (4,) int64: low and high word of the seed, step, position of row 0 in the global batch.
    neurons: neurons per tower. layer: number of the layer, below 2^24. towers: the towers' numbers, which are adjacent.

    Neuron n of a tower has word n % 4 of Philox4x32-10 with counter (n // 4, row, step, layer * 256 + tower) and the
    seed as its key. It is kept if this word is at least p * 2^32.
    """
    blocks, threshold = -(-neurons // 4), round(p * 2**32)
    if dropout_gpu.serves(source):
        kept = torch.empty(rows, len(towers), blocks * 4, dtype=torch.bool, device=source.device)
        for number, tower in enumerate(towers):
            dropout_gpu.write(kept, number, source, layer * 256 + tower, threshold)
    else:
        column = torch.arange(blocks, device=source.device)
        row = source[3] + torch.arange(rows, device=source.device)
        parts = torch.arange(towers[0], towers[0] + len(towers), device=source.device) + layer * 256
        words = philox((source[0], source[1]), (column, row[:, None, None], source[2], parts[:, None]))
        kept = torch.stack(words, -1).flatten(2) >= threshold
    return kept[..., :neurons].flatten(1)


@kept_neurons.register_fake
def _(source: Tensor, rows: int, neurons: int, layer: int, towers: list[int], p: float) -> Tensor:
    return torch.empty(rows, neurons * len(towers), dtype=torch.bool, device=source.device)


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four words of Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    All arguments and results are int64 tensors of 32-bit words; they are broadcast together.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the low 64 bits, which is all of them
        c0, c1 = (product1 >> 32 & WORD) ^ c1 ^ k0, product1 & WORD
        c2, c3 = (product0 >> 32 & WORD) ^ c3 ^ k1, product0 & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3
