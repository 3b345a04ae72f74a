"""Momentum of gradient matrices: `M ← μM + (1 − μ)∇`, or with Nesterov's look ahead `(1 − μ)∇ + μM`."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_dist.preconditioner.precondition.transforms.base import Stack, Stage, State, Transform


class Momentum(Transform):
    """Replaces the gradient by its running average, without an engine's loss scale.

    Args:
        decay: μ.
        nesterov: Whether the gradient counts once more.
    """

    stage = Stage.GRADIENT
    whole_matrix = False

    def __init__(self, decay: float, *, nesterov: bool) -> None:
        self._decay = decay
        self._nesterov = nesterov

    def initial(self, gradient: Tensor) -> dict[str, Tensor]:
        """Return M = 0."""
        return {"average": torch.zeros_like(gradient)}

    def apply(self, update: Tensor, stack: Stack, state: State) -> Tensor:
        """See `Transform.apply`."""
        gradient = update if stack.gradient_scale == 1 else update / stack.gradient_scale
        state["average"] = average = state["average"].lerp(gradient, 1 - self._decay)
        return gradient.lerp(average, self._decay) if self._nesterov else average
