"""Subclasses of covered layers: a block where they compute what it believes, a reason where they don't."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.config.schema import CurvatureConfig
from kfac_dist.curvature.blocks import find_blocks
from tests.curvature.measured import assert_close, build_kfac, factors


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


class Turned:
    """A forward that brings its units where the norm has them, and back."""

    place, own = 1, -1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(self.place, self.own)).movedim(self.own, self.place)  # type: ignore[misc]


class Sequences(nn.LayerNorm):
    """SqueezeBERT's: takes three dimensions alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 1)).permute(0, 2, 1)


class ByHand(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        unit = centred * (centred.square().mean(1, keepdim=True) + self.eps).rsqrt()
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return unit * self.weight.view(shape) + self.bias.view(shape)


class TurnedLayerNorm(Turned, nn.LayerNorm):
    pass


class TurnedRMSNorm(Turned, nn.RMSNorm):
    pass


class TurnedGroupNorm(Turned, nn.GroupNorm):
    place, own = -1, 1


class TurnedBatchNorm(Turned, nn.BatchNorm1d):
    place, own = -1, 1


class TurnedBatchNorm2d(Turned, nn.BatchNorm2d):
    place, own = -1, 1


class EitherWay(nn.LayerNorm):
    """ConvNeXt's: images either way, by an argument."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__(width)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.first else super().forward(x)


C = 3
TURNED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "sequences": (lambda: Sequences(C), (4, C, 6)),
    "one position": (lambda: Sequences(C), (4, C, 1)),
    "as many positions as units": (lambda: Sequences(C), (4, C, C)),
    "as many of all": (lambda: Sequences(C), (C, C, C)),
    "by hand": (lambda: ByHand(C), (4, C, C)),
    "images by hand": (lambda: ByHand(C), (4, C, C, C)),
    "volumes": (lambda: TurnedLayerNorm(C), (4, C, 2, 2, C)),
    "RMS": (lambda: TurnedRMSNorm(C), (4, C, C)),
    "in the middle": (lambda: type("Middle", (TurnedLayerNorm,), {"place": 2})(C), (4, C, C, C)),
    "groups": (lambda: TurnedGroupNorm(1, C), (4, C, C)),
    "groups of one": (lambda: TurnedGroupNorm(3, C), (4, 1, C)),
    "batch": (lambda: TurnedBatchNorm(C), (4, C, C)),
    "batch, one position": (lambda: TurnedBatchNorm(C), (4, 1, C)),
    "batch of images": (lambda: TurnedBatchNorm2d(C), (4, C, C, C)),
    "images, channels first": (lambda: EitherWay(C, True), (4, C, 5, C)),
    "images, channels last": (lambda: EitherWay(C, False), (4, C, 5, C)),
}


@pytest.mark.parametrize("name", TURNED)
def test_a_norm_that_turns_its_input_is_measured_along_its_units(name: str) -> None:
    """F is made of each sample's own gradients, whatever else is as large as the units are many."""
    make, shape = TURNED[name]
    torch.manual_seed(0)
    module = make()
    kfac = build_kfac(model := nn.Sequential(module, nn.Flatten()))
    inputs, weights = torch.randn(shape), torch.randn(shape).flatten(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs = model(inputs)
        (outputs * weights).sum().div(len(inputs)).backward()
        kfac.step()
    kfac.remove()
    [found] = factors(kfac).values()
    # The gradients of one sample, with the batch's own statistics.
    rows = []
    for sample in range(len(inputs)):
        outputs = module(inputs).flatten(1)
        own = torch.autograd.grad((outputs * weights)[sample].sum(), list(module.parameters()))
        rows.append(torch.stack(own, dim=-1).double())
    wanted = torch.stack(rows)  # [B, units, width]
    assert_close(found, torch.einsum("bui,buj->uij", wanted, wanted) / len(inputs))


class ChannelsFirstLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_a_linear_layer_that_turns_its_input_gets_no_block() -> None:
    coverage = find_blocks(nn.Sequential(ChannelsFirstLinear(4, 3)), CurvatureConfig())
    assert not coverage.blocks
    assert "forward computes something else than nn.Linear" in coverage.uncovered["0.weight"]


def test_a_tied_head_is_judged_by_both_of_its_modules() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = ScaledEmbedding(9, 3), nn.Linear(3, 9, bias=False)
            self.head.weight = self.embedding.weight

    coverage = find_blocks(Tied(), CurvatureConfig())
    assert not coverage.blocks
    assert coverage.uncovered["embedding.weight"] == "ScaledEmbedding.forward computes something else than nn.Embedding"
