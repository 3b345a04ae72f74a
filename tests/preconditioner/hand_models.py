"""Models that use a weight by hand, and a few steps of them, for the tests of the arbiter and of renewal."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC

SAMPLES, FEATURES, CLASSES = 8, 4, 3


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SAMPLES, FEATURES, generator=generator), torch.randint(
        0, CLASSES, (SAMPLES,), generator=generator
    )


class ByHand(nn.Module):
    """A head that is the weight of the first layer, used by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.middle = nn.Linear(FEATURES, CLASSES, bias=False), nn.Linear(CLASSES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.middle(self.first(x).tanh()), self.first.weight)


class OnlyByHand(ByHand):
    """The layer is never called."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.middle(F.linear(x, self.first.weight).tanh()), self.first.weight)


CONFIG: dict[str, Any] = {
    "curvature": {"factor_every": 1},
    "inversion": {"inverse_every": 1, "damping": 0.1},
    "update": {"kl_clip": 1e-3},
}
Wrap = Callable[[nn.Module], nn.Module]


def train(
    model: nn.Module, config: dict[str, Any], steps: int = 3, rank: int = 0, size: int = 1, wrap: Wrap = lambda m: m
) -> tuple[dict[str, Tensor], KFAC, list[str]]:
    """Parameters after a few steps on this rank's part of the batch, and what was said."""
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    x, labels = batch()
    part = slice(rank * SAMPLES // size, (rank + 1) * SAMPLES // size)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kfac = KFAC(wrapped, config, optimizer=optimizer)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x[part]), labels[part]).backward()
            kfac.step()
            optimizer.step()
    found = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found[name] = whole.detach().clone()
    return found, kfac, [str(warning.message) for warning in said]


def excluded(config: dict[str, Any], *layers: str) -> dict[str, Any]:
    return {**config, "curvature": {**config["curvature"], "exclude": layers}}
