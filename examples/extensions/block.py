"""A block for a layer type of one's own: `y = (gain · x) K + b`, its weight called `kernel` and stored input first.

A run takes it with `extensions: [examples.extensions.block]` in its YAML file; a program imports this module first.

    python -m examples.extensions.block
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.extensions import InputFirstLinearBlock, register_block


class GainLinear(nn.Module):
    """A linear layer with a fixed gain, parameters `kernel` `[d_in, d_out]` and `offset` `[d_out]`."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.offset = nn.Parameter(torch.zeros(outputs))
        self.gain = gain

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `[..., d_out]` of `[..., d_in]`."""
        return self.gain * inputs @ self.kernel + self.offset


class GainLinearBlock(InputFirstLinearBlock):
    """A is that of a linear layer whose inputs are `gain · x`; the rest is the same."""

    parameter_names = ("kernel", "offset")

    def input_rows(self, inputs: Tensor, batch_size: int | None) -> Tensor:
        """Return `[1, B, T, d_in]`."""
        return super().input_rows(inputs, batch_size) * self.module.gain


register_block(GainLinear, GainLinearBlock, api_version=1)


def main() -> None:
    """Print the blocks of a small model."""
    model = nn.Sequential(GainLinear(4, 8, gain=0.5), nn.Tanh(), nn.Linear(8, 3))
    kfac = KFAC(model, {"curvature": {"likelihood": "categorical"}, "update": {"kl_clip": None}})
    for block in kfac.coverage.blocks:
        print(block.name, block.describe())


if __name__ == "__main__":
    main()
