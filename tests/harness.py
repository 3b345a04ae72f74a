"""Real processes for tests of distributed code: `run_ranks(3, function, *args)` gives the results by rank.

Importing torch costs a process seconds. So it is imported once, by a server from which the others are forked, and they
are kept: the first call that needs four ranks starts four, every later call gives them a function to run in a fresh
gloo world that meets in a file. A process that fails, hangs or dies is replaced before the next call.

    test process                               worker processes (forked, one thread each)
    run_ranks(W, fn, *args)  ── task, pipe ──▶  rank r: init gloo (file://) → fn(*args) → destroy
                             ◀── result ──────  pickled result, or the traceback

`fn` is a module-level function of a test file; its arguments and its result are pickled. What the workers run counts
for coverage (`concurrency = multiprocessing`).
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

GROUP_TIMEOUT_SECONDS = 30.0
# How long the other ranks may still take once one has failed: they usually hang in a collective without it.
GRACE_SECONDS = 3.0


class RankError(AssertionError):
    """A rank raised, died or did not finish in time; the message holds the tracebacks, the first failure first."""


@dataclass(frozen=True)
class _Task:
    """What one rank is to run; `call` is the pickled (function, arguments)."""

    rank: int
    world_size: int
    rendezvous: str
    process_group: bool
    group_timeout: float
    call: bytes
    path: list[str]


@dataclass(frozen=True)
class _Result:
    """What one rank returned; a worker that is spent takes no other task.

    DeepSpeed leaves counters and replaced functions behind, and ranks with different histories then disagree.
    """

    value: bytes
    spent: bool


@dataclass(frozen=True)
class _Failure:
    moment: float
    reason: str


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    pipe: Connection

    def stop(self, *, kill: bool) -> None:
        if kill:
            self.process.kill()
        else:  # told, not left to its pipe's end: a process that was forked meanwhile may hold that open
            with suppress(OSError):  # it has died already
                self.pipe.send(None)
        self.pipe.close()
        self.process.join()


_idle: list[_Worker] = []


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    process_group: bool = True,
    group_timeout: float = GROUP_TIMEOUT_SECONDS,
) -> list[Any]:
    """Runs `function(*args)` on `world_size` ranks and returns what each returned, by rank.

    Args:
        world_size: Number of ranks.
        function: Module-level function; finds its rank through torch.distributed.
        *args: Picklable arguments, the same for every rank.
        timeout: Seconds after which ranks that haven't finished are killed.
        process_group: False leaves torch.distributed uninitialised; then RANK and WORLD_SIZE tell the rank.
        group_timeout: Seconds after which its collectives give up.

    Raises:
        RankError: A rank raised, died, or was killed at the timeout.
    """
    call = pickle.dumps((function, args))
    workers = _take_workers(world_size)
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        rendezvous = os.path.join(directory, "rendezvous")
        for rank, worker in enumerate(workers):
            worker.pipe.send(_Task(rank, world_size, rendezvous, process_group, group_timeout, call, list(sys.path)))
        results, failures = _collect(workers, timeout)
    for rank, worker in enumerate(workers):
        if rank in results and not results[rank].spent:
            _idle.append(worker)
        else:
            worker.stop(kill=rank not in results)
    if failures:
        raise RankError("\n".join(failures))
    return [pickle.loads(results[rank].value) for rank in range(world_size)]


def _collect(workers: list[_Worker], timeout: float) -> tuple[dict[int, _Result], list[str]]:
    """Results by rank, and failures in the order in which they came; after the first the others get a short grace."""
    deadline = time.monotonic() + timeout
    results: dict[int, _Result] = {}
    failures: list[tuple[float, str]] = []
    pending = {worker.pipe: rank for rank, worker in enumerate(workers)}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            waiting = sorted(pending.values())
            reason = "after another failed" if failures else f"in {timeout:g} s"
            failures.append((deadline, f"ranks {waiting} did not finish {reason} and were killed"))
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pending.pop(pipe)
            try:
                outcome: _Result | _Failure = pipe.recv()
            except (EOFError, ConnectionResetError):
                workers[rank].process.join()
                code = workers[rank].process.exitcode
                outcome = _Failure(time.monotonic(), f"the process died (exit code {code})")
            match outcome:
                case _Result():
                    results[rank] = outcome
                case _Failure(moment, reason):
                    if not failures:
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                    failures.append((moment, f"rank {rank} of {len(workers)} failed: {reason}"))
    return results, [text for _, text in sorted(failures)]


def _take_workers(number: int) -> list[_Worker]:
    started = [_start_worker() for _ in range(number - len(_idle))]
    for worker in started:
        worker.pipe.recv()  # torch is imported: from here on a task's seconds are its own
    _idle.extend(started)
    return [_idle.pop() for _ in range(number)]


def _start_worker() -> _Worker:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = fork(_serve, theirs, daemon=True)
    theirs.close()
    return _Worker(process, ours)


def fork(function: Callable[..., Any], *args: Any, daemon: bool = False) -> BaseProcess:
    """Runs a function in a process that is forked from the server, which has torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    # One thread each, also in libraries that read it at import: ranks share the few cores of a test machine.
    previous = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        process = context.Process(target=function, args=args, daemon=daemon)
        process.start()
    finally:
        if previous is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = previous
    return process


