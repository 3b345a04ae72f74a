"""Small runs for the tests of training: their configurations, their data, and their results on several ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils.data import TensorDataset

from kfac_dist.config.schema import Config
from kfac_dist.config.yaml.load import resolve
from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.tasks import DataSplits
from kfac_dist.training.checkpoints.checkpoint import Checkpoints
from kfac_dist.training.records.metrics import read_metrics

IGNORED = -100


def small_config(
    directory: Path | str, *, kfac: bool | dict[str, Any] = False, **sections: dict[str, Any] | None
) -> Config:
    """An autoencoder on 52 random samples, in batches of 7 that no number of ranks divides evenly.

    A section that is None is left out; `kfac` may say more than whether there is any.
    """
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "small", "directory": str(directory), "seed": 3, "device": "cpu", "timeout_seconds": 20},
        "model": {"name": "autoencoder", "args": {"dims": [6, 5, 3]}},
        "data": {"name": "tests.training.runs:random_pixels"},
        "loss": {"name": "sigmoid_cross_entropy"},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "kfac": {
            "enabled": bool(kfac),
            "curvature": {"factor_every": 2},
            "inversion": {"inverse_every": 4, "damping": 0.1},
            **(kfac if isinstance(kfac, dict) else {}),
        },
        "train": {"batch_size": 7, "steps": 12, "log_every": 1},
        "checkpoint": {"every": 0},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **(section or {})}
        if section is None:
            del values[name]
    return resolve(Config.model_validate(values))


def random_pixels(samples: int = 52, fails_on_rank: int | None = None) -> DataSplits:
    if fails_on_rank is not None and os.environ.get("RANK", "0") == str(fails_on_rank):
        raise FileNotFoundError("/data/pixels is not mounted")
    pixels = torch.rand(samples, 6, generator=torch.Generator().manual_seed(0)).round()
    test = torch.rand(11, 6, generator=torch.Generator().manual_seed(1)).round()
    return DataSplits(TensorDataset(pixels, pixels), TensorDataset(test, test))


def ragged_text() -> DataSplits:
    """Sequences of which a different number of positions count, in some none."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(8, (41, 5), generator=generator)
    lengths = torch.randint(0, 6, (41, 1), generator=generator)
    labels = tokens.roll(1, 1).masked_fill(torch.arange(5) >= lengths, IGNORED)
    return DataSplits(TensorDataset(tokens, labels), TensorDataset(tokens[:9], labels[:9]))


class DropoutNet(nn.Sequential):
    """Draws from the random generator at every step."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 6))


class WeightByHand(nn.Module):
    """Uses the first layer's weight by hand, too, so that K-FAC has to leave that layer out; or every layer's."""

    def __init__(self, every: bool = False) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 6)
        self.every = every

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(self.first(x).tanh(), self.first.weight)
        out: Tensor = self.last(self.middle(h).tanh())
        if self.every:
            out = out + F.linear(F.linear(x, self.middle.weight).tanh(), self.last.weight)
        return out


def launched(rank: int, world_size: int, port: int = 1) -> dict[str, str]:
    """What a launcher would set; the port is unused where a process group exists already."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextmanager
def deepspeed_ends_here() -> Iterator[None]:
    """Leave nothing of DeepSpeed's groups behind: this process goes on in another world."""
    import deepspeed  # noqa: F401
    from deepspeed.utils import groups

    comm = sys.modules["deepspeed.comm.comm"]
    kept = {name: value for name, value in vars(groups).items() if name.startswith("_") and name.isupper()}
    try:
        yield
    finally:
        comm.cdb = None  # type: ignore[attr-defined]
        vars(groups).update(kept)


def final_model(directory: Path) -> dict[str, Tensor]:
    """The parameters and buffers in the newest checkpoint of a run."""
    return saved_tensors(directory, "model.")


def saved_tensors(directory: Path, prefix: str) -> dict[str, Tensor]:
    """What the newest checkpoint of a run has under names that begin so."""
    checkpoints = Checkpoints(directory / "checkpoints", 1, SoloCommunicator())
    newest = checkpoints.newest()
    assert newest is not None
    state = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in checkpoints.contents(newest).state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    checkpoints.load(newest, state)
    return state


def losses(directory: Path) -> dict[int, float]:
    """Step to logged training loss."""
    return {record["step"]: record["loss"] for record in read_metrics(directory / "metrics.jsonl") if "loss" in record}
