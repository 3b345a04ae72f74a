"""`state.json` in a run's directory: what the run is doing or how it ended, for other processes to read.

Written by rank 0 alone. A process that is killed leaves "running" behind, with the host, process and SLURM job by which
one can tell.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

from kfac_dist.errors import KFACError

STATE_FILE = "state.json"
INTERRUPTED_REASON = "by Ctrl-C; earlier checkpoints are kept"


class State(StrEnum):
    """The state of a run, and its end."""

    RUNNING = "running"
    PREEMPTED = "preempted"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class RunRecord:
    """The contents of `state.json`.

    Attributes:
        state: State of the run.
        reason: Reason why it stopped before its end; empty otherwise.
        step: Steps done when it stopped; None while it runs.
        total_steps: Length of the run; None before that is known.
        ranks: Number of ranks.
        host: Host of rank 0.
        pid: Rank 0's process.
        job: SLURM's number of the job; None outside of SLURM.
        restarts: Number of restarts by torchrun or SLURM.
        changed: When this was written, in seconds since 1970.
        earlier: Directory to which this start has moved an earlier run of its name; "" if there was none.
    """

    state: State
    reason: str
    step: int | None
    total_steps: int | None
    ranks: int
    host: str
    pid: int
    job: str | None
    restarts: int
    changed: float
    earlier: str = ""


class RunFile:
    """Keeps `state.json` up to date.

    Args:
        directory: The run's directory, which exists; None on ranks other than 0, which write nothing.
        ranks: Number of ranks.
        earlier: New directory of an earlier run of its name; None if there was none.
    """

    def __init__(self, directory: Path | None, ranks: int, earlier: Path | None = None) -> None:
        self._path = None if directory is None else directory / STATE_FILE
        self._record = RunRecord(
            State.RUNNING,
            reason="",
            step=None,
            total_steps=None,
            ranks=ranks,
            host=socket.gethostname(),
            pid=os.getpid(),
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=sum(launcher_restarts().values()),
            changed=time.time(),
            earlier="" if earlier is None else str(earlier),
        )

    def running(self, total_steps: int | None = None) -> None:
        """Write that the run is under way."""
        self._write(State.RUNNING, total_steps=total_steps)

    def finished(self) -> None:
        """Write that the run is complete."""
        self._write(State.FINISHED, step=self._record.total_steps)

    def preempted(self, step: int, reason: str) -> None:
        """Write that the run was stopped by a signal, with its state saved."""
        self._write(State.PREEMPTED, step=step, reason=reason)

    def interrupted(self, step: int | None, reason: str) -> None:
        """Write that the run stopped because its user did so; at `step`, with its state saved, or without."""
        self._write(State.INTERRUPTED, step=step, reason=reason)

    def cut_short(self) -> None:
        """Write that the run's user ended it at once, as far as that can still be written."""
        with suppress(OSError):
            self.interrupted(None, INTERRUPTED_REASON)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Write the error that ends the block."""
        try:
            yield
        except KeyboardInterrupt:
            self.cut_short()
            raise
        except BaseException as error:
            reason = str(error) if isinstance(error, KFACError) else f"{type(error).__name__}: {error}"
            # The run may have failed because of a full disk: show that error.
            with suppress(OSError):
                self._write(State.FAILED, reason=reason)
            raise

    def _write(
        self, state: State, *, reason: str = "", step: int | None = None, total_steps: int | None = None
    ) -> None:
        self._record = replace(
            self._record,
            state=state,
            reason=reason,
            step=step,
            total_steps=total_steps or self._record.total_steps,
            changed=time.time(),
        )
        if self._path is None:
            return
        write_whole(self._path, json.dumps(asdict(self._record), indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file of a run's directory that appears complete, in place of anything there: a pipe is not waited for.

    Raises:
        OSError: It can't be written.
    """
    written = path.with_name(f"{path.name}.writing")
    written.unlink(missing_ok=True)
    with written.open("x") as stream:
        stream.write(text)
    written.replace(path)


def read_record(directory: Path) -> RunRecord | None:
    """Return the contents of a run's `state.json`; None if it has none.

    Raises:
        KFACError: It can't be read.
    """
    path = directory / STATE_FILE
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait, and reading a device not end
            raise KFACError(f"{path}: can't be read: is no regular file")
        values = json.loads(path.read_text())
        return RunRecord(**{**values, "state": State(values["state"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise KFACError(f"{path}: can't be read: {error}") from error


_LAUNCHERS = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "slurm": "SLURM_RESTART_COUNT"}


def launcher_restarts() -> dict[str, int]:
    """Return how often each launcher has started this job again."""
    return {by: int(os.environ.get(name) or 0) for by, name in _LAUNCHERS.items()}
