"""The workload of `benchmarks.chaos`, with pauses at the places of faults.

A pause lasts long enough for the fault to come, and announces itself by a file; it happens in the process that
CHAOS_RANK names, once a run, at the place that CHAOS_PAUSE names: `write` or `inversion`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import kfac_dist.preconditioner.invert.unit_solver as solving
import kfac_dist.training.checkpoints.checkpoint as checkpoint
from kfac_dist.tasks import DataSplits

PAUSE_SECONDS = 1.0
STEP_SECONDS = 0.01
# The first few are passed over, so that there is something to go back to.
CALLS_BEFORE = {"write": 3, "inversion": 12}


class Net(nn.Sequential):
    """Draws from the random generator and keeps buffers; slow enough to be struck in the midst of a run.

    Args:
        seconds: Of a training pass.
        same_anywhere: Leave out layers that depend on the number of ranks: dropout, and statistics of a rank's batch.
    """

    def __init__(self, seconds: float = STEP_SECONDS, *, same_anywhere: bool = False) -> None:
        norm = [nn.LayerNorm(24)] if same_anywhere else [nn.BatchNorm1d(24), nn.Dropout(0.2)]
        super().__init__(nn.Linear(12, 24), *norm, nn.Tanh(), nn.Linear(24, 12))
        self.seconds = seconds
        _install_pause()

    def forward(self, pixels: Tensor) -> Tensor:
        if self.training:
            time.sleep(self.seconds)
        outputs: Tensor = super().forward(pixels)
        return outputs


def pixels() -> DataSplits:
    values = torch.rand(200, 12, generator=torch.Generator().manual_seed(0)).round()
    return DataSplits(TensorDataset(values[:180], values[:180]), TensorDataset(values[180:], values[180:]))


class Listed(Dataset[tuple[Tensor, Tensor]]):
    """Samples that are brought one by one, by processes that load."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.dataset[index]
        return inputs, targets


def listed_pixels() -> DataSplits:
    splits = pixels()
    return DataSplits(Listed(splits.train), Listed(splits.test))  # type: ignore[arg-type]


def _install_pause() -> None:
    place, marker = os.environ.get("CHAOS_PAUSE"), os.environ.get("CHAOS_MARKER")
    if marker is None or Path(marker).exists() or os.environ["RANK"] != os.environ["CHAOS_RANK"]:
        return
    match place:
        case "write":
            # Half of them before a byte is written, half before the manifest is.
            if os.environ["CHAOS_HALF"] == "0":
                dcp.save = _pausing(dcp.save, Path(marker), CALLS_BEFORE["write"])  # type: ignore[assignment]
            else:
                checkpoint.file_facts = _pausing(checkpoint.file_facts, Path(marker), CALLS_BEFORE["write"])  # type: ignore[attr-defined]
        case "inversion":
            solving.solve = _pausing(solving.solve, Path(marker), CALLS_BEFORE["inversion"])  # type: ignore[attr-defined]


def _pausing(function: Callable[..., Any], marker: Path, passed_over: int) -> Callable[..., Any]:
    calls = 0

    def paused(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == passed_over:
            marker.touch()
            time.sleep(PAUSE_SECONDS)
        return function(*args, **kwargs)

    return paused
