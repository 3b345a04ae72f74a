"""The interface of transforms of a gradient matrix at its owner.

    ∇ ── GRADIENT ── DIRECTION ── UPDATE ── LENGTH ──▶ Δ        one list, made once with the plan
         momentum    inverse                graft, trust region

Layers of one shape form one stack of matrices, and each stage maps a stack to a new one. Numbers that a stage needs of
all updates together (the trust region: ⟨Δ, ∇⟩) are summed over stacks and ranks in one reduction after the last stage;
its factor of them scales every update. The pipeline keeps the state (`states`): saved, resumed and moved to other ranks
by the block's name, and unchanged in a step that the optimizer skips.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar

from torch import Tensor

from kfac_dist.curvature.inverses.precondition import Group

# A transform's tensors for one stack, by key; a new value is assigned, never written into the old one.
State = MutableMapping[str, Tensor]


class Stage(IntEnum):
    """Place of a transform in the list; those of one stage stand in the order in which they are named."""

    GRADIENT = 0
    DIRECTION = 1
    UPDATE = 2
    LENGTH = 3


@dataclass(frozen=True)
class Stack:
    """Gradient matrices of like layers at their owner.

    Attributes:
        gradient: The direction's input, `[k·batch, d_out, d_in]`: the collected gradients of k layers after the
            stage `GRADIENT`. Its last column is the bias's, where the layers have one.
        names: The k layers' blocks.
        damping: λ, with the weight decay that is part of the loss.
        gradient_scale: The factor that gradients carry until the optimizer's step: an engine's loss scale.
        group: The layers' inverses.
    """

    gradient: Tensor
    names: tuple[str, ...]
    damping: float
    gradient_scale: float
    group: Group


class Transform(ABC):
    """One stage; the same object serves every stack of a rank.

    Attributes:
        stage: Its place in the list.
        linear: Whether it multiplies by a fixed symmetric matrix that has no state, and is part of the damped inverse
            as solvers (`cg`, `newton`) call it; the others leave those alone.
        whole_matrix: Whether it needs each layer's matrix whole. One that maps entry by entry also takes the layers of
            a block-tridiagonal chain, whose matrices lie flat, one after the other; its state is shaped like them.
        scales: Whether it has `measure` and `scale`.
    """

    stage: ClassVar[Stage] = Stage.GRADIENT
    linear: ClassVar[bool] = False
    whole_matrix: ClassVar[bool] = True
    scales: ClassVar[bool] = False

    def initial(self, gradient: Tensor) -> dict[str, Tensor]:
        """Return the state of a stack before its first step, by key.

        Args:
            gradient: Of the stack's shape, type and device; its values mean nothing.

        Returns:
            Tensors with one row for each matrix, `[k·batch, ...]`, kept in the gradient's precision.
        """
        return {}

    @abstractmethod
    def apply(self, update: Tensor, stack: Stack, state: State) -> Tensor:
        """Map a stack of updates to new ones.

        Args:
            update: The previous stage's result, `[k·batch, d_out, d_in]`; it must not be written.
            stack: The layers.
            state: The stack's state; new values are assigned to its keys.

        Returns:
            A tensor like `update`, or `update` itself.
        """

    def measure(self, update: Tensor, gradient: Tensor) -> Tensor:
        """Return a number about a stack that adds up over all layers and parameters, 0-dim.

        Args:
            update: The stack's result of `apply`. For parameters without a block, flat: their update.
            gradient: The update's input.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it scales, and lacks measure")

    def scale(self, total: Tensor, gradient_scale: float) -> Tensor:
        """Return the factor of all updates, 0-dim, from the sum of `measure` over all ranks; no host sync.

        Args:
            total: 0-dim, the same on every rank.
            gradient_scale: See `Stack`.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it scales, and lacks scale")

    def replace_plain(self, gradient: Tensor, gradient_scale: float) -> None:  # noqa: B027  most leave those alone
        """Change the gradient, whole or a slice, of a parameter that nothing preconditions; in place."""


def keeps_state(transform: Transform) -> bool:
    """Whether a transform's class has a state; the same on every rank, for any layers."""
    return type(transform).initial is not Transform.initial
