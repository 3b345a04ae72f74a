"""Slots that the coming step measures and refreshes, and those still owed from steps that were not taken.

due now, by the schedule ─┐
overdue ─────────────────┴─▶ slots of this step ── taken ──▶ refreshed
                                                └─ skipped ─▶ overdue: again at the next step that measures
"""

from __future__ import annotations

from collections.abc import Iterable

from kfac_dist.preconditioner.invert.refresh_schedule import RefreshSchedule
from kfac_dist.preconditioner.plan import Plan


class RefreshQueue:
    """Keeps the slots of one run; the same on every rank, because it follows from the plan and the ranks' agreements.

    Args:
        schedule: The intervals.
        plan: The plan, with the blocks of slots.

    Attributes:
        schedule: The intervals.
        overdue: Slots whose refresh was due and has not happened.
        refreshed: Slots that have ever been refreshed.
        measured: Slots whose layers this step measures.
        slots: Those of them that it refreshes.
    """

    def __init__(self, schedule: RefreshSchedule, plan: Plan) -> None:
        self.schedule = schedule
        self.overdue: set[int] = set()
        self.refreshed: set[int] = set()
        self.measured: tuple[int, ...] = ()
        self.slots: tuple[int, ...] = ()
        self._all = {block.slot for block in plan.blocks.values()}

    @property
    def every_slot(self) -> tuple[int, ...]:
        """All slots, in order."""
        return tuple(sorted(self._all))

    def begin(self, step: int) -> None:
        """Return the work of a step. Overdue slots are measured in the first step that measures anything."""
        measured, due = set(self.schedule.measured(step)), set(self.schedule.due(step))
        if measured:
            measured |= self.overdue
            due |= self.overdue
        self.measured = tuple(sorted(measured & self._all))
        self.slots = tuple(sorted(due & self._all))

    def skip(self) -> None:
        """Owe this step's refreshes: it is as if it had never been."""
        self.overdue |= set(self.slots)

    def owe_everything(self) -> None:
        """Refresh every slot at the next step that measures."""
        self.overdue |= self._all

    @property
    def first(self) -> set[int]:
        """Those of this step's slots that were never refreshed before."""
        return set(self.slots) - self.refreshed

    def take(self, step: int, unmeasured: Iterable[int]) -> int:
        """Take note that this step's slots are refreshed.

        Args:
            step: This step.
            unmeasured: Slots with a layer without any statistics yet: they refresh again after its first ones.

        Returns:
            After how many steps the new inverses are used: the first ones at once.
        """
        first = self.first
        self.overdue = (self.overdue - set(self.slots)) | (set(unmeasured) & first)
        self.refreshed |= set(self.slots)
        return 0 if first else self.schedule.lag_after(step)
