"""`checkpoint`: saving, keeping and resuming checkpoints."""

from __future__ import annotations

from typing import Literal

from kfac_dist.config.section import Count, CountOrZero, FilePath, Flag, NonNegative, Section


class CheckpointConfig(Section):
    """Saving, keeping and resuming checkpoints.

    Attributes:
        every: Steps between checkpoints; 0 saves at the end only.
        every_minutes: Minutes of rank 0's clock between additional checkpoints; 0: none. They don't change the course
            of the run, and hold every rank's own statistics.
        asynchronous: Write in the background: training waits only for the copy to host memory and, if the last write
            isn't finished when the next one is due, for that write.
        keep: Number of newest checkpoints that stay on disk.
        kfac: `restore` loads K-FAC's statistics and inverses from the checkpoint; `fresh` starts K-FAC anew and resumes
            only model and optimizer, as from a checkpoint of a run without K-FAC.
        resume: `auto` resumes the newest good checkpoint of this run, `never` starts afresh; or a checkpoint's path.
    """

    every: CountOrZero = 0
    every_minutes: NonNegative = 0.0
    asynchronous: Flag = True
    keep: Count = 2
    kfac: Literal["restore", "fresh"] = "restore"
    resume: FilePath = "never"
