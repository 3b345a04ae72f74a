"""A scheduler's wish that the run stop, heard by one rank and agreed on by all at a step's boundary.

    rank 0   step ── poll ── step ── read: stop? ── step ── …        a poll is one small reduction, started at one
    rank 1   step ── poll ── step ── read: stop? ── step ── …        boundary and read at the next: nobody waits for it
                 ▲ SIGUSR1 only sets a flag

Whatever else one rank alone may wish goes the same way: a checkpoint by the clock, an end because its disk is full.

Polls are about `POLL_SECONDS` apart, and every rank computes the same distance in steps: it follows from seconds that
the polls themselves sum up. A step longer than that is polled at each of its boundaries.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Self

import torch
from torch import Tensor

from kfac_dist.distributed.communicator import Communicator, Work

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
POLL_SECONDS = 0.25
# A poll may be at most so much farther away than the one before it: a first step that was quick by chance, on a rank
# that then compiles or evaluates, must not put off the next poll for long.
_GROWTH = 4


class Preempted(Exception):
    """The run was asked to stop, and its state is saved; raised on every rank.

    Attributes:
        step: Optimizer steps done.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"preempted at step {step}")
        self.step = step


class StopSignals:
    """Remembers that SIGTERM or SIGUSR1 came, in place of what they did before; a context.

    Python lets only the main thread handle signals: elsewhere they keep doing what they did.

    Attributes:
        caught: The name of the first that came; None so far.
    """

    def __init__(self) -> None:
        self.caught: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._catch) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: a handler that Python didn't install, and can't put back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = self.caught or signal.Signals(number).name


class Preemption:
    """Asks all ranks, at the boundaries between steps, whether one of them was told to stop.

    Args:
        signals: What this rank has been told.
        communicator: The ranks of the run.
        clock: Seconds.
        wishes: What else this rank may wish for; asked at every poll.

    Attributes:
        granted: Whether any rank had each of these wishes, the same on every rank; set by `due`.
    """

    def __init__(
        self,
        signals: StopSignals,
        communicator: Communicator,
        clock: Callable[[], float] = time.monotonic,
        wishes: Sequence[Callable[[], bool]] = (),
    ) -> None:
        self._wishes = wishes
        self.granted = [False] * len(wishes)
        self._signals = signals
        self._communicator = communicator
        self._clock = clock
        self._interval = 1
        self._since_poll = 0
        self._polled_at = clock()
        self._answer: _Answer | None = None

    def due(self) -> bool:
        """Return whether the run stops here, the same on every rank; collective, called at every boundary.

        Raises:
            CollectiveError: Another rank has failed.
        """
        if self._communicator.size == 1:
            self.granted = [wish() for wish in self._wishes]
            return self._signals.caught is not None
        stop = self._read()
        self._since_poll += 1
        if not stop and self._since_poll >= self._interval:
            self._poll()
        return stop

    def finish(self) -> None:
        """Wait for a poll that is under way; collective, called when the last step is done."""
        self._read()

    def _poll(self) -> None:
        now = self._clock()
        seconds_per_step = (now - self._polled_at) / self._since_poll
        own = [seconds_per_step, float(self._signals.caught is not None), *(float(wish()) for wish in self._wishes)]
        self._answer = _Answer(torch.tensor(own, dtype=torch.float64), self._communicator)
        self._since_poll, self._polled_at = 0, now

    def _read(self) -> bool:
        answer, self._answer = self._answer, None
        self.granted = [False] * len(self._wishes)
        if answer is None:
            return False
        seconds, told, *wished_for = answer.read()
        self.granted = [number > 0 for number in wished_for]
        wished = int(POLL_SECONDS * self._communicator.size / seconds) if seconds > 0 else self._interval
        self._interval = max(1, min(wished, _GROWTH * self._interval))
        return told > 0


class _Answer:
    """A sum over the ranks on its way to the host.

    On a GPU it travels on a stream of its own: reading it waits for this sum, not for the step that computes meanwhile.
    """

    def __init__(self, values: Tensor, communicator: Communicator) -> None:
        self._work: Work | None = None
        self._arrived: torch.cuda.Event | None = None
        if communicator.device.type != "cuda":
            self._values = values
            self._work = communicator.all_reduce(values, label="preemption")
            return
        stream = torch.cuda.Stream(communicator.device)
        with torch.cuda.stream(stream):
            on_device = values.to(communicator.device)
            communicator.all_reduce(on_device, label="preemption").wait()
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(stream)
        self._on_device = on_device  # kept until it has arrived

    def read(self) -> list[float]:
        """Wait for the sum and return it."""
        if self._work is not None:
            self._work.wait()
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._values.tolist()
        return values
