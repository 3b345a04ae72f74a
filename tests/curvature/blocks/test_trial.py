"""Subclasses of covered layers: a block where they compute what it believes, a reason where they don't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.config.schema import CurvatureConfig
from kfac_dist.curvature.blocks import find_blocks


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.05, self.bias)


class Masked(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("mask", torch.tril(torch.ones_like(self.weight)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Normalising(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(x, x.shape[-1:]), self.weight, self.bias)


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Dropping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, training=True))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class OtherConvolution(nn.Conv1d):
    """Its forward is torch's; what that calls isn't."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight.flip(-1), bias)


class ScaledTransposed(nn.ConvTranspose1d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return 2 * super().forward(x, output_size)


class Shifted(nn.Embedding):
    """Positions that begin at 2, whatever it is given: BART's."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(torch.arange(tokens.shape[1]).expand_as(tokens) + 2)


class ScaledEmbedding(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 4.0


class Plus(nn.LayerNorm):
    """Gemma's γ + 1 would do no harm; a γ that is squared does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.square(), self.bias, self.eps)


WRONG: dict[str, Callable[[], nn.Module]] = {
    "scaled": lambda: Scaled(4, 3),
    "scaled, no bias": lambda: Scaled(4, 3, bias=False),
    "masked": lambda: Masked(4, 3),
    "normalising": lambda: Normalising(4, 3),
    "activated": lambda: Activated(4, 3),
    "dropping": lambda: Dropping(4, 3),
    "standardised": lambda: Standardised(2, 3, 2),
    "another convolution": lambda: OtherConvolution(2, 3, 3),
    "transposed": lambda: ScaledTransposed(2, 3, 2),
    "shifted": lambda: Shifted(9, 3),
    "scaled embedding": lambda: ScaledEmbedding(9, 3),
    "layer norm": lambda: Plus(4),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_computes_something_else_gets_no_block(name: str) -> None:
    model = nn.Sequential(WRONG[name]())
    state = torch.get_rng_state()
    coverage = find_blocks(model, CurvatureConfig())
    assert torch.equal(torch.get_rng_state(), state)
    assert not coverage.blocks
    assert "forward computes something else than nn." in coverage.uncovered["0.weight"]
    assert type(model[0]).__name__ in coverage.uncovered["0.weight"]


class Renamed(nn.Linear):
    """Nothing of its own."""


class Typed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).float()


class Residual(nn.Linear):
    """What is added has no weight of this layer's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class OwnPadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Counting(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.clone())


class NeedsMore(nn.Linear):
    """Can't be tried: training will show."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "renamed": lambda: Renamed(4, 3),
    "typed": lambda: Typed(4, 3),
    "residual": lambda: Residual(4, 4),
    "own padding": lambda: OwnPadding(2, 3, 2, padding=1),
    "channels first": lambda: ChannelsFirst(4),
    "counting": lambda: Counting(9, 3, padding_idx=0),
    "needs more": lambda: NeedsMore(4, 3),
    "batch norm": lambda: nn.BatchNorm2d(3),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_computes_the_same_keeps_its_block(name: str) -> None:
    module = RIGHT[name]()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert len(find_blocks(nn.Sequential(module), CurvatureConfig()).blocks) == 1
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_tied_head_is_judged_by_both_of_its_modules() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = ScaledEmbedding(9, 3), nn.Linear(3, 9, bias=False)
            self.head.weight = self.embedding.weight

    coverage = find_blocks(Tied(), CurvatureConfig())
    assert not coverage.blocks
    assert coverage.uncovered["embedding.weight"] == "ScaledEmbedding.forward computes something else than nn.Embedding"
