"""A `KFAC`'s state as one file beside another library's checkpoint: DeepSpeed's tag, Hugging Face's folder."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from kfac_dist.errors import CheckpointError
from kfac_dist.preconditioner import state
from kfac_dist.preconditioner.kfac import KFAC


def save_kfac(kfac: KFAC, path: str | Path) -> None:
    """Write the whole state to a file, which is there completely or not at all; collective.

    Every rank gathers the state; where that is too much, give `kfac.sharded_state_dict()` to
    `torch.distributed.checkpoint` instead.

    Args:
        kfac: The preconditioner.
        path: The file, on a file system that all ranks see; its directory is made when needed.

    Raises:
        CheckpointError: It can't be written; every rank raises.
    """
    values = kfac.state_dict()
    problem = None
    if kfac.communicator.rank == 0:
        try:
            _write(values, Path(path))
        except (OSError, RuntimeError) as error:  # torch.save hides the system's reason behind the latter
            problem = f"can't write {path}: {error}"
    # It is there for all once this returns.
    problem = kfac.communicator.gather_objects(problem, label=state.LABEL)[0]
    if problem is not None:
        raise CheckpointError(problem)


def load_kfac(kfac: KFAC, path: str | Path) -> None:
    """Load a file of `save_kfac`, on any number of ranks and under any engine.

    Raises:
        CheckpointError: The file can't be read by some rank, or belongs to another model; every rank raises.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, no state")
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        problem = CheckpointError(f"can't read {path}: {error}")
        state.refuse_to_load(kfac.communicator, problem)
        raise problem from error
    kfac.load_state_dict(values)


def _write(values: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".writing")
    with partial.open("wb") as stream:
        torch.save(values, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
