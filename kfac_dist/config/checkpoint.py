"""`checkpoint`: when to save, how many to keep, what to start from."""

from __future__ import annotations

from typing import Literal

from kfac_dist.config.section import Count, CountOrZero, FilePath, Flag, NonNegative, Section


class CheckpointConfig(Section):
    """When to save, how many to keep, and what to start from.

    Attributes:
        every: Steps between checkpoints; 0 saves at the end only.
        every_minutes: Minutes after which rank 0's clock asks for one more; 0 never does. It leaves no trace in the
            run, and holds every rank's own statistics.
        asynchronous: Write while training goes on: it waits for the copy to host memory only, and, if the last write
            isn't over when the next one is due, for that.
        keep: Newest checkpoints that stay on disk.
        kfac: `restore` takes K-FAC's statistics and inverses from the checkpoint; with `fresh` K-FAC begins anew while
            model and optimizer go on, as it does from a checkpoint of a run without K-FAC.
        resume: `auto` takes the newest good checkpoint of this run, `never` starts afresh, else a checkpoint's path.
    """

    every: CountOrZero = 0
    every_minutes: NonNegative = 0.0
    asynchronous: Flag = True
    keep: Count = 2
    kfac: Literal["restore", "fresh"] = "restore"
    resume: FilePath = "never"
