"""Grafting: the direction of one method, the length of another's step.

    Δ ← Δ · ‖M‖ / ‖Δ‖        M = ∇ (`gradient`, the step of plain descent) or sign ∇ (`sign`, close to Adam's)

After Agarwal et al. 2020, "Disentangling Adaptive Gradient Methods from Learning Rates". A block's Δ and ∇ lie whole
where the block is preconditioned, so that no norm has to travel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_dist.config.schema import Graft


def step_squares(gradient: Tensor, blocks: int, graft: Graft, gradient_scale: float) -> Tensor:
    """Return `‖M‖²` of each block, `[blocks]`.

    Args:
        gradient: The blocks' gradients, stacked: `[blocks · batch, d_out, d_in]`.
        blocks: How many blocks they are.
        graft: Whose step M is.
        gradient_scale: The factor that gradients carry, and updates will be divided by.
    """
    rows = gradient.reshape(blocks, -1)
    match graft:
        case Graft.GRADIENT:
            return rows.square().sum(1)
        case Graft.SIGN:
            return (rows != 0).sum(1) * gradient_scale**2


def graft_blocks(update: Tensor, squares: Tensor) -> None:
    """Give each block of an update the norm of M, in place; a block without an update stays zero."""
    rows = update.view(len(squares), -1)
    rows.mul_(ratio(squares, rows.square().sum(1))[:, None])


def ratio(squares: Tensor, found: Tensor) -> Tensor:
    """Return `sqrt(squares / found)`, 0 where nothing was found."""
    return torch.where(found == 0, 0.0, (squares / found).sqrt())


def first_order_step(gradient: Tensor, graft: Graft, gradient_scale: float) -> None:
    """Turn a gradient that no block covers into M, in place; what isn't finite stays so, for whoever looks for it."""
    if graft is Graft.SIGN:
        gradient.copy_(torch.where(gradient == 0, 0.0, gradient / gradient.abs()) * gradient_scale)
