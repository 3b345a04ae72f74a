"""Runs by K-FAC Newton: the same on any number of ranks, resumed exactly, past a bad batch, and down on digits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset

from kfac_dist.config.schema import Config
from kfac_dist.config.yaml.load import resolve
from kfac_dist.tasks import DataSplits
from kfac_dist.training import train
from kfac_dist.training.records.metrics import read_metrics
from tests.harness import run_ranks
from tests.training.runs import final_model, launched, losses, random_pixels, small_config

NEWTON: dict[str, Any] = {
    "solver": "newton",
    "newton": {"gamma_every": 8, "damping_every": 3, "products_fraction": 0.5},
    "curvature": {"fisher": "mc"},
    "inversion": {"inverse_every": 4, "damping": 0.5},
    "update": {"l2": 0.001},
}


def _config(directory: Path | str, kfac: dict[str, Any] | None = None, **sections: Any) -> Config:
    train = {"steps": 20, "batch_growth": {"final": 26, "steps": 12}, "iterate_averaging": 0.8}
    sections["train"] = train | sections.get("train", {})
    values = small_config(directory, **sections).model_dump(mode="json")
    return resolve(Config.model_validate(values | {"optimizer": None, "kfac": NEWTON | (kfac or {})}))


def _train_on_ranks(directory: str, resume: str) -> float | None:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    checkpoint = {"every": 6, "keep": 9, "resume": resume}
    results = [
        train(_config(f"{directory}/{name}", checkpoint=checkpoint, train=settings), quiet=True).runs[0].test_loss
        for name, settings in (("plain", {}), ("accumulated", {"accumulate": 2}))
    ]
    return results[-1] if results[0] == pytest.approx(results[1], rel=1e-4) else None


def _solver(directory: Path) -> list[dict[str, float]]:
    records = read_metrics(directory / "small/metrics.jsonl")
    return [{key: value for key, value in r.items() if key.startswith("solver/")} for r in records if "loss" in r]


def test_any_number_of_ranks_and_micro_batches_take_the_same_steps_and_resume(tmp_path: Path) -> None:
    alone = train(_config(tmp_path / "1", checkpoint={"every": 6, "keep": 9}), quiet=True).runs[0].test_loss
    expected = losses(tmp_path / "1/small")
    assert expected[20] < 0.9 * expected[1]
    results = run_ranks(3, _train_on_ranks, str(tmp_path / "3"), "never", timeout=120)
    assert results == pytest.approx([alone] * 3, rel=1e-3)
    assert losses(tmp_path / "3/plain/small") == pytest.approx(expected, rel=1e-3)
    found, there = _solver(tmp_path / "1"), _solver(tmp_path / "3/plain")
    assert {step["solver/gamma"] for step in found} != {found[0]["solver/gamma"]}, "γ was searched for"
    for one, other in zip(found, there, strict=True):
        assert one == pytest.approx(other, rel=0.02, abs=1e-3)
    resumed = tmp_path / "resumed"
    saved = "small/checkpoints/step-00000006"  # between two refreshes, and before the first search
    shutil.copytree(tmp_path / "1" / saved, resumed / saved)
    shutil.copy(tmp_path / "1/small/metrics.jsonl", resumed / "small")
    again = train(_config(resumed, checkpoint={"every": 6, "resume": "auto"}), quiet=True).runs[0].test_loss
    assert losses(resumed / "small") == expected
    assert again == alone
    whole = final_model(tmp_path / "1/small")
    assert all(torch.equal(value, whole[name]) for name, value in final_model(resumed / "small").items())


def test_another_solver_starts_afresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"adapt_every": 1, "max_iterations": 3, "lr": 0.1}
    solvers: list[dict[str, Any]] = [
        {},
        {"solver": "cg", "newton": None, "cg": options, "curvature": {"factor_every": 1}},
        {},
    ]
    resume = "never"
    for place, kfac in enumerate(solvers):  # each goes on for a step from where the last one ended
        directory, steps = tmp_path / str(place), 3 + place
        settings = {"steps": steps, "log_every": 1, "batch_growth": None}
        checkpoint = {"every": steps, "resume": resume}
        train(_config(directory, kfac, train=settings, checkpoint=checkpoint), quiet=not place)
        resume = f"{directory}/small/checkpoints/step-{steps:08d}"
    notes = "".join("".join(capsys.readouterr()).split())
    assert "step-00000003:writtenwithkfac.solvernewton;cgstartsafresh" in notes
    assert "step-00000004:writtenwithkfac.solvercg;newtonstartsafresh" in notes
    [cg], [newton] = _solver(tmp_path / "1"), _solver(tmp_path / "2")
    assert cg["solver/damping"] == pytest.approx(0.5 + 0.001)
    assert newton["solver/lambda"] == 0.5
    assert newton["solver/mu"] == 0


def one_bad_sample() -> DataSplits:
    """Pixels of which one is so large that what comes of it is no number."""
    splits = random_pixels()
    inputs, targets = splits.train.tensors  # type: ignore[attr-defined]
    inputs = inputs.clone()
    inputs[5] = 1e30
    return DataSplits(TensorDataset(inputs, targets), splits.test)


def test_a_batch_whose_gradients_are_not_finite_is_skipped_and_damped(tmp_path: Path) -> None:
    model = {"name": "autoencoder", "args": {"dims": [6, 5, 3], "activation": "relu"}}
    bad = {"name": "tests.training.test_newton:one_bad_sample"}
    train(_config(tmp_path, data=bad, model=model, train={"batch_growth": None}), quiet=True)
    records = [
        record for record in read_metrics(tmp_path / "small/metrics.jsonl") if "loss" in record or "lr" in record
    ]
    assert len(records) == 20
    assert records[-1]["loss"] < 10
    assert max(record["kfac/damping"] for record in records) > 4 * records[0]["kfac/damping"], "steps were skipped"
    assert all(torch.isfinite(value).all() for value in final_model(tmp_path / "small").values())


def test_it_learns_digits_in_a_few_steps(tmp_path: Path) -> None:
    values = _config(tmp_path).model_dump(mode="json")
    values |= {
        "model": {"name": "autoencoder", "args": {"dims": [64, 30, 10]}},
        "data": {"name": "digits", "args": {"target": "input"}},
        "train": {"batch_size": 300, "steps": 25, "log_every": 1},
    }
    train(resolve(Config.model_validate(values)), quiet=True)
    loss = losses(tmp_path / "small")
    assert loss[25] < 0.45 * loss[1]
