"""The step: the same run on any number of ranks, no wait for the device, and failures that every rank shares."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_dist.config.schema import Config, Fisher
from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.distributed.startup.bootstrap import bootstrap
from kfac_dist.errors import KFACError
from kfac_dist.reporting.progress import SilentProgress
from kfac_dist.training import train
from kfac_dist.training.checkpoints.checkpoint import Checkpoints
from kfac_dist.training.loop import DivergedError, RunOutputs, Trainer
from kfac_dist.training.setup import build_parts
from tests.harness import run_ranks
from tests.training.runs import final_model, launched, losses, small_config

GPT = {"name": "byte_gpt", "args": {"layers": 1, "width": 8, "heads": 2, "context": 5, "vocabulary": 8}}
CASES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "accumulated": {"train": {"accumulate": 2}},
    "clipped adamw": {"optimizer": {"name": "adamw", "lr": 0.01}, "train": {"clip_grad_norm": 0.5}},
    "ragged tokens": {
        "model": GPT,
        "data": {"name": "tests.training.runs:ragged_text"},
        "loss": {"name": "token_cross_entropy"},
        "train": {"accumulate": 2},
    },
    "kfac": {"kfac": True},
    "kfac with sampled labels, accumulated": {
        "kfac": True,
        "train": {"accumulate": 2},
    },
}


def _config(directory: Path, case: str) -> Config:
    sections = dict(CASES[case])
    kfac = bool(sections.pop("kfac", False))
    sections["train"] = {"batch_size": 7, "steps": 12, "log_every": 1, **sections.get("train", {})}
    config = small_config(directory / case.replace(" ", "-"), kfac=kfac, **sections)
    if "sampled" not in case:
        return config
    curvature = config.kfac.curvature.model_copy(update={"fisher": Fisher.MC})
    return config.model_copy(update={"kfac": config.kfac.model_copy(update={"curvature": curvature})})


def _train_on_ranks(directory: str, cases: list[str]) -> list[tuple[float | None, ...]]:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    results = []
    for case in cases:
        summary = train(_config(Path(directory), case), quiet=True).runs[0]
        results.append((summary.train_loss, summary.test_loss, summary.metric_value))
    return results


def test_the_number_of_ranks_does_not_change_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = list(CASES)
    alone = {}
    for case in cases:
        summary = train(_config(tmp_path / "1", case), quiet=True).runs[0]
        alone[case] = (summary.train_loss, summary.test_loss, summary.metric_value)
    for world_size in (2, 3):
        results = run_ranks(world_size, _train_on_ranks, str(tmp_path / str(world_size)), cases, timeout=120)
        assert all(result == results[0] for result in results), "ranks evaluate to the same numbers"
        for case, evaluated in zip(cases, results[0], strict=True):
            tolerance = 1e-4 if case.startswith("kfac") else 1e-6
            one, several = (_config(tmp_path / str(ranks), case).run.directory + "/small" for ranks in (1, world_size))
            expected = final_model(Path(one))
            for name, value in final_model(Path(several)).items():
                torch.testing.assert_close(
                    value, expected[name], rtol=10 * tolerance, atol=tolerance, msg=f"{case}, {name}"
                )
            assert losses(Path(several)) == pytest.approx(losses(Path(one)), rel=10 * tolerance), case
            assert evaluated == pytest.approx(alone[case], rel=10 * tolerance), case
    assert "small" in capsys.readouterr().out, "the result is printed even when quiet"


def _fail_on_one_rank(directory: str) -> str:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    config = small_config(directory, data={"args": {"fails_on_rank": 1}})
    with pytest.raises(KFACError) as caught:
        train(config, quiet=True)
    few = small_config(directory, train={"batch_size": 1, "steps": 1})
    with pytest.raises(KFACError, match="a batch of 1 samples can't feed 2 ranks"):
        train(few, quiet=True)
    return str(caught.value)


def test_a_failure_of_one_rank_is_a_failure_of_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, _fail_on_one_rank, str(tmp_path))
    assert "/data/pixels is not mounted" in second
    assert first == f"rank 1: {second}"


class _HostSyncs(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    config = small_config(tmp_path, train={"steps": 6, "log_every": 3, "clip_grad_norm": 1.0})
    communicator = SoloCommunicator()
    parts = build_parts(config, bootstrap("cpu", 10), communicator)
    outputs = RunOutputs(
        None, Checkpoints(tmp_path, 1, communicator), SilentProgress(), {}, config.checkpoint, config.metrics
    )
    return Trainer(parts, communicator, outputs)


def test_a_step_that_does_not_log_reads_nothing_from_the_device(trainer: Trainer) -> None:
    seen = []
    with _HostSyncs() as syncs:
        after_step = trainer._after_step

        def watched() -> None:
            seen.append(syncs.count)
            after_step()
            syncs.count = 0

        trainer._after_step = watched  # type: ignore[method-assign]
        trainer.train()
    assert seen == [0] * 6


def test_gradients_are_cleared_and_the_model_trains(trainer: Trainer) -> None:
    trainer.parts.engine.module.eval()
    trainer.train()
    assert trainer.parts.engine.module.training
    assert (trainer.step, trainer.position.offset) == (6, 42)
    assert all(parameter.grad is None for parameter in trainer.parts.engine.module.parameters())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, optimizer={"lr": 1e30}, loss={"name": "mse"})
    with pytest.raises(DivergedError, match=r"the training loss is (nan|inf) at step \d+, learning rate 1e\+30: lower"):
        train(config, quiet=True)
