"""Seconds of the phases of K-FAC's steps, measured without synchronisation.

    mark ── statistics ── mark ── reduction ── mark ── … ── mark        a phase lasts from its mark to the next one

On a CPU a mark is the clock's time. On a GPU, where the host runs ahead, it is an event on the stream; how far apart
events are is read when the seconds are asked for, and asks the device for nothing but events that have passed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import StrEnum

import torch

# A loop that never asks must not collect marks for ever: at so many, those that have passed are read.
_MOST_MARKS = 4096


class Phase(StrEnum):
    """Parts of a step, in the order in which data flows."""

    STATISTICS = "statistics"
    REDUCTION = "reduction"
    INVERSION = "inversion"
    SHARING = "sharing"
    PRECONDITIONING = "preconditioning"


class PhaseTimer:
    """Adds up the seconds of this rank's phases once it is switched on; until then it does nothing.

    A phase inside of another interrupts it: no second counts twice. What a collective does while backward runs takes
    no time here; waiting for it does.

    Args:
        device: K-FAC's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.enabled = False
        self._device = device
        self._seconds = dict.fromkeys(Phase, 0.0)
        self._open: list[Phase] = []
        self._since = 0.0
        # On a GPU: events, each with the phase that it begins; None ends one.
        self._marks: list[tuple[torch.cuda.Event, Phase | None]] = []
        self._spare: list[torch.cuda.Event] = []

    def __call__(self, phase: Phase) -> AbstractContextManager[None]:
        """Return a context whose time belongs to `phase`."""
        return self._measure(phase) if self.enabled else nullcontext()

    def seconds(self) -> dict[Phase, float]:
        """Return the seconds of each phase so far; on a GPU, of finished kernels."""
        self._read_passed()
        return dict(self._seconds)

    @contextmanager
    def _measure(self, phase: Phase) -> Iterator[None]:
        self._open.append(phase)
        self._mark(self._open[-2] if len(self._open) > 1 else None, phase)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(phase, self._open[-1] if self._open else None)

    def _mark(self, ends: Phase | None, begins: Phase | None) -> None:
        if self._device.type == "cuda":
            event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((event, begins))
            if len(self._marks) >= _MOST_MARKS:
                self._read_passed()
            return
        now = time.perf_counter()
        if ends is not None:
            self._seconds[ends] += now - self._since
        self._since = now

    def _read_passed(self) -> None:
        """Sum the times between events that the device has passed; the newest of them begins the next interval."""
        read = 0
        while read + 1 < len(self._marks) and self._marks[read + 1][0].query():
            (event, phase), (following, _) = self._marks[read : read + 2]
            if phase is not None:
                self._seconds[phase] += event.elapsed_time(following) / 1000
            self._spare.append(event)
            read += 1
        del self._marks[:read]
