"""Work beside training: one thread, on a GPU with a stream of its own.

    training thread   start(work, reads) ──────── steps … ──────── job.result() ── uses the values
    side thread            └─ waits for `reads` ─ work ─ done ─┘

LAPACK, and reading a value from a GPU, let other Python threads run, so that training goes on meanwhile: on a CPU as
far as there are cores, on a GPU as far as the device has room. The thread never communicates: the order of collectives
is the training thread's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class BackgroundTask(Generic[T]):
    """One piece of work.

    Args:
        future: Its result, and on a GPU the event after which that may be used.
        device: Its device.
    """

    def __init__(self, future: Future[tuple[T, torch.cuda.Event | None]], device: torch.device) -> None:
        self._future = future
        self._device = device

    def result(self, made: Callable[[T], Sequence[Tensor]]) -> T:
        """Wait for the thread, not for the device, and return what the work returned; raises what it raised.

        Args:
            made: Says which tensors of the result the current stream will use.
        """
        value, done = self._future.result()
        if done is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(done)
            for tensor in made(value):
                tensor.record_stream(current)
        return value


class BackgroundSolver:
    """Runs one piece of work after the other; the thread starts with the first.

    Args:
        device: Device of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool: ThreadPoolExecutor | None = None

    def start(self, work: Callable[[], T], reads: Sequence[Tensor]) -> BackgroundTask[T]:
        """Run `work` once the kernels queued on the current stream so far are done.

        Args:
            work: The work; it must not communicate.
            reads: The tensors that it reads. They must not be written meanwhile.
        """
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))
            for tensor in reads:
                tensor.record_stream(self._stream)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="kfac-side")
        return BackgroundTask(self._pool.submit(self._run, work, ready), self._device)

    def close(self) -> None:
        """End the thread; work that has not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    @torch.no_grad()
    def _run(self, work: Callable[[], T], ready: torch.cuda.Event | None) -> tuple[T, torch.cuda.Event | None]:
        if self._stream is None:
            return work(), None
        with torch.cuda.stream(self._stream):
            assert ready is not None
            self._stream.wait_event(ready)
            value = work()
            done = torch.cuda.Event()
            done.record(self._stream)
            return value, done
