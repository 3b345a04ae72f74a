"""What a run does about steps that were skipped: blame the data, damp more, go back, or give up; see `divergence`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kfac_dist.config.schedules import value_at
from kfac_dist.config.schema import Config
from kfac_dist.distributed.communicator import Communicator
from kfac_dist.training.diagnosis import blame_data
from kfac_dist.training.divergence import DivergedError, Guard, Recovery, Verdict
from kfac_dist.training.sampler import Position
from kfac_dist.training.setup import Parts
from kfac_dist.training.window import WindowTotals


class Skips:
    """Judges each logged window, and keeps K-FAC's damping at what came of it; every rank decides alike.

    Args:
        config: The run's configuration.
        parts: Whose damping is raised.
        communicator: The ranks.
        guard: Skips the steps.
        note: Shows a line to the user.

    Attributes:
        recovery: How the run has dealt with skipped steps so far.
        reason: What went wrong last.
    """

    def __init__(
        self, config: Config, parts: Parts, communicator: Communicator, guard: Guard, note: Callable[[str], None]
    ) -> None:
        self.recovery = Recovery()
        self.reason = ""
        self._config = config
        self._parts = parts
        self._communicator = communicator
        self._guard = guard
        self._note = note

    @property
    def may_go_back(self) -> bool:
        """Whether the run may go back to a checkpoint once more."""
        return self.recovery.rollbacks < self._config.train.divergence.rollbacks

    def judge(self, totals: WindowTotals, step: int, positions: Sequence[Position]) -> Verdict:
        """Say what went wrong in a window, if anything did, and decide what follows; collective.

        Args:
            totals: The window.
            step: Steps done.
            positions: Where the data of each of the window's steps begins.

        Raises:
            DataError: The samples of the first bad step aren't finite.
            DivergedError: The loss isn't finite, though the step was taken.
        """
        if totals.first_bad is None:
            return self._decide(step, skipped=0, row=0) if self.recovery.damping_factor > 1 else Verdict.GO_ON
        place, loss = totals.first_bad
        bad = step - len(positions) + place
        blame_data(self._parts.stream, positions[place], bad + 1, self._communicator)
        what = f"the training loss is {loss}" if not math.isfinite(loss) else "gradients are not finite"
        self.reason = self._explain(what, bad)
        if not totals.skipped:
            raise DivergedError(self.reason)
        verdict = self._decide(step, totals.skipped, self._guard.row)
        self._note(f"step {step}: {totals.skipped} steps skipped, the first because {what}")
        return verdict

    def went_back(self, failed: Recovery, step: int) -> None:
        """Damp more than what failed did, now that the run is at an earlier step."""
        failed.went_back(self.recovery, self._config.train.divergence, step)
        self.recovery = failed
        self._set_damping(refresh=True)

    def facts(self) -> dict[str, Any]:
        """Return all of it as plain values, for a checkpoint."""
        return {"row": self._guard.row, **self.recovery.facts()}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Go on from `facts`."""
        recovery = dict(facts)
        self._guard.restore(recovery.pop("row"))
        self.recovery = Recovery(**recovery)
        self._set_damping()

    def _decide(self, step: int, skipped: int, row: int) -> Verdict:
        verdict = self.recovery.judge(
            self._config.train.divergence,
            step=step,
            skipped=skipped,
            row=row,
            calm=2 * self._config.kfac.inversion.inverse_every,
            last=step == self._parts.total_steps,
        )
        self._set_damping(refresh=skipped > 0)
        return verdict

    def _set_damping(self, *, refresh: bool = False) -> None:
        if self._parts.kfac is not None:
            self._parts.kfac.multiply_damping(self.recovery.damping_factor, refresh=refresh)

    def _explain(self, what: str, step: int) -> str:
        remedy = "lower optimizer.lr, raise kfac.inversion.damping, or lower kfac.update.kl_clip"
        if self._parts.stepper is not None:
            remedy = "raise kfac.inversion.damping"
        rate = value_at(self._config.learning_rate, step, self._parts.total_steps)
        return f"{what} at step {step + 1}, learning rate {rate:g}: {remedy}"
