"""The length of a step: grafting, then the trust region by KL; no host sync, and at most one reduction for all layers.

    graft           Δ_b ← Δ_b · ‖M_b‖ / ‖Δ_b‖                     where the block is preconditioned
    trust region    Δ ← Δ · min(1, sqrt(κ / (lr² ⟨Δ, ∇⟩)))        ⟨Δ, ∇⟩: a number that a row of ranks adds up

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
from kfac_dist.curvature.inverses.precondition import Group
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.engines import Engine
from kfac_dist.errors import ModelError
from kfac_dist.preconditioner.precondition.diagonal_fisher import DiagonalFisher
from kfac_dist.preconditioner.precondition.grafting import first_order_step, graft_blocks, step_squares
from kfac_dist.preconditioner.precondition.preconditioner import Updates

LABEL = "kl_clip"


class HasRates(Protocol):
    """A source of learning rates: an optimizer, or those groups of one that hold the model's parameters."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters, each with its `lr`."""


class TrustRegion:
    """Sets the length of preconditioned gradients.

    Args:
        config: What is done with them.
        engine: Where the gradients are.
        optimizer: Has the learning rate of the trust region.
        row: The ranks that together hold each update once.
        diagonal: The parameters without a block that have a diagonal Fisher.
        plain: Those that have none.
        device: Where preconditioning happens.
        dtype: In which precision.

    Attributes:
        kl_scale: ν, by which the trust region shortened the last step, 0-dim.
        predicted_kl: KL divergence that the last step, so shortened, is predicted to make, 0-dim.

    Raises:
        ModelError: The trust region needs a learning rate that nobody has.
    """

    def __init__(
        self,
        config: UpdateConfig,
        engine: Engine,
        optimizer: HasRates | None,
        row: Communicator,
        diagonal: DiagonalFisher,
        plain: Sequence[str],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if config.kl_clip is not None and config.kl_clip_lr == "current" and optimizer is None:
            raise ModelError(
                "the KL clip needs the learning rate: pass KFAC(..., optimizer=optimizer), set "
                "kfac.update.kl_clip_lr to a number, or switch it off with kfac.update.kl_clip: null"
            )
        self._config = config
        self._engine = engine
        self._optimizer = optimizer
        self._row = row
        self._diagonal = diagonal
        self._plain = plain
        self._device = device
        self.kl_scale = torch.ones((), device=device, dtype=dtype)
        self.predicted_kl = torch.zeros((), device=device, dtype=dtype)

    def shape(self, group: Group, update: Tensor) -> Tensor:
        """Graft a group's update, in place, and return its share of ⟨Δ, ∇⟩, which `scale` needs.

        Args:
            group: A group that was preconditioned.
            update: Its Δ.
        """
        graft = self._config.graft
        if graft is not None:
            squares = step_squares(group.gradient, len(group.blocks), graft, self._engine.gradient_scale)
            graft_blocks(update, squares)
        return torch.dot(update.flatten(), group.gradient.flatten())

    def scale(self, updates: Updates) -> Tensor | None:
        """Return the factor of all updates, 0-dim, the same on every rank; None if they are as long as they should be.

        Collective, unless the configuration wants nothing.
        """
        clip = self._config.kl_clip
        if clip is None:
            return None
        product = torch.zeros(1, device=self._device, dtype=self.kl_scale.dtype)
        product += torch.stack(updates.sums).sum() if updates.sums else 0.0
        for own in self._diagonal.products(updates.diagonal):
            product += own
        self._row.all_reduce(product, label=LABEL).wait()
        length = self._lr() / self._engine.gradient_scale
        divergence = product[0] * length**2
        tiny = torch.finfo(divergence.dtype).tiny
        self.kl_scale = (clip / divergence.clamp(min=tiny)).sqrt().clamp(max=1.0)
        self.predicted_kl = 0.5 * divergence * self.kl_scale**2
        return self.kl_scale

    def replace_plain(self, gradients: dict[str, Tensor]) -> None:
        """Give the parameters that nothing preconditions the step whose length the others have; in place."""
        if self._config.graft is not None:
            for name in self._plain:
                if name in gradients:
                    first_order_step(gradients[name], self._config.graft, self._engine.gradient_scale)

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
