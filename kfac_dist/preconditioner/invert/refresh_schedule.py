"""At which steps K-FAC measures and refreshes: pure, so that every rank and every resumed run agrees.

factor_every 10, inverse_every 50, early_refresh 1
step        0 1 2   4       8   10        16        20  …  30  32  …  40  …  50  …  60  …
measures    ● ● ●   ●       ●   ●         ●         ●      ●   ●      ●      ●      ●
refreshes   ● ● ●   ●       ●             ●                    ●             ●

With `curvature.stagger` the layers take turns in being measured, and `inversion.stagger` cuts each turn's layers into
slots that refresh in different turns; factor_every 10 with 5 parts, inverse_every 30 with 15 slots, from step 30 on:

step             30      32      34      36      38      40      42      …   60
measures part    0       1       2       3       4       0       1           0
refreshes slot   0       3       6       9       12      1       4           0
"""

from __future__ import annotations

from dataclasses import dataclass

from kfac_dist.config.schema import Direction, KFACConfig, Solver


@dataclass(frozen=True)
class RefreshSchedule:
    """The intervals of one configuration.

    With `stagger` slots, slot s refreshes at its own offset in every window of `inverse_every` steps, so that no step
    inverts everything. Layers are measured in `parts`, each at its own offset in every window of `factor_every` steps;
    consecutive slots are of one part, so that a slot refreshes at steps that measure it. The very first step measures
    and refreshes all slots: nothing is preconditioned by a guess.

    Inverses of one batch at the initial parameters are a poor guide for long, so that until a slot's regular refreshes
    begin it also refreshes at `early`, 2·`early`, 4·`early`, … Those steps measure, too, and their inverses are used at
    once: there are few of them, and a lag would outlive them.

    Attributes:
        factor_every: Steps between measurements.
        inverse_every: Steps between refreshes of one slot.
        slots: Number of slots.
        lag: Steps between a regular refresh and its first use.
        early: First of the early refreshes; 0 for none.
        rescale_every: Steps between measurements of EKFAC's second moments; 0 for none.
        parts: Number of parts in which layers are measured; it divides the number of slots.
        idle: Whether nothing is ever measured, since no step needs curvature.
    """

    factor_every: int
    inverse_every: int
    slots: int
    lag: int
    early: int
    rescale_every: int = 0
    parts: int = 1
    idle: bool = False

    @classmethod
    def of(cls, config: KFACConfig) -> RefreshSchedule:
        """Return the schedule of a configuration."""
        inversion = config.inversion
        return cls(
            config.curvature.factor_every,
            inversion.inverse_every,
            inversion.stagger,
            inversion.inverse_lag,
            inversion.early_refresh,
            (inversion.rescale_every or config.curvature.factor_every) if inversion.solver is Solver.EKFAC else 0,
            config.curvature.stagger,
            config.update.direction is Direction.ORTHOGONAL and not config.update.orthogonal_options.whitens,
        )

    def measured(self, step: int) -> tuple[int, ...]:
        """Return the slots whose layers are measured in this step's backward pass."""
        if self.idle:
            return ()
        if step == 0 or self.starting(step):
            return tuple(range(self.slots))
        together, turn = self.slots // self.parts, step % self.factor_every
        return tuple(slot for slot in range(self.slots) if turn == self._turn(slot // together))

    def measures(self, step: int) -> bool:
        """Whether statistics are measured in this step's backward pass."""
        return bool(self.measured(step))

    def begins_round(self, step: int) -> bool:
        """Whether this step measures all layers, or the first part of layers that take turns."""
        return step % self.factor_every == 0 or self.starting(step)

    def decay(self, step: int, decay: float) -> float:
        """Return β of a step's measurement when it is ramped up: min(1 − 1/k, β) in the k-th regular one.

        Parts whose turn comes later have been measured once more, in step 0.
        """
        rounds = step // self.factor_every if self.parts == 1 else -(-step // self.factor_every)
        return _ramped(decay, rounds)

    def moments_decay(self, step: int, decay: float) -> float:
        """Return the same of EKFAC's second moments, which have measurements of their own, from the step after 0 on."""
        return _ramped(decay, -(-step // self.rescale_every))

    def rescales(self, step: int) -> bool:
        """Whether EKFAC's second moments are measured in this step: whenever factors are, and in between."""
        return bool(self.rescale_every) and (self.measures(step) or step % self.rescale_every == 0)

    def due(self, step: int) -> tuple[int, ...]:
        """Return the slots whose inverses are refreshed after this step's measurement."""
        if self.idle:
            return ()
        if step == 0:
            return tuple(range(self.slots))
        early = self.starting(step)
        return tuple(
            slot
            for slot in range(self.slots)
            if step % self.inverse_every == self._offset(slot) or (early and step < self._regular(slot))
        )

    def starting(self, step: int) -> bool:
        """Whether this is a step of early refreshes, `early`·2ᵏ before the first whole window is over."""
        if not self.early or step % self.early or step >= self.inverse_every:
            return False
        times = step // self.early
        return times > 0 and times & (times - 1) == 0

    def lag_after(self, step: int) -> int:
        """Return the steps between this step's refreshes and their first use."""
        return 0 if self.starting(step) else self.lag

    def _turn(self, part: int) -> int:
        return part * self.factor_every // self.parts

    def _offset(self, slot: int) -> int:
        together = self.slots // self.parts
        part, place = divmod(slot, together)
        measurements = self.inverse_every // self.factor_every
        return place * measurements // together * self.factor_every + self._turn(part)

    def _regular(self, slot: int) -> int:
        """Return the slot's first regular refresh after step 0."""
        return self._offset(slot) or self.inverse_every


def _ramped(decay: float, before: int) -> float:
    """Return β after so many measurements."""
    return min(1 - 1 / (before + 1), decay)
