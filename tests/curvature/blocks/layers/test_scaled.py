"""Modules that scale what they compute are known by what they answer, and measured as torch's own norms are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.config.schema import CurvatureConfig
from kfac_dist.curvature.blocks import find_blocks
from kfac_dist.curvature.blocks.layers.rms_norm import RMSNormBlock
from kfac_dist.curvature.blocks.layers.scaled import ScaledBlock, is_scaled
from tests.curvature.blocks.layers.test_rms_norm import Like
from tests.curvature.measured import assert_close, build_kfac, measure


class Centred(nn.Module):
    """A layer norm without a shift, with a weight of any shape: Cohere's."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.layer_norm(x, (x.shape[-1],))


class Gated(nn.Module):
    """Mamba-2's norm of a gated input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * F.silu(gate)
        return self.weight * F.rms_norm(x, (x.shape[-1],), eps=self.eps)


class Affine(nn.Module):
    """A norm that doesn't normalise: MobileBERT's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias, self.weight = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Dropped(LayerScale):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training) * self.gamma


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Offset(LayerScale):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.gamma)


class Activated(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize("module", [Centred(6), Centred(2, 3), Gated(6), Affine(6), LayerScale(6), Like("groups")])
def test_what_scales_its_outputs_is_recognised(module: nn.Module) -> None:
    assert is_scaled(module)
    assert is_scaled(module.to("meta"))
    assert not any(True for _ in module._forward_hooks)


@pytest.mark.parametrize(
    "module",
    [Like("scale before"), Dropped(6), Shift(), Offset(6), Activated(6), nn.PReLU(6), nn.Linear(6, 6), LayerScale(1)],
)
def test_what_computes_something_else_is_not(module: nn.Module) -> None:
    before = torch.get_rng_state()
    assert not is_scaled(module)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_rms_norm_keeps_its_own_block() -> None:
    model = nn.Sequential(nn.Linear(4, 6), Like("rms norm"), Centred(6))
    coverage = find_blocks(model, CurvatureConfig())
    assert [type(block) for block in coverage.blocks[1:]] == [RMSNormBlock, ScaledBlock]
    assert not coverage.uncovered


class Model(nn.Module):
    def __init__(self, norm: nn.Module, unflatten: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.norm, self.head, self.shape = nn.Linear(5, 6), norm, nn.Linear(6, 3), unflatten

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if isinstance(self.norm, Gated):
            return self.head(self.norm(hidden.tanh(), gate=hidden))
        return self.head(self.norm(hidden.unflatten(-1, self.shape)).flatten(hidden.ndim - 1).tanh())


@pytest.mark.parametrize(
    ("norm", "shape", "bias"),
    [
        (Centred(6), (6,), False),
        (Centred(2, 3), (2, 3), False),
        (Gated(6), (6,), False),
        (Affine(6), (6,), True),
        (LayerScale(6), (6,), False),
    ],
)
def test_the_factor_is_that_of_the_samples_gradients(norm: nn.Module, shape: tuple[int, ...], bias: bool) -> None:
    """F of a batch is the mean of every sample's own (∂γ, ∂β), unit by unit."""
    torch.manual_seed(0)
    model, inputs, targets = Model(norm, shape), torch.randn(8, 5), torch.randint(0, 3, (8,))
    scale = next(p for key, p in norm.named_parameters() if key != "bias")
    with torch.no_grad():
        scale.normal_()
    wanted = torch.zeros(6, 1 + bias, 1 + bias, dtype=torch.float64)
    parameters = [scale, *([norm.bias] if isinstance(norm, Affine) else [])]
    for x, y in zip(inputs, targets, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), parameters)
        rows = torch.stack([grad.flatten() for grad in grads], dim=1).double()
        wanted += rows[:, :, None] * rows[:, None, :] / len(inputs)
    kfac = build_kfac(model)
    found = measure(model, inputs, lambda out: F.cross_entropy(out, targets), kfac=kfac)["norm/F"]
    assert_close(found, wanted)
    kfac.remove()
