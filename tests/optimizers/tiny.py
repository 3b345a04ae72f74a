"""Tiny models with their losses, and the dense curvature that products with it are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import hessian
from torch.nn import functional

IGNORED = -100


@dataclass(frozen=True)
class Case:
    """A model with a batch; `total` sums the loss's terms, of which there are `terms`."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    total: Callable[[Tensor, Tensor], Tensor]
    terms: int


class Attention(nn.Module):
    """Tied embedding and head around one layer of attention: a token model in few parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        query, key, value = self.mix(x).chunk(3, dim=-1)
        x = x + functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return functional.linear(x, self.table.weight)


def cases() -> dict[str, Case]:
    """One model for each likelihood, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    inputs = torch.randn(6, 3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 1, 0])
    tokens = torch.randint(7, (3, 5))
    next_tokens = tokens.roll(-1, 1)
    next_tokens[0, 2:] = IGNORED
    normed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.4), nn.Linear(4, 2)).double()
    return {
        "categorical": Case(net, inputs, labels, _cross_entropy, 6),
        "bernoulli": Case(net, inputs, torch.rand(6, 4, dtype=torch.float64), _sigmoid, 6),
        "gaussian": Case(net, inputs, torch.randn(6, 4, dtype=torch.float64), _squared, 6),
        "tokens": Case(Attention().double(), tokens, next_tokens, _token_cross_entropy, 12),
        "dropout and batch norm": Case(normed, inputs, labels % 2, _cross_entropy, 6),
    }


def dense(case: Case, parameters: dict[str, Tensor]) -> Tensor:
    """`(1/n) Jᵀ H J` over the parameters in their order, by reverse mode alone."""
    outputs = case.model(case.inputs)
    rows = torch.autograd.grad(
        outputs,
        list(parameters.values()),
        torch.eye(outputs.numel(), dtype=outputs.dtype).view(-1, *outputs.shape),
        is_grads_batched=True,
    )
    jacobian = torch.cat([row.flatten(1) for row in rows], dim=1)
    curved = hessian(lambda flat: case.total(flat.view(outputs.shape), case.targets))(outputs.detach().flatten())
    return jacobian.T @ curved @ jacobian / case.terms


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum")


def _token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def _sigmoid(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")


def _squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.mse_loss(outputs, targets, reduction="sum") / 2
