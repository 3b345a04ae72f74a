"""`kfac-dist status`: how a run stands, from the files in its directory and, where SLURM is, from its queue.

A run's last entry may be outdated: a killed process leaves "running" behind. SLURM's state of the job decides,
also that it no longer knows the job; else whether the process still exists, which only its own host can tell.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kfac_dist.errors import CheckpointError, KFACError
from kfac_dist.reporting.progress import duration
from kfac_dist.reporting.run_file import RunRecord, State, read_record
from kfac_dist.slurm.queue import FORGOTTEN, UNDER_WAY, WAITING, slurm_state
from kfac_dist.slurm.submission import submitted
from kfac_dist.training.checkpoints.checkpoint import MANIFEST, read_manifest
from kfac_dist.training.records.metrics import read_metrics


class Standing(StrEnum):
    """The condition of a run."""

    QUEUED = "queued"
    RUNNING = "running"
    PREEMPTED = "preempted"
    INTERRUPTED = "interrupted"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class Logged:
    """Something that a run wrote.

    Attributes:
        step: At which step.
        age: Seconds since.
    """

    step: int
    age: float


@dataclass(frozen=True)
class RunStatus:
    """The facts known of a run.

    Attributes:
        directory: The run's directory.
        standing: Its standing.
        reason: Reason why it stopped, or probably stopped; empty while it runs.
        logged: The last logged step; None so far.
        loss: The loss logged there.
        total_steps: Length of the run, if it is known yet.
        checkpoint: The newest complete checkpoint; None so far.
        ranks: Number of ranks; None before the first start.
        host: Host of rank 0, now or before.
        job: SLURM's number of the job.
        job_state: SLURM's state of it, or `FORGOTTEN`; None if SLURM can't be asked.
        restarts: Number of its restarts.
        earlier: Directory to which its start has moved an earlier run of its name; "" if there was none.
        unreadable: Reason why its log can't be read; empty if it can.
    """

    directory: str
    standing: Standing
    reason: str
    logged: Logged | None
    loss: float | None
    total_steps: int | None
    checkpoint: Logged | None
    ranks: int | None
    host: str | None
    job: str | None
    job_state: str | None
    restarts: int
    earlier: str = ""
    unreadable: str = ""

    def describe(self) -> str:
        """Return a few lines for a person."""
        lines = [f"{self.directory}: {self.standing}{f' ({self.reason})' if self.reason else ''}"]
        if self.logged is not None:
            of = f" of {self.total_steps}, {self.logged.step / self.total_steps:.0%}" if self.total_steps else ""
            lines.append(f"  step        {self.logged.step}{of}")
            lines.append(f"  loss        {_loss(self.loss)}, logged {duration(self.logged.age)} ago")
        if self.unreadable:
            lines.append(f"  metrics     {self.unreadable}")
        saved = self.checkpoint
        age = "none" if saved is None else f"step {saved.step}, saved {duration(saved.age)} ago"
        lines.append(f"  checkpoint  {age}")
        if self.ranks is not None:
            lines.append(f"  ranks       {self.ranks}, rank 0 on {self.host}")
        if self.job is not None:
            again = f", started again {self.restarts} times" if self.restarts else ""
            unknown = {None: "(no word from SLURM here)", FORGOTTEN: "(SLURM no longer knows it)"}
            lines.append(f"  SLURM job   {self.job} {unknown.get(self.job_state, self.job_state)}{again}")
        if self.earlier:
            lines.append(f"  before it   {self.earlier}")
        return "\n".join(lines)


def run_statuses(directory: Path) -> list[RunStatus]:
    """Return the status of a run, or of each run of a sweep.

    Raises:
        KFACError: There is no run in the directory.
    """
    job = submitted(directory)
    if job is not None and job.tasks:
        tasks = [(directory.with_name(f"{directory.name}-{task}"), f"{job.job}_{task}") for task in range(job.tasks)]
        return [run_status(task, number) for task, number in tasks]
    return [run_status(directory, None if job is None else job.job)]


def run_status(directory: Path, job: str | None, job_state: Callable[[str], str | None] | None = None) -> RunStatus:
    """Return the status of one run.

    Args:
        directory: Its directory.
        job: The job that was submitted for it, if any.
        job_state: Asks SLURM for a job's state.

    Raises:
        KFACError: There is no run in the directory.
    """
    record = read_record(directory)
    if record is None and job is None:
        raise KFACError(f"{directory}: no run is here; expected a run's directory, such as runs/digits-autoencoder")
    # From the job itself if it has begun: a directory may have been copied, or a job started by hand.
    number = job if record is None or (job is not None and "_" in job) else record.job or job
    queued = None if number is None else (job_state or slurm_state)(number)
    standing, reason = _standing(record, number, queued)
    metrics = directory / "metrics.jsonl"
    losses, unreadable = [], ""
    try:
        losses = [entry for entry in read_metrics(metrics) if "loss" in entry]
    except KFACError as error:  # how the run stands doesn't depend on it
        unreadable = str(error)
    return RunStatus(
        directory=str(directory),
        standing=standing,
        reason=reason,
        logged=Logged(losses[-1]["step"], _age(metrics)) if losses else None,
        loss=losses[-1]["loss"] if losses else None,
        total_steps=None if record is None else record.total_steps,
        checkpoint=_newest(directory / "checkpoints"),
        ranks=None if record is None else record.ranks,
        host=None if record is None else record.host,
        job=number,
        job_state=queued,
        restarts=0 if record is None else record.restarts,
        earlier="" if record is None else record.earlier,
        unreadable=unreadable,
    )


def _standing(record: RunRecord | None, job: str | None, job_state: str | None) -> tuple[Standing, str]:
    over = f"SLURM no longer knows job {job}" if job_state == FORGOTTEN else f"SLURM says {job_state}"
    if record is None:
        return _without_record(job_state, over)
    match record.state:
        case State.FINISHED:
            return Standing.FINISHED, ""
        case State.FAILED if job_state not in WAITING:
            return Standing.FAILED, record.reason
        case State.INTERRUPTED if job_state not in WAITING:
            return Standing.INTERRUPTED, record.reason
        case State.PREEMPTED:
            again = "; queued again" if job_state in WAITING else ""
            return Standing.PREEMPTED, record.reason + again
        case _ if job_state in WAITING:
            return Standing.QUEUED, "again"
        case _ if job_state is not None:
            return (Standing.RUNNING, "") if job_state in UNDER_WAY else (Standing.FAILED, over)
    if record.host == socket.gethostname() and not _exists(record.pid):
        return Standing.FAILED, "its process is gone, without a word"
    return Standing.RUNNING, ""


def _without_record(job_state: str | None, over: str) -> tuple[Standing, str]:
    if job_state is None:
        return Standing.QUEUED, "by its submission; SLURM can't be asked here"
    if job_state in WAITING:
        return Standing.QUEUED, ""
    if job_state in UNDER_WAY:
        return Standing.RUNNING, "its ranks still start"
    return Standing.FAILED, f"it never began to train; {over}"


def _newest(checkpoints: Path) -> Logged | None:
    for path in sorted(checkpoints.glob("step-*"), reverse=True):
        try:
            found = read_manifest(path)
            return Logged(found.step, _age(path / MANIFEST))
        except (CheckpointError, FileNotFoundError):  # being written, or being removed
            continue
    return None


def _loss(loss: object) -> str:
    """Write a loss; JSON has null for one that wasn't finite."""
    return f"{loss:.5g}" if isinstance(loss, int | float) else "not finite"


def _age(path: Path) -> float:
    return max(0.0, time.time() - path.stat().st_mtime)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
