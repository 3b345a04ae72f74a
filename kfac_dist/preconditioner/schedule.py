"""At which steps K-FAC measures and refreshes: pure, so that every rank and every resumed run agrees."""

from __future__ import annotations

from dataclasses import dataclass

from kfac_dist.config.schema import KFACConfig


@dataclass(frozen=True)
class Cadence:
    """The intervals of one configuration.

    With `stagger` slots, slot s refreshes at its own offset in every window of `inverse_every` steps, so that no step
    inverts everything. The very first step measures and refreshes all slots: nothing is preconditioned by a guess.

    Attributes:
        factor_every: Steps between measurements.
        inverse_every: Steps between refreshes of one slot.
        slots: Number of slots.
        lag: Steps between a refresh and its first use.
    """

    factor_every: int
    inverse_every: int
    slots: int
    lag: int

    @classmethod
    def of(cls, config: KFACConfig) -> Cadence:
        """Return the cadence of a configuration."""
        inversion = config.inversion
        return cls(config.curvature.factor_every, inversion.inverse_every, inversion.stagger, inversion.inverse_lag)

    def measures(self, step: int) -> bool:
        """Whether statistics are measured in this step's backward pass."""
        return step % self.factor_every == 0

    def due(self, step: int) -> tuple[int, ...]:
        """Return the slots whose inverses are refreshed after this step's measurement."""
        if step == 0:
            return tuple(range(self.slots))
        return tuple(slot for slot in range(self.slots) if step % self.inverse_every == self._offset(slot))

    def _offset(self, slot: int) -> int:
        measurements = self.inverse_every // self.factor_every
        return slot * measurements // self.slots * self.factor_every
