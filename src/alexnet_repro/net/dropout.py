"""Dropout (Section 4.2) with masks determined by the seed and the training step."""

import numpy as np
import torch
from torch import Tensor, nn


class Dropout(nn.Module):
    """Dropout as printed (Section 4.2): no rescaling in training, outputs scaled by 1 - p in testing.

    After ``draw_from(seed, step)``, the masks of each tower depend only on (seed, step, tower) and on the order of
    calls within the step. A resumed or distributed run therefore drops the same neurons. Before the first call of
    ``draw_from``, masks come from PyTorch's global generator.

    p: probability of setting an output to zero.
    masks: number of towers; each tower has its own mask.

    Raises ValueError unless 0 <= p < 1.
    """

    def __init__(self, p: float = 0.5, masks: int = 2) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout={p}: this must be a probability, at least 0 and below 1")
        self.p = p
        self.towers = list(range(masks))  # towers whose neurons the input holds, concatenated in this order
        self._source: tuple[int, int] | None = None
        self._rows: tuple[int, int] | None = None
        self._generators: list[torch.Generator] = []

    def draw_from(self, seed: int, step: int, first: int = 0, global_batch_size: int | None = None) -> None:
        """Set the seed and training step that determine the masks of subsequent forward passes.

        first, global_batch_size: the input ``x`` holds rows ``first:first + len(x)`` of the global batch.
        """
        self._source, self._generators = (seed, step), []
        self._rows = None if global_batch_size is None else (first, global_batch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (N, neurons): masked in training mode, scaled in evaluation mode."""
        if self.p == 0:
            return x
        if not self.training:
            return x * (1 - self.p)
        if self._source is not None and not self._generators:
            self._generators = [_generator(*self._source, tower, device=x.device) for tower in self.towers]
        generators: list[torch.Generator | None] = [*self._generators] or [None] * len(self.towers)
        first, global_batch_size = self._rows or (0, len(x))
        shape = (global_batch_size, x.shape[1] // len(self.towers))
        # always float32, so that the same neurons are dropped in every precision
        empty = torch.empty(shape, dtype=torch.float32, device=x.device)
        kept = [empty.uniform_(generator=source) >= self.p for source in generators]
        return x * torch.cat(kept, 1)[first : first + len(x)]

    def extra_repr(self) -> str:
        """Return the probability for print(net)."""
        return f"p={self.p}"


def _generator(seed: int, step: int, tower: int, device: torch.device) -> torch.Generator:
    key = np.random.SeedSequence((seed, step, tower)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(key) >> 1)
