"""Reads DCP checkpoints without trusting them: no pickle of theirs can run code, and misfits are named first.

DCP unpickles its table of contents with plain `pickle` and non-tensor values with `weights_only=False`; here the former
is read as plain data (see `checkpoint_table`), and the latter are read with `weights_only=True`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from kfac_dist.errors import CheckpointError
from kfac_dist.training.checkpoints.table import read_table


class SafeReader(FileSystemReader):
    """DCP's reader for a local or shared file system, with a table of contents that can't run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checkpoint's table of contents.

        Raises:
            CheckpointError: It can't be read.
        """
        metadata = read_table(Path(self.path))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's load planner, with values other than tensors read by `weights_only`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Read one value that is no tensor."""
        torch.load(value, weights_only=True)  # refuses files that could run code; DCP may read all others
        value.seek(0)
        super().load_bytes(read_item, value)


def check_fit(state: dict[str, Any], metadata: Metadata, path: Path) -> None:
    """Compare the tensors to load with a checkpoint's.

    Raises:
        CheckpointError: Names the first tensor that the checkpoint lacks, or has in another shape.
    """
    held = metadata.state_dict_metadata
    wanted = dict(flatten(state))
    for name, value in wanted.items():
        if name not in held:
            raise CheckpointError(f"{path}: has no {name}, which this run has: it is of another model or configuration")
        entry = held[name]
        if isinstance(value, Tensor) and isinstance(entry, TensorStorageMetadata) and entry.size != value.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(entry.size)}, in this run {tuple(value.shape)}: "
                "it is of another model or configuration"
            )


def flatten(state: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted name, value)` as DCP names the values of nested dictionaries."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
