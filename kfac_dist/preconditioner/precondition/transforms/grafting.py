"""Grafting: the direction of one method, the length of another's step.

    Δ ← Δ · ‖M‖ / ‖Δ‖        M = ∇ (`gradient`, the step of plain descent) or sign ∇ (`sign`, close to Adam's)

After Agarwal et al. 2020, "Disentangling Adaptive Gradient Methods from Learning Rates". A block's Δ and ∇ lie whole
where the block is preconditioned, so that no norm has to travel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_dist.config.schema import Graft
from kfac_dist.preconditioner.precondition.transforms.base import Stack, Stage, State, Transform


class Grafting(Transform):
    """Gives each block's update the norm of a first-order step.

    Args:
        graft: The method whose step is M.
    """

    stage = Stage.LENGTH

    def __init__(self, graft: Graft) -> None:
        self._graft = graft

    def apply(self, update: Tensor, stack: Stack, state: State) -> Tensor:
        """See `Transform.apply`; a block without an update stays zero."""
        rows = update.reshape(len(stack.names), -1)
        factors = ratio(self._squares(stack), rows.square().sum(1))
        return (rows * factors[:, None]).view(update.shape)

    def replace_plain(self, gradient: Tensor, gradient_scale: float) -> None:
        """Turn a gradient into M, in place; non-finite values stay non-finite, so that they are detected later."""
        if self._graft is Graft.SIGN:
            gradient.copy_(torch.where(gradient == 0, 0.0, gradient / gradient.abs()) * gradient_scale)

    def _squares(self, stack: Stack) -> Tensor:
        """Return `‖M‖²` of each block, `[k]`."""
        rows = stack.gradient.reshape(len(stack.names), -1)
        match self._graft:
            case Graft.GRADIENT:
                return rows.square().sum(1)
            case Graft.SIGN:
                return (rows != 0).sum(1) * stack.gradient_scale**2


def ratio(squares: Tensor, found: Tensor) -> Tensor:
    """Return `sqrt(squares / found)`, 0 where nothing was found."""
    return torch.where(found == 0, 0.0, (squares / found).sqrt())
