"""Where K-FAC is no approximation: its blocks equal those of the generalised Gauss–Newton matrix.

The GGN is computed from Jacobians: `(1/n) Σ_i J_iᵀ H_i J_i` over the terms of the loss. Blocks are taken in the
layout of the gradient matrix `[d_out, d_in + 1]`, flattened, in which K-FAC's block is `G ⊗ A`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from kfac_dist.curvature.blocks import Block
from tests.curvature.measured import assert_close, build_kfac, measure


def output_hessian(likelihood: str, outputs: Tensor) -> Tensor:
    """∇² of the negative log-likelihood of each term, `[n, C, C]`, from the textbook."""
    match likelihood:
        case "categorical":
            p = outputs.softmax(-1)
            return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        case "bernoulli":
            p = outputs.sigmoid()
            return torch.diag_embed(p * (1 - p))
        case _:
            return torch.eye(outputs.shape[-1], dtype=outputs.dtype).expand(len(outputs), -1, -1)


def ggn_block(model: nn.Module, inputs: Tensor, block: Block, likelihood: str) -> Tensor:
    """The GGN's diagonal block of one K-FAC block, a mean over all terms `outputs[..., :]`."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    own = {name: parameters[name] for name in block.parameters}
    outputs = model(inputs).detach()
    terms, classes = outputs[..., 0].numel(), outputs.shape[-1]
    jacobians = jacrev(lambda p: functional_call(model, {**parameters, **p}, inputs).reshape(terms, classes))(own)
    matrix = torch.zeros(terms * classes, *block.matrix_shape, dtype=outputs.dtype)
    for row, flat in enumerate(matrix):
        tensors = [jacobians[name].reshape(terms * classes, *own[name].shape)[row] for name in block.parameters]
        for values, view in block.matrix_views(tensors, flat):
            view.copy_(values)
    j = matrix.view(terms, classes, -1)
    return (j.mT @ output_hessian(likelihood, outputs.reshape(terms, classes)) @ j).mean(0)


def assert_blocks_are_the_ggn(model: nn.Module, inputs: Tensor, likelihood: str, **curvature: str) -> None:
    kfac = build_kfac(model, fisher="type2", likelihood=likelihood, **curvature)
    found = measure(model, inputs, lambda out: out.sum(), kfac=kfac)
    kfac.remove()
    assert kfac.coverage.blocks
    for block in kfac.coverage.blocks:
        a, g = found[f"{block.name}/A"][0], found[f"{block.name}/G"][0]
        a = torch.diag(a) if a.ndim == 1 else a
        assert_close(torch.kron(g, a), ggn_block(model, inputs, block, likelihood))


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_one_sample_without_sharing(likelihood: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)).double()
    assert_blocks_are_the_ggn(model, torch.randn(1, 4).double(), likelihood)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_one_sample_of_an_embedding_and_a_one_position_convolution(likelihood: str, sharing: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(7, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(3, 4)
    ).double()
    assert_blocks_are_the_ggn(model, torch.tensor([3]), likelihood, sharing=sharing)


def test_deep_linear_network_of_many_samples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, 3)).double()
    assert_blocks_are_the_ggn(model, torch.randn(11, 4).double(), "gaussian")


def test_expand_is_exact_for_deep_linear_networks_with_a_term_a_token() -> None:
    """The expand setting: positions share weights and each has a term of its own (Eschenhagen et al. 2023, Prop. 1)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)).double()
    inputs = torch.randn(3, 5, 4).double()
    kfac = build_kfac(model, fisher="type2", likelihood="gaussian", loss_terms="token", sharing="expand")
    model.zero_grad()
    # Gaussian columns run over all outputs of a sample; a term a token makes them one unit vector a token and output.
    found = measure(model, inputs, lambda out: out.sum(), kfac=kfac)
    for block in kfac.coverage.blocks:
        expected = ggn_block(model, inputs, block, "gaussian")
        assert_close(torch.kron(found[f"{block.name}/G"][0], found[f"{block.name}/A"][0]), expected)


class LinearTokens(nn.Module):
    """Token-shared linear layers, then a mean over positions: the reduce setting."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean(1))


class LinearConvolutions(nn.Module):
    """Convolutions without nonlinearities, then a global average: the reduce setting of a vision model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "shape"), [(LinearTokens, (7, 6, 4)), (LinearConvolutions, (6, 2, 7, 7))], ids=["tokens", "convolutions"]
)
def test_reduce_is_exact_for_deep_linear_networks_with_a_term_a_sample(
    model: type[nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    assert_blocks_are_the_ggn(model().double(), torch.randn(shape).double(), "gaussian", sharing="reduce")


def test_reduce_is_exact_for_a_layer_that_a_forward_pass_uses_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            left, right = x.split(4, dim=1)
            return self.head(self.shared(left) + self.shared(right))

    torch.manual_seed(0)
    assert_blocks_are_the_ggn(Twice().double(), torch.randn(9, 8).double(), "gaussian", sharing="reduce")


class OwnRMSNorm(nn.Module):
    """An RMS norm as people write it; `offset` 1 is Gemma's."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.offset, self.variance_epsilon = offset, 1e-3

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return (self.offset + self.weight) * (x * torch.rsqrt(variance + self.variance_epsilon))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.LayerNorm(6),
    "without shift": lambda: nn.LayerNorm(6, bias=False),
    "torch's rms norm": lambda: nn.RMSNorm(6, eps=1e-3),
    "own rms norm": lambda: OwnRMSNorm(6),
    "rms norm with an offset": lambda: OwnRMSNorm(6, offset=1.0),
}


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("norm", NORMS)
def test_unit_wise_blocks_are_the_ggn_unit_by_unit(norm: str, likelihood: str) -> None:
    """A norm's 2×2 or 1×1 blocks are exact for any number of samples: they are the GGN's entries of (γ_u, β_u)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), NORMS[norm](), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs = torch.randn(8, 4).double()
    kfac = build_kfac(model, fisher="type2", likelihood=likelihood, include=["1"])
    found = measure(model, inputs, lambda out: out.sum(), kfac=kfac)["1/F"]
    (block,) = kfac.coverage.blocks
    width = len(block.parameters)
    whole = ggn_block(model, inputs, block, likelihood).view(6, width, 6, width)
    assert_close(found, torch.stack([whole[u, :, u] for u in range(6)]))
