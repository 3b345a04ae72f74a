"""AdamW's step (Loshchilov & Hutter 2019) for parameters that are no orthogonalised weight matrix.

    m ← β₁m + (1 − β₁)∇,  v ← β₂v + (1 − β₂)∇²,  Δ = r · (m / (1 − β₁ᵗ)) / (sqrt(v / (1 − β₂ᵗ)) + ε)

Plain SGD with the learning rate of orthogonal steps takes the step; r is AdamW's rate as a multiple of it. A step that
the optimizer skips, because some gradient isn't finite, leaves m, v and t as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_dist.config.schema import FirstOrderConfig
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.engines import Engine
from kfac_dist.errors import ConfigError
from kfac_dist.preconditioner.precondition.transforms.trust_region import HasRates
from kfac_dist.preconditioner.precondition.uncovered import UncoveredGradients


def check_plain_descent(optimizer: HasRates | None) -> None:
    """Refuse an optimizer that would change the direction or the length of the steps that it is handed.

    Raises:
        ConfigError: It has averages of its own.
    """
    for group in [] if optimizer is None else optimizer.param_groups:
        for key in ("betas", "momentum", "alpha"):
            if group.get(key):
                raise ConfigError(
                    f"kfac.update.direction orthogonal has its own momentum, and the optimizer has {key} {group[key]}; "
                    "use torch.optim.SGD with momentum 0 (in a run's file optimizer: {name: sgd, momentum: 0.0})"
                )


class FirstOrder(UncoveredGradients):
    """Turns gradients into AdamW's steps, without its weight decay.

    Args:
        config: Rates and decays.
        engine: The engine, which holds the gradients.
        names: The parameters, the same on every rank.
        row: The ranks that together hold each gradient once, if the engine is sharded.
        device: The gradients' device.
        dtype: Precision of the averages.
    """

    key = "first_order"
    stateful = True

    def __init__(
        self,
        config: FirstOrderConfig,
        engine: Engine,
        names: Sequence[str],
        *,
        row: Communicator,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(engine, names, row=row, device=device, dtype=dtype)
        self._config = config
        self._mean = torch.zeros_like(self.gradient)
        self._square = torch.zeros_like(self.gradient)
        self._steps = torch.zeros((), device=device, dtype=torch.float64)

    def apply(self, damping: float, taken: Tensor | None) -> Tensor:
        """See `UncoveredGradients.apply`."""
        assert taken is not None
        scale, (first, second) = self._engine.gradient_scale, self._config.betas
        gradient = self.gradient if scale == 1 else self.gradient / scale
        for average, new, decay in ((self._mean, gradient, first), (self._square, gradient.square(), second)):
            torch.where(taken, average.lerp(new, 1 - decay), average, out=average)
        self._steps += taken
        corrections = [(1 - beta**self._steps).to(self.gradient.dtype) for beta in (first, second)]
        root = (self._square / corrections[1]).sqrt_().add_(self._config.eps)
        return (self._mean / corrections[0]).div_(root).mul_(self._config.lr_ratio * scale)

    def state_dict(self) -> dict[str, Any]:
        """See `UncoveredGradients.state_dict`."""
        return {
            "steps": self._steps.clone(),
            "means": self._gathered(self._mean),
            "squares": self._gathered(self._square),
        }

    def load_state_dict(self, values: Mapping[str, Any] | None) -> None:
        """See `UncoveredGradients.load_state_dict`."""
        for key, flat in (("means", self._mean), ("squares", self._square)):
            own = {} if values is None else values[key]
            reason = "it belongs to another model, or was saved with other kfac.update.direction or exclude"
            self._check(own, f"first-order state ({key})", reason)
            if values is not None:
                self._restore(flat, own)
        if values is not None:
            self._steps.copy_(values["steps"])
