"""Reactions to skipped steps, and to dropped statistics; see `divergence`.

It blames the data, damps more, goes back, or gives up.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kfac_dist.config.schedules import value_at
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.training.data.sampler import Position
from kfac_dist.training.records.window import WindowTotals
from kfac_dist.training.recovery.diagnosis import blame_data
from kfac_dist.training.recovery.divergence import DivergedError, Guard, Recovery, Verdict
from kfac_dist.training.setup import RunParts


class Skips:
    """Judges each logged window, and sets K-FAC's damping accordingly; every rank decides alike.

    Args:
        parts: The run's parts, whose damping is raised.
        communicator: The ranks.
        guard: Skips the steps.
        note: Shows a line to the user.

    Attributes:
        recovery: The run's reactions to skipped steps so far.
        reason: The last failure.
    """

    def __init__(self, parts: RunParts, communicator: Communicator, guard: Guard, note: Callable[[str], None]) -> None:
        self.recovery = Recovery()
        self.reason = ""
        self._parts = parts
        self._communicator = communicator
        self._guard = guard
        self._note = note
        self._warned = False
        options = (kfac.solver_access.config for kfac in parts.kfacs)
        self._refresh_every = max((config.inversion.inverse_every for config in options), default=0)
        for kfac in parts.kfacs:
            kfac.monitor.names_dropped = False  # told here, of all ranks

    @property
    def may_go_back(self) -> bool:
        """Whether the run may go back to a checkpoint once more."""
        return self.recovery.rollbacks < self._parts.settings.divergence.rollbacks

    def judge(self, totals: WindowTotals, step: int, positions: Sequence[Position]) -> Verdict:
        """Report the failures of a window, if there are any, and decide on the reaction; collective.

        Args:
            totals: The window.
            step: Steps done.
            positions: First sample of each of the window's steps.

        Raises:
            DataError: The samples of the first bad step aren't finite.
            DivergedError: The loss isn't finite, though the step was taken.
        """
        self.recovery.note_dropped(totals.dropped, totals.measured)
        if totals.dropped:
            self._blame_layers(step)
        if totals.first_bad is None:
            calm = self.recovery.damping_factor == 1 and not totals.dropped
            return Verdict.GO_ON if calm else self._decide(step, totals, row=0)
        place, loss = totals.first_bad
        bad = step - len(positions) + place
        blame_data(self._parts.stream, positions[place], bad + 1, self._communicator)
        what = f"the training loss is {loss}" if not math.isfinite(loss) else "gradients are not finite"
        self.reason = self._explain(what, bad)
        if not totals.skipped:
            raise DivergedError(self.reason)
        verdict = self._decide(step, totals, self._guard.row)
        self._note(f"step {step}: {totals.skipped} steps skipped, the first because {what}")
        return verdict

    def went_back(self, failed: Recovery, step: int) -> None:
        """Set the damping above the failed one, now that the run is at an earlier step."""
        failed.went_back(self.recovery, self._parts.settings.divergence, step)
        self.recovery = failed
        self._set_damping(refresh=True)

    def facts(self) -> dict[str, Any]:
        """Return all of it as plain values, for a checkpoint."""
        return {"row": self._guard.row, **self.recovery.facts()}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Resume from `facts`."""
        recovery = dict(facts)
        self._guard.restore(recovery.pop("row"))
        self.recovery = Recovery(**recovery)
        self._set_damping()

    def _blame_layers(self, step: int) -> None:
        """Name the layers whose statistics were dropped, and warn of the first ones; collective."""
        own = [name for kfac in self._parts.kfacs for name in kfac.monitor.not_finite()]
        ranks = self._communicator.gather_objects(own, label="diagnosis")
        layers = list(dict.fromkeys(name for names in ranks for name in names))
        where = [str(rank) for rank, names in enumerate(ranks) if names]
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        rank = f"rank{'s' if len(where) > 1 else ''} {', '.join(where[:8])}{', …' if len(where) > 8 else ''}"
        self.reason = (
            f"by step {step} K-FAC's statistics of {', '.join(layers[:3])}{more} were not finite on {rank}, and were "
            "dropped: squares exceed float32; scale their inputs or the loss, or leave them out by "
            "kfac.curvature.exclude"
        )
        if not self._warned and self._communicator.rank == 0:
            warnings.warn(self.reason, stacklevel=2)
        self._warned = True

    def _decide(self, step: int, totals: WindowTotals, row: int) -> Verdict:
        verdict = self.recovery.judge(
            self._parts.settings.divergence,
            step=step,
            skipped=totals.skipped,
            dropped=totals.dropped,
            row=row,
            calm=2 * self._refresh_every,
            last=step == self._parts.total_steps,
        )
        self._set_damping(refresh=totals.skipped > 0 or totals.dropped > 0)
        return verdict

    def _set_damping(self, *, refresh: bool = False) -> None:
        if self._parts.kfac is not None:
            self._parts.kfac.solver_access.multiply_damping(self.recovery.damping_factor, refresh=refresh)

    def _explain(self, what: str, step: int) -> str:
        remedy = "lower optimizer.lr, raise kfac.inversion.damping, or lower kfac.update.kl_clip"
        if self._parts.stepper is not None:
            remedy = "raise kfac.inversion.damping"
        rate = value_at(self._parts.learning_rate, step, self._parts.total_steps)
        return f"{what} at step {step + 1}, learning rate {rate:g}: {remedy}"
