"""The net of Figure 2, its switches and its initialisation (Sections 3 and 5).

Written for one device. The two towers of Figure 2 are the two halves of each layer's maps: conv2, conv4 and conv5 read
only their own tower (groups=2), conv3 and the fully connected layers read both, and normalisation stays inside a tower.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alexnet_repro.lrn import LocalResponseNorm

TOWERS = 2
# "We initialized the neuron biases in the second, fourth, and fifth convolutional layers, as well as in the
# fully-connected hidden layers, with the constant 1 [...] the remaining layers with the constant 0" (Section 5).
BIAS_ONE = ("conv2", "conv4", "conv5", "fc6", "fc7")


class AlexNet(nn.Module):
    """The printed paper's net for 224x224x3 images: 60,965,224 parameters with 1000 classes.

    Images are float (N, 3, 224, 224), RGB on the 0-255 scale with the mean image subtracted. Maps: conv1 96x55x55, conv2
    256x27x27, conv3 384x13x13, conv4 384x13x13, conv5 256x13x13, pool5 256x6x6, fc6 4096, fc7 4096, fc8 classes; the
    first half of each belongs to tower 0.

    224 gives 55 as in the 2012 code: its windows of conv1 start at 0, 4, ..., 216, and the three rows and columns that the
    last one reaches beyond the image are zero, which is the mean.

    classes: outputs of fc8.
    lrn: local response normalisation after the ReLU of conv1 and conv2 (Section 3.3).
    lrn_n, lrn_k, lrn_alpha, lrn_beta: its constants; alpha multiplies the plain sum, as printed.
    dropout: probability of setting a neuron of fc6 and fc7 to zero in training (Section 4.2).

    Weights are drawn from torch's global generator: call torch.manual_seed first for the same net again.
    """

    def __init__(
        self,
        classes: int = 1000,
        *,
        lrn: bool = True,
        lrn_n: int = 5,
        lrn_k: float = 2.0,
        lrn_alpha: float = 1e-4,
        lrn_beta: float = 0.75,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 11, stride=4)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=TOWERS)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=TOWERS)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=TOWERS)
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, classes)
        self.norm: nn.Module = (
            LocalResponseNorm(lrn_n, lrn_alpha, lrn_beta, lrn_k, groups=TOWERS) if lrn else nn.Identity()
        )
        self.dropout = Dropout(dropout)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw the weights from N(0, 0.01) and set the biases (Section 5)."""
        for name, layer in self.named_children():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.normal_(0, 0.01)
                assert layer.bias is not None
                layer.bias.fill_(1 if name in BIAS_ONE else 0)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, 224, 224) -> logits (N, classes)."""
        return self._run(images, lambda name, responses: None)

    def activations(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, 224, 224) -> the neurons' outputs by layer: conv1 ... conv5, pool5, fc6, fc7 after the ReLU, and fc8.

        Those of conv1 and conv2 are taken before normalisation and pooling, those of fc6 and fc7 before dropout.
        """
        seen: dict[str, Tensor] = {}
        self._run(images, seen.__setitem__)
        return seen

    def _run(self, images: Tensor, see: Callable[[str, Tensor], None]) -> Tensor:
        def neurons(name: str, x: Tensor) -> Tensor:
            x = F.relu(self.get_submodule(name)(x))
            see(name, x)
            return x

        x = F.pad(images, (0, 3, 0, 3))  # right and bottom
        x = max_pool(self.norm(neurons("conv1", x)))
        x = max_pool(self.norm(neurons("conv2", x)))
        x = neurons("conv3", x)
        x = neurons("conv4", x)
        x = max_pool(neurons("conv5", x))
        see("pool5", x)
        x = self.dropout(neurons("fc6", x.flatten(1)))
        x = self.dropout(neurons("fc7", x))
        logits = self.fc8(x)
        see("fc8", logits)
        return logits


def max_pool(x: Tensor) -> Tensor:
    """Overlapping pooling, z = 3 and s = 2 (Section 3.4): 55 -> 27 -> 13 -> 6."""
    return F.max_pool2d(x, kernel_size=3, stride=2)


class Dropout(nn.Module):
    """Dropout as printed (Section 4.2): kept outputs are not rescaled in training, all are multiplied by 1-p in testing.

    After ``draw_from(seed, step)`` the masks of each tower are a function of (seed, step, tower) and of the order of calls
    in that step, so that a resumed or a distributed run drops the same neurons; before it they come from torch's global
    generator. Raises ValueError unless 0 <= p < 1.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout={p}: a probability from 0 to below 1")
        self.p = p
        self._source: tuple[int, int] | None = None
        self._generators: list[torch.Generator] = []

    def draw_from(self, seed: int, step: int) -> None:
        """Make the next masks those of this training step."""
        self._source, self._generators = (seed, step), []

    def forward(self, x: Tensor) -> Tensor:
        """(N, neurons) -> (N, neurons)."""
        if self.p == 0:
            return x
        if not self.training:
            return x * (1 - self.p)
        if self._source is not None and not self._generators:
            self._generators = [_generator(*self._source, tower, device=x.device) for tower in range(TOWERS)]
        generators: list[torch.Generator | None] = [*self._generators] or [None] * TOWERS
        kept = [
            torch.empty_like(tower, dtype=torch.float32).uniform_(generator=generator) >= self.p
            for tower, generator in zip(x.chunk(TOWERS, 1), generators, strict=True)
        ]
        return x * torch.cat(kept, 1)

    def extra_repr(self) -> str:
        """The probability, for print(net)."""
        return f"p={self.p}"


def _generator(seed: int, step: int, tower: int, device: torch.device) -> torch.Generator:
    key = np.random.SeedSequence((seed, step, tower)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(key) >> 1)
