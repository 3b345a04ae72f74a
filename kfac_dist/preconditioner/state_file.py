"""A `KFAC`'s state as one file beside somebody else's checkpoint: DeepSpeed's tag, Hugging Face's folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from kfac_dist.errors import CheckpointError
from kfac_dist.preconditioner.kfac import KFAC


def save_kfac(kfac: KFAC, path: str | Path) -> None:
    """Write the whole state to a file, which is there completely or not at all; collective.

    Every rank gathers the state; where that is too much, give `kfac.sharded_state_dict()` to
    `torch.distributed.checkpoint` instead.

    Args:
        kfac: The preconditioner.
        path: The file, on a file system that all ranks see; its directory is made when needed.
    """
    values = kfac.state_dict()
    if kfac.communicator.rank == 0:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".writing")
        with partial.open("wb") as stream:
            torch.save(values, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    kfac.communicator.gather_objects(None, label="checkpoint")  # it is there for all once this returns


def load_kfac(kfac: KFAC, path: str | Path) -> None:
    """Read what `save_kfac` wrote, on any number of ranks and under any engine.

    Raises:
        CheckpointError: The file can't be read, or belongs to another model.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"can't read {path}: {error}") from error
    kfac.load_state_dict(values)
