"""The damped inverse Fisher: `G⁻¹ ∇ A⁻¹`, or in its eigenbasis, rescaled by second moments under EKFAC."""

from __future__ import annotations

from torch import Tensor

from kfac_dist.preconditioner.precondition.transforms.base import Stack, Stage, State, Transform


class DampedInverse(Transform):
    """Multiplies by the damped inverse; which one is the group's own (`curvature.inverses.precondition`)."""

    stage = Stage.DIRECTION
    linear = True
    whole_matrix = False

    def apply(self, update: Tensor, stack: Stack, state: State) -> Tensor:
        """See `Transform.apply`."""
        return stack.group.apply(update, stack.damping)
