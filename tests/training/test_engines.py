"""One loop under every engine: the same losses, and checkpoints that go from any engine and W to any other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kfac_dist.config.schema import Config
from kfac_dist.config.yaml.load import dump_yaml
from kfac_dist.errors import CheckpointError, ConfigError
from kfac_dist.training import train
from tests.harness import run_ranks
from tests.training.runs import deepspeed_ends_here, final_model, launched, losses, small_config

pytest.importorskip("deepspeed")

GPT = {
    "model": {"name": "byte_gpt", "args": {"layers": 2, "width": 8, "heads": 2, "context": 5, "vocabulary": 8}},
    "data": {"name": "tests.training.runs:ragged_text"},
    "loss": {"name": "token_cross_entropy"},
    "optimizer": {"name": "adamw", "lr": 0.01},
}
# Draws random numbers, has buffers, and its batches change the order in which ranks are summed.
DROPOUT = {"model": {"name": "tests.training.runs:DropoutNet", "args": {}}}
STEPS, SAVED = 12, 8


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: Its directory.
        engine: The engine section.
        task: Sections of the task.
        start: The run from whose checkpoint at step `SAVED` it goes on.
        batch_size: Samples of a step.
    """

    name: str
    engine: dict[str, Any]
    task: dict[str, Any] = field(default_factory=lambda: GPT)
    start: str | None = None
    batch_size: int = 7

    def config(self, directory: Path) -> Config:
        return small_config(
            directory / self.name,
            kfac=True,
            **self.task,
            engine=self.engine,
            train={"accumulate": 2, "clip_grad_norm": 0.5, "batch_size": self.batch_size, "evaluate_every": SAVED // 2},
            checkpoint={"every": SAVED // 2, "keep": 9, "resume": "auto"},
        )


def _train_jobs(directory: str, jobs: list[Job]) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ.update(launched(rank, world), DS_ACCELERATOR="cpu")
    with deepspeed_ends_here():
        from deepspeed.accelerator import get_accelerator

        # It asks for a CPU that is quick in fp16; any is able.
        get_accelerator().is_fp16_supported = lambda: True
        for job in jobs:
            if job.start is not None and rank == 0:
                _copy(Path(directory) / job.start / "small", Path(directory) / job.name / "small")
            dist.barrier()
            train(job.config(Path(directory)), quiet=True)


def _copy(source: Path, target: Path) -> None:
    (target / "checkpoints").mkdir(parents=True)
    name = f"step-{SAVED:08d}"
    shutil.copytree(source / "checkpoints" / name, target / "checkpoints" / name)
    shutil.copy(source / "metrics.jsonl", target)


def _same(first: Path, second: Path) -> None:
    expected, found = final_model(first / "small"), final_model(second / "small")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert losses(first / "small") == losses(second / "small")


# The loss scale doubles every other step, so that a resumed run must know where it was.
SCALED = {
    "name": "zero2",
    "precision": "float16",
    "deepspeed": {"fp16": {"initial_scale_power": 8, "loss_scale_window": 2}},
}
ON_THREE = [
    Job("ddp", {"name": "ddp"}),
    Job("fsdp2", {"name": "fsdp2"}),
    Job("zero1", {"name": "zero1"}),
    Job("zero3", {"name": "zero3"}),
    *(
        Job(f"exact-{name}{start and '-resumed'}", {"name": name}, DROPOUT, start or None, 13)
        for name in ("fsdp2", "zero2", "zero3")
        for start in ("", f"exact-{name}")
    ),
]
ON_TWO = [
    Job("zero3-to-ddp", {"name": "ddp"}, start="zero3"),
    Job("zero3-to-fsdp2", {"name": "fsdp2"}, start="zero3"),
    Job("fsdp2-to-zero2", {"name": "zero2"}, start="fsdp2"),
    Job("zero1-to-zero3", {"name": "zero3"}, start="zero1"),
    Job("ddp-to-zero3", {"name": "zero3", "deepspeed": {"zero_optimization": {"sub_group_size": 60}}}, start="ddp"),
    Job("hybrid", {"name": "fsdp2", "precision": "bfloat16", "fsdp2": {"wrap": ["blocks.*"], "replicas": 2}}),
    Job("half", {"name": "zero3", "precision": "bfloat16"}),
    Job("half-resumed", {"name": "zero3", "precision": "bfloat16"}, start="half"),
    Job("half-to-ddp", {"name": "ddp"}, start="half"),
    Job("scaled", SCALED),
    Job("scaled-resumed", SCALED, start="scaled"),
    Job("scaled-to-zero1", {"name": "zero1"}, start="scaled"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engines")
    run_ranks(3, _train_jobs, str(directory), ON_THREE, timeout=240)
    run_ranks(2, _train_jobs, str(directory), ON_TWO, timeout=240)
    return directory


@pytest.mark.parametrize("name", ["fsdp2", "zero1", "zero3"])
def test_every_engine_takes_the_same_steps(runs: Path, name: str) -> None:
    assert losses(runs / name / "small") == pytest.approx(losses(runs / "ddp/small"), rel=1e-5)


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_a_resumed_run_is_the_same_run(runs: Path, name: str) -> None:
    _same(runs / f"exact-{name}", runs / f"exact-{name}-resumed")


@pytest.mark.parametrize("name", ["zero3-to-ddp", "zero3-to-fsdp2", "fsdp2-to-zero2", "zero1-to-zero3", "ddp-to-zero3"])
def test_another_engine_on_fewer_ranks_continues_the_run(runs: Path, name: str) -> None:
    expected, found = losses(runs / "ddp/small"), losses(runs / name / "small")
    assert max(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-4)


def test_masters_of_half_precision_are_what_is_saved(runs: Path) -> None:
    _same(runs / "half", runs / "half-resumed")
    weights = final_model(runs / "half/small")
    assert {value.dtype for name, value in weights.items() if "@" in name} == {torch.float32}
    assert losses(runs / "half-to-ddp/small") == pytest.approx(losses(runs / "half/small"), rel=0.02)
    assert losses(runs / "hybrid/small") == pytest.approx(losses(runs / "ddp/small"), rel=0.02)


def test_the_loss_scale_is_part_of_a_checkpoint(runs: Path) -> None:
    _same(runs / "scaled", runs / "scaled-resumed")
    assert losses(runs / "scaled/small") == pytest.approx(losses(runs / "ddp/small"), rel=0.02)
    # Another engine has no loss scale, and mustn't take that one.
    assert losses(runs / "scaled-to-zero1/small") == pytest.approx(losses(runs / "scaled/small"), rel=0.02)


def test_no_rank_saves_what_it_does_not_hold(runs: Path) -> None:
    names = [name for name in final_model(runs / "zero3/small") if name.startswith("model.tokens.weight")]
    assert names == ["model.tokens.weight@0-22", "model.tokens.weight@22-44", "model.tokens.weight@44-64"]


def _refused(directory: str) -> list[str]:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()), DS_ACCELERATOR="cpu")
    found = []
    sections: list[dict[str, Any]] = [
        {"engine": {"name": "zero3", "deepspeed": {"zero_optimization": {"reduce_buckt_size": 5}}}},
        {"engine": {"name": "zero2", "deepspeed": {"zero_optimization": {"reduce_bucket_size": "many"}}}},
        {"engine": {"name": "zero1", "deepspeed": {"zero_optimisation": {}}}},
        {"engine": {"name": "fsdp2", "fsdp2": {"wrap": ["layers.*"]}}},
        {"engine": {"name": "fsdp2", "fsdp2": {"replicas": 3}}},
    ]
    with deepspeed_ends_here():
        for section in sections:
            with pytest.raises(ConfigError) as caught:
                train(small_config(directory, kfac=True, **section), quiet=True)
            found.append(str(caught.value))
        other = small_config(
            directory,
            engine={"name": "fsdp2"},
            model={"args": {"dims": [6, 4, 3]}},
            checkpoint={"resume": f"{directory}/zero/small/checkpoints/step-00000012"},
        )
        train(small_config(f"{directory}/zero", engine={"name": "zero3"}), quiet=True)
        with pytest.raises(CheckpointError) as refused:
            train(other, quiet=True)
    return [*found, str(refused.value)]


def test_what_does_not_fit_is_refused_with_its_key(tmp_path: Path) -> None:
    for found in run_ranks(2, _refused, str(tmp_path), timeout=120):
        unknown, wrong, misspelt, pattern, replicas, model = found
        assert unknown == "engine.deepspeed.zero_optimization.reduce_buckt_size: DeepSpeed knows no such key"
        assert wrong.startswith("engine.deepspeed.zero_optimization.reduce_bucket_size: ")
        assert "found 'many'" in wrong
        assert "engine.deepspeed.zero_optimisation: DeepSpeed knows no such key; did you mean 'zero_opt" in misspelt
        assert "engine.fsdp2.wrap: 'layers.*' matches no module with parameters; there are " in pattern
        assert replicas == "engine.fsdp2.replicas: 3 copies don't divide 2 ranks evenly"
        assert "has 30 elements, in this run 24: it is of another model or configuration" in model


def test_sharded_engines_ask_for_a_launcher(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"engine.name: zero2 needs ranks that a launcher started, if only one: torch"
    ):
        train(small_config(tmp_path, engine={"name": "zero2"}), quiet=True)


def test_deepspeeds_old_names_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump_yaml(small_config(tmp_path, kfac=True, engine={"name": "zero3"})))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "kfac_dist"]

    ended = subprocess.run(
        [sys.executable, *launcher, "train", str(tmp_path / "run.yaml"), "train.steps=2", "--quiet"],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )

    assert ended.returncode == 0, ended.stderr
    assert "FutureWarning" not in ended.stderr
