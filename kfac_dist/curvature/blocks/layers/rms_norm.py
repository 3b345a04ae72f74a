"""RMS norms of any class, such as T5's, LLaMA's and their many copies: recognised by the function that they compute.

    x̂ = x / sqrt(mean(x²) + ε)        y = γ·x̂, or (1 + γ)·x̂ as Gemma's

There are hundreds of such classes, of every name, and some of the same name compute something else (groups, a gate, a
scale before the norm). So a module that looks like one is tried out once, on a few fixed rows, and taken if it answers
as an RMS norm does; no package has to be imported for it.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from kfac_dist.compat.torch import own_parameters, with_parameters
from kfac_dist.curvature.blocks.layers.norm import NormBlock
from kfac_dist.curvature.blocks.rows import batch_first
from kfac_dist.errors import ModelError

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_ROWS = 3
_TOLERANCE = 1e-4


class RMSNormBlock(NormBlock):
    """F: one number for each element of the last dimension."""

    def normalized(self, inputs: Tensor) -> Tensor:
        """See `NormBlock.normalized`."""
        return _normalized(inputs, epsilon_of(self.module) or 0.0)

    def positions(self, tensor: Tensor, batch_size: int | None) -> Tensor:
        """See `NormBlock.positions`."""
        if tensor.shape[-1] != self.units:
            raise ModelError(
                f"layer {self.name} ({type(self.module).__name__}) was given {list(tensor.shape)}, which doesn't end "
                f"in its {self.units} weights: name it in kfac.curvature.exclude"
            )
        return batch_first(tensor, batch_size)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module has one vector for a weight, an ε, one input, and answers as an RMS norm does."""
    own = own_parameters(module) or {}
    weight = own.get("weight")
    if set(own) != {"weight"} or weight is None or isinstance(weight, UninitializedParameter) or weight.ndim != 1:
        return False
    inputs = inspect.signature(type(module).forward).parameters
    return len(inputs) == 2 and epsilon_of(module) is not None and weight.numel() > 1 and _answers(module, weight)


def epsilon_of(module: nn.Module) -> float | None:
    """Return ε, None if the module has none by a name that is known."""
    found = (getattr(module, name, None) for name in _EPSILONS)
    return next((float(value) for value in found if isinstance(value, int | float)), None)


@torch.no_grad()
def _answers(module: nn.Module, weight: Tensor) -> bool:
    """Run the module's code on fixed rows with a weight of our own; its own may be sharded, or hold no values yet."""
    device = torch.device("cpu") if weight.is_meta else weight.device
    ramp = torch.arange(_ROWS * weight.numel(), device=device, dtype=torch.float32).view(_ROWS, -1)
    rows, scale = (0.7 * ramp).sin() + 0.3, 1.5 + ramp[0].cos()
    rows[0] *= 1e-3  # so small that ε shows, and where it stands
    trial = with_parameters(module, {"weight": nn.Parameter(scale)})
    try:
        found = type(module).forward(trial, rows)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False  # it takes other inputs, or needs more than it is given here: no RMS norm
    if not isinstance(found, Tensor) or found.shape != rows.shape:
        return False
    unit = _normalized(rows, epsilon_of(module) or 0.0)
    return any(torch.allclose(found.float(), unit * factor, atol=_TOLERANCE) for factor in (scale, 1 + scale))


def _normalized(rows: Tensor, epsilon: float) -> Tensor:
    return rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + epsilon)