def _serve(pipe: Connection) -> None:
    """Runs tasks until the test process goes away."""
    import torch

    torch.set_num_threads(1)
    environment = dict(os.environ)
    pipe.send("ready")
    while True:
        try:
            task: _Task | None = pipe.recv()
        except EOFError:
            return
        if task is None:
            return
        outcome = _run(task)
        os.environ.clear()
        os.environ.update(environment)
        pipe.send(outcome)


def _run(task: _Task) -> _Result | _Failure:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(task.rank), WORLD_SIZE=str(task.world_size))
    sys.path[:] = task.path
    torch.manual_seed(0)
    try:
        function, args = pickle.loads(task.call)
        leave_undrawn()
        if task.process_group:
            timeout = timedelta(seconds=task.group_timeout)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{task.rendezvous}",
                rank=task.rank,
                world_size=task.world_size,
                timeout=timeout,
            )
            # A function without a collective would let this rank leave while another still connects to it.
            dist.barrier()
        # Plain bytes: torch's own pickling would share memory with a process that may be gone by then.
        value = pickle.dumps(function(*args))
        return _Result(value, spent="deepspeed" in sys.modules)
    except BaseException:
        return _Failure(time.monotonic(), traceback.format_exc())
    finally:
        # Only now: the end of this rank's connections makes the others fail, and the first failure is the one to see.
        if dist.is_initialized():
            dist.destroy_process_group()
        _forget_meshes()


def leave_undrawn() -> Callable[[], None]:
    """Lets runs of this process end without the picture of their losses, and returns the way back.

    Drawing it takes longer than such a run trains, and matplotlib a new process most of a second.
    """
    results = sys.modules.get("kfac_dist.training.results")
    if results is None:
        return lambda: None
    drawn = results.draw_losses
    results.draw_losses = lambda *_: None  # type: ignore[attr-defined]
    return lambda: setattr(results, "draw_losses", drawn)


def _forget_meshes() -> None:
    """Empties DTensor's caches: they hand out the mesh of an earlier world, whose groups are gone."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor, debug

        if hasattr(debug, "_clear_sharding_prop_cache"):
            debug._clear_sharding_prop_cache()
        else:  # before torch 2.10
            DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()  # type: ignore[attr-defined]


@atexit.register
def _stop_workers() -> None:
    # Told, not killed: they leave the ordinary way and write their coverage. So does the server that they came from.
    while _idle:
        _idle.pop().stop(kill=False)
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
