"""RMS norms are known by what they compute, whatever they are called; what only looks like one is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.config.schema import CurvatureConfig
from kfac_dist.curvature.blocks import find_blocks
from kfac_dist.curvature.blocks.layers.rms_norm import RMSNormBlock, is_rms_norm
from tests.curvature.measured import assert_close, build_kfac, measure


class Like(nn.Module):
    """Looks like an RMS norm; the name says what it computes."""

    def __init__(self, kind: str, width: int = 6) -> None:
        super().__init__()
        self.kind, self.eps = kind, 1e-6
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        match self.kind:
            case "rms norm":
                return unit * self.weight
            case "offset":
                return unit * (1 + self.weight)
            case "half":  # computed in fp32, returned as it came
                return (unit.float() * self.weight.float()).to(x.dtype)
            case "mean":
                return (x - x.mean(-1, keepdim=True)) * self.weight
            case "groups":
                rows = x.unflatten(-1, (2, -1))
                return (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight
            case "scale before":
                return F.rms_norm(x * self.weight, (x.shape[-1],), eps=self.eps)
            case "epsilon outside":
                return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight
            case "gate":
                return unit * self.weight * torch.sigmoid(x)
            case "images":
                return unit[:, :, None, None] * self.weight[:, None, None]
            case _:  # only images
                _, channels, _, _ = x.shape
                return x * self.weight[:channels, None, None]


class Gated(Like):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Shifted(Like):
    def __init__(self) -> None:
        super().__init__("rms norm")
        self.bias = nn.Parameter(torch.zeros(6))


@pytest.mark.parametrize("kind", ["rms norm", "offset", "half"])
def test_rms_norms_are_recognised(kind: str) -> None:
    assert is_rms_norm(Like(kind))
    assert is_rms_norm(Like(kind).to("meta"))
    assert is_rms_norm(Like(kind).bfloat16())


@pytest.mark.parametrize("kind", ["mean", "groups", "scale before", "epsilon outside", "gate", "images", "only images"])
def test_what_computes_something_else_is_not(kind: str) -> None:
    assert not is_rms_norm(Like(kind))


def test_what_has_other_inputs_or_parameters_is_not() -> None:
    without = Like("rms norm")
    del without.eps
    for module in (Gated("rms norm"), Shifted(), without, Like("rms norm", 1), nn.Linear(6, 6), nn.PReLU()):
        assert not is_rms_norm(module)


def test_the_trial_leaves_no_trace() -> None:
    norm = Like("rms norm")
    calls: list[nn.Module] = []
    norm.register_forward_hook(lambda module, args, output: calls.append(module))
    weight = norm.weight
    coverage = find_blocks(nn.Sequential(nn.Linear(4, 6), norm), CurvatureConfig())
    assert [type(block) for block in coverage.blocks[1:]] == [RMSNormBlock]
    assert norm.weight is weight
    assert weight.grad is None
    assert not calls
    assert not coverage.uncovered


def test_positions_and_heads_add_up_as_torchs_own_norm_has_it() -> None:
    """The same factors as `nn.RMSNorm`'s, for `[B, T, d]` and for heads `[B, T, h, d]`."""

    class Heads(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.first, self.norm, self.head = nn.Linear(5, 12), norm, nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.first(x).unflatten(-1, (2, 6))).tanh().flatten(-2))

    inputs, found = torch.randn(4, 7, 5), []
    for norm in (nn.RMSNorm(6, eps=1e-6), Like("rms norm")):
        torch.manual_seed(0)
        model = Heads(norm)
        kfac = build_kfac(model, fisher="type2", likelihood="categorical", loss_terms="token")
        found.append(measure(model, inputs, lambda out: out.square().mean(), kfac=kfac)["norm/F"])
        kfac.remove()
    assert_close(*found)
