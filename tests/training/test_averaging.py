"""The average of the weights: the definition, what is evaluated, and runs that go on from a checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kfac_dist.config.schema import Config
from kfac_dist.engines.ddp import DDPEngine
from kfac_dist.training import train
from kfac_dist.training.averaging import IterateAverage
from kfac_dist.training.records.metrics import read_metrics
from tests.harness import run_ranks
from tests.training.runs import final_model, launched, losses, saved_tensors, small_config


def test_it_is_the_plain_mean_at_first_and_then_forgets() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = IterateAverage(DDPEngine(model), 0.75)
    path = [3.0, 5.0, 1.0, 2.0, 8.0, -4.0]
    for step, value in enumerate(path, start=1):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(step)
    expected = sum(path[:4]) / 4  # 1 − 1/4 is 0.75: from the fifth step on it forgets
    for value in path[4:]:
        expected = 0.75 * expected + 0.25 * value
    with average.in_place():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == -4
    assert average.state()["weight"].item() == pytest.approx(expected)


def _config(directory: Path | str, **sections: dict[str, Any]) -> Config:
    growing = {"batch_size": 6, "batch_growth": {"final": 26, "steps": 12}, "iterate_averaging": 0.8, "steps": 20}
    sections["train"] = {**growing, "log_every": 1, "evaluate_every": 5, **sections.get("train", {})}
    return small_config(directory, kfac=True, **sections)


def _average(directory: Path) -> dict[str, Tensor]:
    return saved_tensors(directory, "average.")


def test_what_is_evaluated_is_the_average_and_what_goes_on_are_the_weights(tmp_path: Path) -> None:
    averaged = train(_config(tmp_path / "averaged"), quiet=True).runs[0]
    plain = train(_config(tmp_path / "plain", train={"iterate_averaging": None}), quiet=True).runs[0]
    assert losses(tmp_path / "averaged/small") == losses(tmp_path / "plain/small")
    assert averaged.test_loss != plain.test_loss
    weights, average = final_model(tmp_path / "averaged/small"), _average(tmp_path / "averaged/small")
    assert all(not torch.equal(value, average[name.replace("model.", "average.")]) for name, value in weights.items())
    assert _average(tmp_path / "plain/small") == {}


def _train_on_ranks(directory: str, resume: str, engine: str) -> float | None:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    config = _config(directory, engine={"name": engine}, checkpoint={"every": 7, "keep": 9, "resume": resume})
    return train(config, quiet=True).runs[0].test_loss


def test_growing_batches_and_the_average_are_the_same_on_any_ranks_and_resume_exactly(tmp_path: Path) -> None:
    alone = train(_config(tmp_path / "1", checkpoint={"every": 7, "keep": 9}), quiet=True).runs[0].test_loss
    expected, average = losses(tmp_path / "1/small"), _average(tmp_path / "1/small")
    last = [record for record in read_metrics(tmp_path / "1/small/metrics.jsonl") if "epoch" in record][-1]
    assert last["epoch"] > 5, "by the end an epoch is two batches"
    for engine in ("ddp", "fsdp2"):
        directory = tmp_path / engine
        results = run_ranks(3, _train_on_ranks, str(directory), "never", engine)
        assert results == pytest.approx([alone] * 3, rel=1e-4)
        assert losses(directory / "small") == pytest.approx(expected, rel=1e-4)
    for name, value in _average(tmp_path / "ddp/small").items():
        torch.testing.assert_close(value, average[name], rtol=1e-3, atol=1e-4)
    for ranks, step in ((1, 14), (2, 7)):
        directory = tmp_path / f"resumed{ranks}"
        saved = f"small/checkpoints/step-{step:08d}"
        shutil.copytree(tmp_path / "1" / saved, directory / saved)
        shutil.copy(tmp_path / "1/small/metrics.jsonl", directory / "small")
        if ranks == 1:
            again = train(_config(directory, checkpoint={"every": 7, "resume": "auto"}), quiet=True).runs[0].test_loss
            assert again == alone
            assert losses(directory / "small") == expected
            assert all(torch.equal(value, average[name]) for name, value in _average(directory / "small").items())
        else:
            assert run_ranks(2, _train_on_ranks, str(directory), "auto", "fsdp2") == pytest.approx(
                [alone] * 2, rel=1e-4
            )


def test_an_average_begins_where_a_checkpoint_without_one_ends(tmp_path: Path) -> None:
    plain = {"iterate_averaging": None, "steps": 4}
    train(_config(tmp_path, train=plain), quiet=True)
    weights = final_model(tmp_path / "small")
    train(_config(tmp_path, train={"steps": 5}, checkpoint={"resume": "auto"}), quiet=True)
    stepped, average = final_model(tmp_path / "small"), _average(tmp_path / "small")
    for name, value in average.items():
        model = name.replace("average.", "model.")
        torch.testing.assert_close(value, 0.8 * weights[model] + 0.2 * stepped[model])
