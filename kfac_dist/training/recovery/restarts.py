"""A job restarted by its launcher resumes its own newest checkpoint, for any `checkpoint.resume`.

    first start     resume as configured ─▶ step-100 ─ step-200 ─ a rank dies       each checkpoint names its job
    restart         ◀───────────────── the job's own newest checkpoint; as configured only if there is none

That a job was restarted is told by torchrun's or SLURM's count on any rank (agents count for themselves), or by
torchrun's store, in which rank 0 finds the name of an earlier one: nodes that come or go are not counted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.startup.bootstrap import World
from kfac_dist.errors import CheckpointError
from kfac_dist.reporting.run_file import launcher_restarts
from kfac_dist.training.checkpoints.manifest import NAME, read_manifest


@dataclass(frozen=True)
class JobHistory:
    """The common history of one job's starts; the same on every rank.

    Attributes:
        name: Of the job; other jobs have others, as far as launchers tell.
        restarted: Whether this isn't its first start.
    """

    name: str
    restarted: bool

    def began(self, checkpoints: Path) -> bool:
        """Whether an earlier start of this job has begun the run: no complete checkpoint is another job's."""
        if not self.restarted:
            return False
        names: set[str] = set()
        for path in checkpoints.glob("step-*"):
            try:
                names |= {read_manifest(path).facts.get("job", "")} if NAME.fullmatch(path.name) else set()
            except CheckpointError:  # torn: it can't be gone on with, whosever it is
                continue
        return names <= {self.name}


def find_job(world: World, communicator: Communicator) -> JobHistory:
    """Return the job that these ranks belong to; collective."""
    own = _name(world.first, os.environ), world.restarted or any(launcher_restarts().values())
    words = communicator.gather_objects(own, label="job")
    return JobHistory(words[0][0], any(restarted for _, restarted in words))


def _name(first: str | None, environment: Mapping[str, str]) -> str:
    """Name the job: a requeued one keeps its number, and has other agents."""
    if "SLURM_JOB_ID" in environment:
        return f"slurm {environment['SLURM_JOB_ID']}"
    run = first or environment.get("TORCHELASTIC_RUN_ID")
    return f"torchrun {run}" if run else ""
