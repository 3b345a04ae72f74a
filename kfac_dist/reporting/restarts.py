"""The number of restarts of a run, by its launcher's word."""

from __future__ import annotations

import os

_LAUNCHERS = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "slurm": "SLURM_RESTART_COUNT"}


def launcher_restarts() -> dict[str, int]:
    """Return how often each launcher has started this job again."""
    return {by: int(os.environ.get(name) or 0) for by, name in _LAUNCHERS.items()}
