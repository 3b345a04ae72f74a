"""Seconds on a device: by events where the host runs ahead of it, by the clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class Marks:
    """Moments in a device's stream, whose distances are read when all is done: nothing waits meanwhile.

    Args:
        device: Device of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between each mark and the next; waits for the device."""
        synchronize(self._device)
        if self._events:
            return [a.elapsed_time(b) / 1000 for a, b in zip(self._events, self._events[1:], strict=False)]
        return [b - a for a, b in zip(self._times, self._times[1:], strict=False)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(device: torch.device, action: Callable[[], object], repeats: int = 5) -> float:
    """Return the shortest of several runs, after one that isn't timed."""
    action()
    found = []
    for _ in range(repeats):
        marks = Marks(device)
        synchronize(device)
        marks.mark()
        action()
        marks.mark()
        found.append(marks.seconds()[0])
    return min(found)
