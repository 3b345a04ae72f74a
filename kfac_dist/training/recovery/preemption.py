"""A scheduler's request that the run stop, received by one rank and agreed on by all at a step's boundary.

    rank 0   step ── poll ── step ── read: stop? ── step ── …        a poll is one small reduction, started at one
    rank 1   step ── poll ── step ── read: stop? ── step ── …        boundary and read at the next, without a wait
                 ▲ a signal only sets a flag

Whatever else one rank alone may request goes the same way: a checkpoint by the clock, an end because its disk is full.

Polls are about `POLL_SECONDS` apart, and every rank computes the same distance in steps: it follows from seconds that
the polls themselves sum up. A step longer than that is polled at each of its boundaries.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

import torch
from torch import Tensor

from kfac_dist.distributed.communicators.base import Communicator, Work

# SIGHUP: the terminal is gone.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# Ctrl-C reaches a rank from its terminal and from its launcher, within milliseconds.
SAME_SECONDS = 1.0
# A run that is interrupted while there is nothing to save has so long to put its things away.
GRACE_SECONDS = 10.0
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
    """Remembers that SIGTERM, SIGUSR1, SIGHUP or SIGINT came, in place of what they did before; a context.

        Ctrl-C   while training         remembered: the run saves at the next boundary, and returns
                 before, or after       KeyboardInterrupt, at once: there is nothing to save
                 once more              ends the process at once, wherever it is

    A terminal and a launcher may both pass one Ctrl-C on: signals within `SAME_SECONDS` count as one. Python lets only
    the main thread handle signals: in other threads they keep their handlers. So do
    a terminal's that were ignored before (nohup).

    Args:
        end: Ends the process; without it, a second Ctrl-C is a KeyboardInterrupt.
        say: Called with a message at the first Ctrl-C.
        clock: Seconds.

    Attributes:
        caught: The name of the first that came; None so far.
        last_words: Called before `end`.
    """

    def __init__(
        self,
        end: Callable[[], object] | None = None,
        say: Callable[[str], object] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.caught: str | None = None
        self.last_words: Callable[[], object] = lambda: None
        self._end = end
        self._say = say
        self._clock = clock
        self._previous: dict[signal.Signals, object] = {}
        self._deferring = False
        self._interrupted_at: float | None = None
        self._wake: tuple[int, int, int] | None = None
        self._over = threading.Event()

    @property
    def interrupted(self) -> bool:
        """Whether it was Ctrl-C."""
        return self._interrupted_at is not None

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Leave a first Ctrl-C to the caller that reads `caught`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        signals = [number for number in SIGNALS if not _is_ignored(number)]
        if self._end is not None and signal.SIGINT in signals:
            # Handlers run only when the main thread does; a separate thread receives signals at once.
            read, write = os.pipe()
            os.set_blocking(write, False)
            self._wake = read, write, signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(read, self._end), name="signals", daemon=True).start()
        self._previous = {number: signal.signal(number, self._catch) for number in signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for number, handler in self._previous.items():
            # None: a handler that Python didn't install, and can't put back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # type: ignore[arg-type]
        if self._wake is not None:
            _, write, before = self._wake
            signal.set_wakeup_fd(before)
            os.write(write, b"\0")  # closing it tells the thread nothing while processes that were forked have it too
            os.close(write)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            self.caught = self.caught or signal.Signals(number).name
            return
        now, first = self._clock(), self._interrupted_at
        if first is None:
            self._interrupted_at = now
            self.caught = self.caught or "SIGINT"
            if not self._deferring:
                raise KeyboardInterrupt
        elif self._end is None and now - first > SAME_SECONDS:
            raise KeyboardInterrupt

    def _listen(self, read: int, end: Callable[[], object]) -> None:
        """Tell of a first Ctrl-C, and end the process at a second, or where a first one that should have has not."""
        first: float | None = None
        with open(read, "rb", buffering=0) as stream:
            while (signals := stream.read(64)) and not self._over.is_set():
                if signal.SIGINT not in signals:
                    continue
                if first is None:
                    first = self._clock()
                    if self._deferring:
                        self._say("Ctrl-C: the run saves its state and ends; once more ends it at once")
                    else:
                        threading.Thread(target=self._end_unless_over, args=(end,), name="signals", daemon=True).start()
                elif self._clock() - first > SAME_SECONDS:
                    self._end_now(end)

    def _end_unless_over(self, end: Callable[[], object]) -> None:
        if not self._over.wait(GRACE_SECONDS):  # the main thread waits for other ranks, and hears nothing
            self._end_now(end)

    def _end_now(self, end: Callable[[], object]) -> None:
        try:
            self.last_words()
        finally:
            end()


def _is_ignored(number: signal.Signals) -> bool:
    """Whether a terminal's signal is not for this process, such as Ctrl-C for a shell's background jobs."""
    return number in (signal.SIGINT, signal.SIGHUP) and signal.getsignal(number) is signal.SIG_IGN


class Preemption:
    """Asks all ranks, at the boundaries between steps, whether one of them was signalled to stop.

    Args:
        signals: This rank's received signals.
        communicator: The ranks of the run.
        clock: Seconds.
        requests: Further conditions of this rank, such as a checkpoint that is due; asked at every poll.

    Attributes:
        granted: Whether any rank had each of these requests, the same on every rank; set by `due`.
    """

    def __init__(
        self,
        signals: StopSignals,
        communicator: Communicator,
        clock: Callable[[], float] = time.monotonic,
        requests: Sequence[Callable[[], bool]] = (),
    ) -> None:
        self._requests = requests
        self.granted = [False] * len(requests)
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
            self.granted = [request() for request in self._requests]
            return self._signals.caught is not None
        stop = self._read()
        self._since_poll += 1
        # A request that is granted here is fulfilled after this call: asked for now, it would be granted once more.
        if not stop and not any(self.granted) and self._since_poll >= self._interval:
            self._poll()
        return stop

    def finish(self) -> None:
        """Wait for a poll that is under way; collective, called when the last step is done."""
        self._read()

    def _poll(self) -> None:
        now = self._clock()
        seconds_per_step = (now - self._polled_at) / self._since_poll
        own = [
            seconds_per_step,
            float(self._signals.caught is not None),
            *(float(request()) for request in self._requests),
        ]
        self._answer = _Answer(torch.tensor(own, dtype=torch.float64), self._communicator)
        self._since_poll, self._polled_at = 0, now

    def _read(self) -> bool:
        answer, self._answer = self._answer, None
        self.granted = [False] * len(self._requests)
        if answer is None:
            return False
        seconds, caught, *requested = answer.read()
        self.granted = [number > 0 for number in requested]
        wanted = int(POLL_SECONDS * self._communicator.size / seconds) if seconds > 0 else self._interval
        self._interval = max(1, min(wanted, _GROWTH * self._interval))
        return caught > 0


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
