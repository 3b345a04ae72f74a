"""Two dampings that follow the run: λ of the quadratic model, γ of the proposal (Martens & Grosse 2015, §6.5 and §6.6).

    λ   every T₁ steps, by how well the model foretold the loss:  ρ = (h(θ+δ) − h(θ)) / M(δ)
        ρ > ¾: λ ← ω₁λ      ρ < ¼: λ ← λ/ω₁      ω₁ = (19/20)^T₁
        λ ← λ/ω₁ as well where M has no minimum: it curves down
    γ   every T₂ steps, the one of {γ, ω₂γ, γ/ω₂} whose step has the lowest M(δ);  ω₂ = (19/20)^(T₂/2)

Plain numbers: the caller passes values that all ranks have agreed on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RATE = 19 / 20
_GOOD, _BAD = 0.75, 0.25


@dataclass(frozen=True)
class Bounds:
    """The bounds of λ."""

    lowest: float
    highest: float

    def clip(self, value: float) -> float:
        """Return the nearest value inside."""
        return min(max(value, self.lowest), self.highest)


class LevenbergMarquardt:
    """λ, the strength of the trust region around the quadratic model.

    Args:
        damping: λ at first.
        every: T₁, steps between two changes; 0 keeps λ.
        bounds: Bounds of λ.

    Attributes:
        damping: λ now.
    """

    def __init__(self, damping: float, every: int, bounds: Bounds) -> None:
        self.damping = damping
        self._every = every
        self._bounds = bounds

    def due(self, step: int) -> bool:
        """Whether λ is judged by this step, counted from 0: the last of every T₁."""
        return self._every > 0 and (step + 1) % self._every == 0

    def judge(self, change: float, predicted: float, *, curved_down: bool = False) -> float:
        """Adapt λ to one step, and return ρ.

        A loss that isn't finite speaks against the model as one that rose does. A model that predicts nothing (a zero
        step) says nothing either: ρ is NaN, and λ stays. One without a minimum needs more λ, for any prediction.

        Args:
            change: h(θ+δ) − h(θ), on one batch.
            predicted: M(δ), at most 0.
            curved_down: Whether M has a direction without positive curvature.
        """
        rho = math.nan
        if predicted < 0:
            rho = change / predicted if math.isfinite(change) else -math.inf
        rate = RATE**self._every
        if curved_down or rho < _BAD:
            self.damping = self._bounds.clip(self.damping / rate)
        elif rho > _GOOD:
            self.damping = self._bounds.clip(self.damping * rate)
        return rho

    def state_dict(self) -> dict[str, float]:
        """Return λ."""
        return {"damping": self.damping}

    def load_state_dict(self, values: Mapping[str, float]) -> None:
        """Take what `state_dict` returned."""
        self.damping = float(values["damping"])


class GammaSearch:
    """γ, the square root of the damping that the inverses of the proposal carry.

    It begins at √(λ+η) and then goes its own way: how much the approximation of the Fisher has to be damped isn't how
    far the quadratic model can be trusted.

    Args:
        damping: λ at first.
        l2: η, weight decay that is part of the loss.
        every: T₂, steps between two searches; 0 keeps γ.
        bounds: Bounds of γ² − η.

    Attributes:
        gamma: γ now.
    """

    def __init__(self, damping: float, l2: float, every: int, bounds: Bounds) -> None:
        self.gamma = math.sqrt(damping + l2)
        self._l2 = l2
        self._every = every
        self._bounds = bounds

    def due(self, step: int) -> bool:
        """Whether this step, counted from 0, searches; the first has only just begun with √(λ+η)."""
        return self._every > 0 and step > 0 and step % self._every == 0

    def candidates(self) -> tuple[float, ...]:
        """Return the values to try, without those that the bounds make equal; the present one is the first."""
        rate = RATE ** (self._every / 2)
        lowest, highest = (math.sqrt(bound + self._l2) for bound in (self._bounds.lowest, self._bounds.highest))
        others = (min(max(gamma, lowest), highest) for gamma in (rate * self.gamma, self.gamma / rate))
        return (self.gamma, *(gamma for gamma in others if gamma != self.gamma))

    def choose(self, candidates: Sequence[float], predicted: Sequence[float]) -> int:
        """Take the candidate with the lowest M(δ), and return its place; of equal ones the first.

        Values that aren't finite lose; if all do, the present γ stays.
        """
        finite = [value if math.isfinite(value) else math.inf for value in predicted]
        best = finite.index(min(finite))
        self.gamma = candidates[best]
        return best

    def state_dict(self) -> dict[str, float]:
        """Return γ."""
        return {"gamma": self.gamma}

    def load_state_dict(self, values: Mapping[str, float]) -> None:
        """Take what `state_dict` returned."""
        self.gamma = float(values["gamma"])
