"""Runs whose checkpoints an earlier version wrote: the last one before the package's files were sorted into folders.

`earlier.tar.xz` holds, for each run, its checkpoint at one step and the losses of the steps that followed there. It was
written by that version, commit 18b35e0: in a checkout of it, with this file copied there,

    python -m tests.training.earlier_runs earlier.tar.xz

Nothing here may change: what was saved once is what has to be read.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kfac_dist.config.schema import Config
from kfac_dist.tasks import DataSplits
from kfac_dist.training import train
from tests.harness import run_ranks
from tests.training.games import small_game
from tests.training.runs import deepspeed_ends_here, launched, losses, small_config

SAVED, STEPS = 6, 12


class Mixed(nn.Module):
    """A convolution, a norm and an embedding's kin: blocks of several kinds, some of them left uncovered."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 3, 3, padding=1)
        self.norm = nn.LayerNorm(18)
        self.scale = nn.Parameter(torch.ones(18))
        self.head = nn.Linear(18, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.convolution(x.unsqueeze(1)).flatten(1).tanh()
        out: Tensor = self.head(self.norm(hidden) * self.scale)
        return out


def labelled_pixels() -> DataSplits:
    generator = torch.Generator().manual_seed(4)
    pixels, labels = torch.rand(52, 6, generator=generator), torch.randint(3, (52,), generator=generator)
    return DataSplits(TensorDataset(pixels, labels), TensorDataset(pixels[:11], labels[:11]))


def _inverted(**options: Any) -> dict[str, Any]:
    return {"kfac": {"inversion": {"inverse_every": 4, "damping": 0.1} | options}}


_DEEP: dict[str, Any] = {"model": {"args": {"dims": [6, 5, 4, 3]}}}
_CLASSES: dict[str, Any] = {
    "model": {"name": "mlp", "args": {"dims": [6, 4, 3], "activation": "tanh"}},
    "data": {"name": "tests.training.earlier_runs:labelled_pixels"},
    "loss": {"name": "cross_entropy"},
}
_GPT: dict[str, Any] = {
    "model": {"name": "byte_gpt", "args": {"layers": 1, "width": 4, "heads": 2, "context": 5, "vocabulary": 8}},
    "data": {"name": "tests.training.runs:ragged_text"},
    "loss": {"name": "token_cross_entropy"},
    "optimizer": {"name": "adamw", "lr": 0.01},
}
_NEWTON: dict[str, Any] = {
    "optimizer": None,
    "train": {"iterate_averaging": 0.8, "batch_growth": {"final": 26, "steps": 12}},
}
_NEWTON_OPTIONS: dict[str, Any] = {
    "solver": "newton",
    "newton": {"gamma_every": 8, "damping_every": 3},
    "curvature": {"fisher": "mc"},
    "inversion": {"inverse_every": 4, "damping": 0.5},
    "update": {"l2": 0.001},
}

# Run → sections of its configuration.
ALONE: dict[str, dict[str, Any]] = {
    "cholesky": {"optimizer": {"momentum": 0.9}, **_inverted()},
    "eigen": {"optimizer": {"name": "adamw", "lr": 0.01}, **_inverted(solver="eigen")},
    "ekfac": _inverted(solver="ekfac", rescale_every=1),
    "newton_schulz": _inverted(solver="newton_schulz"),
    "lagging": _inverted(inverse_lag=2, stagger=2, early_refresh=0),
    "adapted": _inverted(adapt={"every": 2}, inverse_every=2),
    "blocks": _inverted(max_factor_dim=3),
    "block_tridiagonal": {**_DEEP, **_inverted(solver="eigen", structure="block_tridiagonal")},
    "class_conditional": {**_CLASSES, "kfac": {"curvature": {"class_conditional": True}}},
    "diagonal": {
        "model": {"name": "tests.training.earlier_runs:Mixed", "args": {}},
        "kfac": {"curvature": {"uncovered": "diagonal"}},
    },
    "gpt": {**_GPT, "kfac": {"curvature": {"sharing": "reduce"}, "update": {"graft": "gradient"}}},
    "svag": {"optimizer": {"name": "svag", "lr": 0.01}, "metrics": {"relative_variance": True}, "kfac": {}},
    "cg": {
        "optimizer": None,
        "kfac": {"solver": "cg", "curvature": {"fisher": "mc"}, "cg": {"lr": 0.3, "damping": 0.3, "adapt_every": 2}},
    },
    "newton": {**_NEWTON, "kfac": _NEWTON_OPTIONS},
    "newton_tridiagonal": {
        **_NEWTON,
        **_DEEP,
        "kfac": {
            **_NEWTON_OPTIONS,
            "inversion": {"inverse_every": 4, "damping": 0.5, "solver": "eigen", "structure": "block_tridiagonal"},
        },
    },
    "game": {"kfac": {"curvature": {"fisher": "mc"}}},
    # Saved between two logged losses, and between a measurement and its refresh.
    "by_the_clock": {"checkpoint": {"every": 0, "every_minutes": 1e-5}, "train": {"log_every": 4}, "kfac": {}},
}
ON_TWO: dict[str, dict[str, Any]] = {
    "ddp": {"kfac": {"distribution": {"placement": "replicated"}}},
    "owners": {"kfac": {"distribution": {"placement": "owner", "reduction": "reduce_scatter"}}},
    "fsdp2": {"engine": {"name": "fsdp2"}},
    "zero1": {"engine": {"name": "zero1"}},
    "zero2": {
        "engine": {
            "name": "zero2",
            "precision": "float16",
            "deepspeed": {"fp16": {"initial_scale_power": 8, "loss_scale_window": 2}},
        }
    },
    "zero3": {"engine": {"name": "zero3"}},
}


def earlier_config(name: str, directory: Path | str, *, resume: str = "never", **checkpoint: Any) -> Config:
    """Configuration of one of the runs, in a directory; resumed, it goes on with the checkpoint that is there."""
    sections = {**(ALONE | ON_TWO)[name]}
    kfac = sections.pop("kfac", {})
    kfac = {**kfac, "curvature": {"factor_every": 2, **kfac.get("curvature", {})}}
    sections["train"] = {"steps": STEPS, **sections.get("train", {})}
    sections["checkpoint"] = {
        "every": SAVED,
        "keep": 99,
        **sections.get("checkpoint", {}),
        "resume": resume,
    } | checkpoint
    if name == "game":
        return small_game(directory, **sections, kfac=kfac)
    return small_config(directory, kfac={"enabled": True, **kfac}, **sections)


def begin_on_ranks() -> None:
    """Take this rank's place as a launcher would tell it."""
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()), DS_ACCELERATOR="cpu")
    from deepspeed.accelerator import get_accelerator

    # It asks for a CPU that is quick in fp16; any is able.
    get_accelerator().is_fp16_supported = lambda: True


def _train_on_ranks(directory: str) -> None:
    with deepspeed_ends_here():
        begin_on_ranks()
        for name in ON_TWO:
            train(earlier_config(name, f"{directory}/{name}"), quiet=True)


def _write(archive: Path) -> None:
    with tempfile.TemporaryDirectory() as place, tarfile.open(archive, "w:xz") as target:
        for name in ALONE:
            train(earlier_config(name, f"{place}/{name}"), quiet=True)
        run_ranks(2, _train_on_ranks, place, timeout=300)
        for name in ALONE | ON_TWO:
            run = Path(place) / name / "small"
            steps = {int(path.name.removeprefix("step-")): path for path in run.glob("checkpoints/step-*")}
            step = SAVED if name != "by_the_clock" else max(steps.keys() & {5, 7})
            after = {number: loss for number, loss in losses(run).items() if number > step}
            (run / "losses.json").write_text(json.dumps(after))
            for kept in (steps[step], run / "losses.json"):
                target.add(kept, f"{name}/{kept.relative_to(run)}", filter=_nameless)


def _nameless(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who wrote a file and when."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
