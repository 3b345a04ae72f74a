"""Factors and updates by autograd and dense linear algebra, knowing nothing of how blocks find their rows.

A layer is linear in its weight, so the row that meets output position (b, t) is the gradient of that output entry with
respect to the weights that feed it: whatever padding, stride or layout the layer has, autograd has it right.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Positions = Callable[[Tensor], Tensor]


def positions_of(layer: nn.Module, outputs: Tensor) -> Tensor:
    """A batch-first output as `[B, T, d_out]`."""
    if isinstance(layer, Convolution):
        outputs = outputs if outputs.ndim > len(layer.kernel_size) + 1 else outputs[None]
        return outputs.flatten(2).mT
    outputs = outputs if outputs.ndim > 1 else outputs[None]
    return outputs.reshape(outputs.shape[0], -1, outputs.shape[-1])


def groups_of(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, Convolution) else 1


def input_rows(layer: nn.Module, inputs: Tensor, positions: Positions | None = None) -> Tensor:
    """`[groups, B, T, d_in(+1)]`."""
    outputs = layer(inputs)
    outputs = positions_of(layer, outputs) if positions is None else positions(outputs)
    samples, length, width = outputs.shape
    trained = [p for p in layer.parameters() if p.requires_grad]
    rows = []
    for channel in range(0, width, width // groups_of(layer)):
        entries = outputs[..., channel].flatten()
        grads = each_gradient(entries, trained, batched=not isinstance(layer, nn.Embedding))
        own = [grad[:, :, channel] if isinstance(layer, nn.Embedding) else grad[:, channel] for grad in grads]
        rows.append(torch.cat([grad.reshape(len(entries), -1) for grad in own], dim=1))
    return torch.stack(rows).view(groups_of(layer), samples, length, -1).double()


def each_gradient(entries: Tensor, parameters: list[Tensor], *, batched: bool) -> list[Tensor]:
    """The gradient of every entry with respect to every parameter, `[entries, *shape]`."""
    if batched:
        each = torch.eye(len(entries))
        return list(torch.autograd.grad(entries, parameters, each, retain_graph=True, is_grads_batched=True))
    single = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in entries]
    return [torch.stack(found) for found in zip(*single, strict=True)]


def output_rows(
    layer: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor], positions: Positions | None = None
) -> Tensor:
    """`[groups, B, T, d_out/groups]`, gradients of the loss as it is."""
    outputs = layer(inputs).detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(outputs), outputs)
    rows = positions_of(layer, grad) if positions is None else positions(grad)
    return rows.unflatten(-1, (groups_of(layer), -1)).permute(2, 0, 1, 3).double()


def expected_factors(a: Tensor, g: Tensor, sharing: str, terms: float) -> tuple[Tensor, Tensor]:
    """A and G from rows `[groups, B, T, d]` and raw output gradients, for a loss that is a mean of n terms."""
    g = g * terms
    if sharing == "expand":
        rows_a, rows_g = a.flatten(1, 2), g.flatten(1, 2)
    else:
        rows_a, rows_g = a.mean(2), g.sum(2)
    return rows_a.mT @ rows_a / rows_a.shape[1], rows_g.mT @ rows_g / terms


def gradient_matrix(layer: nn.Module) -> Tensor:
    """The layer's gradients as `[groups, d_out/groups, d_in(+1)]`, the bias as the last column."""
    weight = layer.weight.grad
    assert isinstance(weight, Tensor)
    weight = weight.mT if isinstance(layer, nn.Embedding) else weight.flatten(1)
    bias = getattr(layer, "bias", None)
    parts = [weight] if bias is None or not bias.requires_grad else [weight, bias.grad[:, None]]
    return torch.cat(parts, dim=1).unflatten(0, (groups_of(layer), -1)).double()


def expected_update(gradient: Tensor, a: Tensor, g: Tensor, damping: float, *, exact: bool) -> Tensor:
    """Solve the whole damped Kronecker matrix of every group."""
    damped = _damped(a, g, damping, exact=exact)
    return torch.stack(
        [torch.linalg.solve(m, grad.flatten()).view_as(grad) for m, grad in zip(damped, gradient, strict=True)]
    )


def rounding(a: Tensor, g: Tensor, damping: float, *, exact: bool) -> float:
    """What solving in fp32 may be off by, relative to the result: κ·ε of the worst-conditioned group."""
    condition = max(float(torch.linalg.cond(matrix)) for matrix in _damped(a, g, damping, exact=exact))
    return condition * torch.finfo(torch.float32).eps


def _damped(a: Tensor, g: Tensor, damping: float, *, exact: bool) -> list[Tensor]:
    """Return the whole damped Kronecker matrix of every group."""
    mean = [f.diagonal(dim1=1, dim2=2).mean() for f in (a, g)]
    pi = math.sqrt(mean[0] / mean[1]) if mean[0] > 0 and mean[1] > 0 else 1.0
    root, found = math.sqrt(damping), []
    for own_a, own_g in zip(a, g, strict=True):
        eye_a, eye_g = (torch.eye(len(f), dtype=torch.float64) for f in (own_a, own_g))
        if exact:
            found.append(torch.kron(own_g, own_a) + damping * torch.kron(eye_g, eye_a))
        else:
            found.append(torch.kron(own_g + root / pi * eye_g, own_a + pi * root * eye_a))
    return found
