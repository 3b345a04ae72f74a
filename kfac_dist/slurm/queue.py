"""SLURM's state of a job: from its queue, else from its accounting, if there is any."""

from __future__ import annotations

import shutil
import subprocess

WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"})
UNDER_WAY = frozenset({"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED"})
FORGOTTEN = "FORGOTTEN"
"""State of a job that SLURM no longer knows; none of SLURM's own words."""

_PATIENCE_SECONDS = 20.0  # for a controller that is busy, or does not answer
_UNKNOWN = "Invalid job id"


def slurm_state(job: str) -> str | None:
    """Return SLURM's state of a job, or of an array's tasks: that of an unfinished one, if there is one.

    Returns:
        A state such as `RUNNING`; `FORGOTTEN` for a job that has left the queue and is in no accounts (without accounts
        SLURM forgets a job some minutes after its end); None where SLURM is not, or does not answer.
    """
    queued = _ask("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T")
    if queued and queued != FORGOTTEN:
        return queued
    kept = _ask("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job}", "--format=State")
    # That the accounts know nothing means little: a job may not be there yet, or they may be switched off.
    return queued if kept in (None, FORGOTTEN) else kept


def _ask(program: str, *arguments: str) -> str | None:
    if shutil.which(program) is None:
        return None
    try:
        answer = subprocess.run(
            [program, *arguments], capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:
        return FORGOTTEN if _UNKNOWN in answer.stderr else None
    states = [line.split()[0] for line in answer.stdout.splitlines() if line.strip()]  # of "CANCELLED by 0", the first
    return next((state for state in states if state in WAITING | UNDER_WAY), states[0] if states else FORGOTTEN)
