"""Steps that aren't finite: all ranks skip them, go back when they go on, and give up when that doesn't help."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_dist.config.schema import DivergenceConfig
from kfac_dist.config.yaml.load import load_config, resolve
from kfac_dist.training import train
from kfac_dist.training.records.metrics import read_metrics
from kfac_dist.training.recovery.divergence import DivergedError, Recovery, Verdict
from tests.harness import run_ranks
from tests.training.runs import deepspeed_ends_here, final_model, launched, small_config


class FlakyNet(nn.Sequential):
    """Returns NaN in some of its forward passes, on one rank; passes that are run again after a rollback go well."""

    def __init__(self, rank: int, first: int, last: int) -> None:
        super().__init__(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
        self.passes = -2  # the trial, and DDP's first pass, are no steps
        self.bad = range(first, last + 1) if os.environ["RANK"] == str(rank) else range(0)

    def forward(self, pixels: Tensor) -> Tensor:
        outputs: Tensor = super().forward(pixels)
        self.passes += self.training
        return outputs * float("nan") if self.passes in self.bad else outputs


def _run(directory: str, first: int, last: int, **engine: Any) -> str:
    config = small_config(
        directory,
        kfac=True,
        model={
            "name": "tests.training.recovery.test_divergence:FlakyNet",
            "args": {"rank": 1, "first": first, "last": last},
        },
        train={"steps": 20, "log_every": 2, "divergence": {"skips": 3, "damping_factor": 10.0, "rollbacks": 2}},
        checkpoint={"every": 5, "keep": 9},
        engine=engine,
    )
    try:
        train(config, quiet=True)
    except DivergedError as error:
        return str(error)
    return ""


CASES = {"once": (8, 8), "for a while": (8, 12), "for ever": (8, 999)}


def _all(directory: str) -> dict[str, Any]:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    return {name: _run(f"{directory}/{name}", *bad) for name, bad in CASES.items()}


# Without a loss scale: stage 2 would take such a step, stage 3 leave it out without a word.
SHARDED: dict[str, dict[str, Any]] = {
    "zero2": {"name": "zero2"},
    "zero3": {"name": "zero3"},
    "bf16": {"name": "zero3", "precision": "bfloat16"},
}


def _all_sharded(directory: str) -> dict[str, str]:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()), DS_ACCELERATOR="cpu")
    with deepspeed_ends_here():
        return {name: _run(f"{directory}/{name}", 8, 8, **engine) for name, engine in SHARDED.items()}


def test_deepspeed_skips_alike_without_a_loss_scale(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    for said in run_ranks(2, _all_sharded, str(tmp_path)):
        assert said == dict.fromkeys(SHARDED, "")
    for name in SHARDED:
        records = read_metrics(tmp_path / name / "small/metrics.jsonl")
        assert max(r["kfac/damping"] for r in records if "kfac/damping" in r) == 1.0, "it was raised after the skip"
        model = final_model(tmp_path / name / "small")
        assert model
        assert all(bool(torch.isfinite(values).all()) for values in model.values())


def test_ranks_skip_together_go_back_together_and_give_up_together(tmp_path: Path) -> None:
    said = run_ranks(2, _all, str(tmp_path))
    assert said[0] == said[1]
    records = {name: read_metrics(tmp_path / name / "small/metrics.jsonl") for name in CASES}
    damping = {name: [r["kfac/damping"] for r in records[name] if "kfac/damping" in r] for name in CASES}
    model = final_model(tmp_path / "once/small")
    assert all(bool(torch.isfinite(values).all()) for values in model.values())

    assert said[0]["once"] == ""
    assert damping["once"] == [0.1] * 3 + [1.0] * 4 + [0.1] * 3
    assert [r["step"] for r in records["once"]] == list(range(2, 21, 2))

    assert said[0]["for a while"] == ""
    assert [r["step"] for r in records["for a while"]] == [2, 4, *range(6, 21, 2)], "what was given up is forgotten"
    assert damping["for a while"][2] > 0.1, "from the checkpoint on it is raised"

    assert "the training loss is nan at step" in said[0]["for ever"]


class LargeNet(nn.Sequential):
    """Takes inputs whose squares exceed float32 in some passes, on one rank; its gradients are finite in all."""

    def __init__(self, first: int, last: int, rank: int) -> None:
        super().__init__(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
        self.passes = -2  # the trial, and DDP's first pass, are no steps
        self.large = range(first, last + 1) if os.environ["RANK"] == str(rank) else range(0)

    def forward(self, pixels: Tensor) -> Tensor:
        self.passes += self.training
        outputs: Tensor = super().forward(pixels * (1e22 if self.passes in self.large else 1.0))
        return outputs


def _train_with_large_inputs(directory: str, first: int, last: int, rank: int) -> tuple[str, list[str]]:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    config = small_config(
        f"{directory}/{first}-{last}",
        kfac=True,
        model={
            "name": "tests.training.recovery.test_divergence:LargeNet",
            "args": {"first": first, "last": last, "rank": rank},
        },
        train={"steps": 20, "log_every": 2, "divergence": {"skips": 3, "rollbacks": 1}},
        checkpoint={"every": 4, "keep": 9},
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            train(config, quiet=True)
            said = ""
        except DivergedError as error:
            said = str(error)
    return said, [str(warning.message) for warning in caught if "statistics" in str(warning.message)]


def test_statistics_that_are_not_finite_are_told_damp_and_lead_back(tmp_path: Path) -> None:
    for result in run_ranks(2, _train_with_large_inputs, str(tmp_path), 7, 8, 1):
        assert result[0] == ""
    records = [r for r in read_metrics(tmp_path / "7-8/small/metrics.jsonl") if "kfac/damping" in r]
    assert [r["skipped"] for r in records] == [0] * 10, "gradients are finite"
    assert [r["kfac/dropped_statistics"] for r in records] == [0] * 3 + [1] * 7
    assert [r["kfac/damping"] for r in records] == pytest.approx([0.1] * 3 + [1.0] * 4 + [0.1] * 3)

    leading, other = run_ranks(2, _train_with_large_inputs, str(tmp_path), 6, 999, 1)
    assert leading[0] == other[0]
    for text in ("by step 10 K-FAC's statistics of 0 were not finite on rank 1", "kfac.curvature.exclude"):
        assert text in leading[0]
    assert len(leading[1]) == 1, "it is told once"
    assert other[1] == []
    saved = sorted(path.name for path in (tmp_path / "6-999/small/checkpoints").iterdir())
    assert saved == ["step-00000004"], "there is no going back to a run that knows no curvature"


def test_recovery_raises_lowers_and_goes_back() -> None:
    config, recovery = DivergenceConfig(skips=3, damping_factor=4.0), Recovery()

    def judge(step: int, skipped: int, row: int, last: bool = False) -> Verdict:
        return recovery.judge(config, step=step, skipped=skipped, row=row, calm=10, last=last)

    assert judge(5, 1, 0) is Verdict.GO_ON
    assert recovery.damping_factor == 4.0
    assert judge(14, 0, 0) is Verdict.GO_ON
    assert recovery.damping_factor == 4.0, "not calm for long enough"
    assert judge(15, 0, 0) is Verdict.GO_ON
    assert recovery.damping_factor == 1.0
    assert judge(20, 4, 3) is Verdict.GO_BACK
    assert judge(21, 1, 1, last=True) is Verdict.GO_BACK, "a run must not end with a step that it skipped"
    recovery.went_back(Recovery(damping_factor=16.0), config, 10)
    assert (recovery.damping_factor, recovery.rollbacks, recovery.changed_at) == (64.0, 1, 10)


def test_the_shipped_bad_start_diverges_bare_and_trains_as_it_is_configured(tmp_path: Path) -> None:
    path = Path(__file__).parents[3] / "configs" / "bad_start.yaml"
    short = (f"run.directory={tmp_path}", "train.steps=40", "checkpoint.every=0", "train.divergence.skips=2")
    bare = ("optimizer.lr=0.1", "kfac.inversion.damping=0.03", "kfac.update.graft=null")
    steadied = train(resolve(load_config(path, short)), quiet=True).runs[0]
    assert steadied.train_loss is not None
    assert steadied.train_loss < 80  # of some 3,700 at the start
    with pytest.raises(DivergedError):
        train(resolve(load_config(path, (*short, *bare))), quiet=True)
