"""λ: the configured value, its adaptation, and changes by the run.

    configured(step) × adapted ─┐
    set by hand, if it is ──────┴─▶ × the factor that the run sets ─▶ λ

All of it that no configuration says is in checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kfac_dist.config.schedules import Schedule, value_at
from kfac_dist.errors import ConfigError
from kfac_dist.preconditioner.invert.damping_rules import DampingAdaptation

# Stands for "none" in a state, where no damping can: one is finite.
_NONE = math.inf


class Damping:
    """λ of one K-FAC, without the weight decay that is part of the loss; the same on every rank.

    Args:
        configured: A number, or a schedule over steps.
        adaptation: The configured value's adaptation to the trust region, if any.
        total_steps: Length of the run, for schedules that span it.
        l2: Weight decay that is part of the loss.

    Attributes:
        adaptation: The configured value's adaptation to the trust region.
        factor: Factor of λ; 1 at first.
        own: λ in place of the configured one; None if there is none.
    """

    def __init__(
        self, configured: Schedule, adaptation: DampingAdaptation, total_steps: int | None, l2: float = 0.0
    ) -> None:
        self.adaptation = adaptation
        self.factor = 1.0
        self.own: float | None = None
        self._configured = configured
        self._total_steps = total_steps
        self._l2 = l2

    def multiply(self, factor: float) -> None:
        """Multiply λ from now on.

        Raises:
            ConfigError: The factor is not a positive number.
        """
        if not (math.isfinite(factor) and factor > 0):
            raise ConfigError(f"multiply_damping({factor}): it takes a positive number, 1 for no change")
        self.factor = factor

    def set(self, value: float | None) -> None:
        """Take λ in place of the configured one; None returns to that.

        Raises:
            ConfigError: It is not positive, with the weight decay that is part of the loss.
        """
        if value is not None and not (math.isfinite(value) and value + self._l2 > 0):
            raise ConfigError(
                f"set_damping({value}): together with kfac.update.l2 ({self._l2:g}) it has to be a positive number; "
                "None returns to the configured damping"
            )
        self.own = value

    def at(self, step: int) -> float:
        """Return λ of a step."""
        if self.own is not None:
            return self.factor * self.own
        return self.factor * value_at(self._configured, step, self._total_steps) * self.adaptation.factor

    def state_dict(self) -> dict[str, Tensor]:
        """Return the run's changes of λ; the adaptation has its own state."""
        own = _NONE if self.own is None else self.own
        return {
            name: torch.tensor(value, dtype=torch.float64) for name, value in (("factor", self.factor), ("own", own))
        }

    def load_state_dict(self, values: Mapping[str, Tensor] | None) -> None:
        """Load the result of `state_dict`; None, from a state of an older version, changes nothing."""
        if values is None:
            return
        self.factor, own = float(values["factor"]), float(values["own"])
        self.own = None if own == _NONE else own
