"""The trust region by KL: one number of all layers sets the length of the step; no host sync.

    Δ ← Δ · min(1, sqrt(κ / (lr² ⟨Δ, ∇⟩)))        ⟨Δ, ∇⟩: a number that a row of ranks adds up

With F̂Δ = ∇ for the damped approximate Fisher F̂, `½ lr² ⟨Δ, ∇⟩ = ½ (lr Δ)ᵀ F̂ (lr Δ)` is the KL divergence that a step by
lr·Δ is predicted to make (per loss term); the trust region keeps it at κ/2 and below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kfac_dist.config.schema import UpdateConfig
from kfac_dist.curvature.device_ops import scalar
from kfac_dist.errors import ModelError
from kfac_dist.preconditioner.precondition.transforms.base import Stack, Stage, State, Transform


class HasRates(Protocol):
    """A source of learning rates: an optimizer, or those groups of one that hold the model's parameters."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters, each with its `lr`."""


class TrustRegion(Transform):
    """Shortens the step to a KL divergence; the last of the list, where the configuration wants it.

    Args:
        config: κ, and which lr it holds for.
        optimizer: Has the learning rate of the trust region.
        device: Device of the preconditioning.
        dtype: In which precision.

    Attributes:
        kl_scale: ν, by which the trust region shortened the last step, 0-dim.
        predicted_kl: KL divergence that the last step, so shortened, is predicted to make, 0-dim.

    Raises:
        ModelError: The trust region needs a learning rate, and there is none.
    """

    stage = Stage.LENGTH
    whole_matrix = False
    scales = True

    def __init__(
        self, config: UpdateConfig, optimizer: HasRates | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        if config.kl_clip is not None and config.kl_clip_lr == "current" and optimizer is None:
            raise ModelError(
                "the KL clip needs the learning rate: pass KFAC(..., optimizer=optimizer), set "
                "kfac.update.kl_clip_lr to a number, or switch it off with kfac.update.kl_clip: null"
            )
        self._config = config
        self._optimizer = optimizer
        self.kl_scale = torch.ones((), device=device, dtype=dtype)
        self.predicted_kl = torch.zeros((), device=device, dtype=dtype)

    def apply(self, update: Tensor, stack: Stack, state: State) -> Tensor:
        """See `Transform.apply`: nothing before ⟨Δ, ∇⟩ of all layers is known."""
        return update

    def measure(self, update: Tensor, gradient: Tensor) -> Tensor:
        """Return ⟨Δ, ∇⟩; see `Transform.measure`."""
        return torch.dot(update.flatten(), gradient.flatten())

    def scale(self, total: Tensor, gradient_scale: float) -> Tensor:
        """Return ν; see `Transform.scale`."""
        clip = self._config.kl_clip
        assert clip is not None
        length = self._lr() / gradient_scale
        divergence = total * length**2
        tiny = torch.finfo(divergence.dtype).tiny
        self.kl_scale = (clip / divergence.clamp(min=tiny)).sqrt().clamp(max=1.0)
        self.predicted_kl = 0.5 * divergence * self.kl_scale**2
        return self.kl_scale

    def _lr(self) -> float | Tensor:
        """Return the lr of the trust region: the largest of the groups, so that it holds for all of them."""
        fixed = self._config.kl_clip_lr
        if not isinstance(fixed, str):
            return fixed
        assert self._optimizer is not None
        rates = [group["lr"] for group in self._optimizer.param_groups]
        rates = [scalar(rate) if isinstance(rate, Tensor) else rate for rate in rates]
        return rates[0] if len(rates) == 1 else _largest(rates)


def _largest(rates: Sequence[float | Tensor]) -> float | Tensor:
    """Return the largest of numbers and 0-dim tensors without asking the device, as `max` would."""
    numbers = [rate for rate in rates if not isinstance(rate, Tensor)]
    tensors = [rate for rate in rates if isinstance(rate, Tensor)]
    if not tensors:
        return max(numbers)
    largest = torch.stack(tensors).amax()
    return largest.clamp(min=max(numbers)) if numbers else largest
