"""Bad data and bad models: one clear message on every rank, or a correct run; never a hang, never a traceback."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from kfac_dist.config.schema import Config
from kfac_dist.errors import KFACError
from kfac_dist.training import train
from tests.harness import run_ranks
from tests.training.runs import launched, small_config

DATA, MODELS = "tests.bad_models:samples", "tests.bad_models:"
WORLD_SIZE = 3


def _config(directory: str | Path, case: dict[str, Any]) -> Config:
    sections = {
        "model": {"name": MODELS + case.get("model", "good"), "args": case.get("model_args", {})},
        "data": {"name": case.get("data", DATA), "args": case.get("args", {})},
        "loss": {"name": case.get("loss", "cross_entropy")},
        "train": {"batch_size": 6, "steps": 6, "log_every": 4, **case.get("train", {})},
        "engine": case.get("engine", {}),
    }
    return small_config(directory, kfac=True, **sections)


def _outcome(directory: str, case: dict[str, Any]) -> str:
    """The message of a run, or "" if it was correct to its end."""
    try:
        summary = train(_config(directory, case), quiet=True).runs[0]
    except KFACError as error:
        return f"{type(error).__name__}: {error}"
    assert summary.train_loss is not None
    assert summary.train_loss < 1e3
    return ""


def _outcomes_on_rank(directory: str, cases: dict[str, dict[str, Any]]) -> dict[str, str]:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    return {name: _outcome(f"{directory}/{name.replace(' ', '-')}", case) for name, case in cases.items()}


# Case → configuration, and what alone and on three ranks is said: None is a run that is correct to its end.
CASES: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "nan": (
        {"args": {"nan_at": 17}},
        r"DataError: step [1-5]: sample 17 of the training data has nan in its input; `kfac-dist doctor` lists all",
        r"DataError: step [1-5]: sample 17 of the training data has nan in its input; `kfac-dist doctor` lists all",
    ),
    "no samples": ({"args": {"count": 0, "test": 0}}, "training data has no samples", "training data has no samples"),
    "no test samples": ({"args": {"test": 0}}, "the test data has no samples", "the test data has no samples"),
    "small batch": ({"train": {"batch_size": 2}}, None, r"batch of 2 samples can't feed 3 ranks: raise train.batch_si"),
    "batch of one a rank": ({"train": {"batch_size": 3}}, None, None),
    "one sample": ({"args": {"count": 1}, "train": {"batch_size": 1}}, None, "batch of 1 samples can't feed 3 ranks"),
    "nothing to precondition": ({"model": "Scaled"}, r"no layer .*\n  matrix: Scaled", r"no layer .*\n  matrix: Sca"),
    "frozen": ({"model": "frozen"}, "requires_grad is false everywhere", "requires_grad is false everywhere"),
    "shape": (
        {"args": {"features": 5}},
        r"DataError: the first samples: model or loss refuse the data: mat1 and mat2 .*; inputs float32 \[2, 5\] from "
        r".*, targets int64 \[2\] from .*; the model's first parameter is 0.weight, float32 \[8, 6\]",
        r"inputs float32 \[2, 5\] .* 0.weight, float32 \[8, 6\]",
    ),
    "dtype": ({"args": {"dtype": "float64"}}, r"inputs float64 .* 0.weight, float32", r"inputs float64 .* float32"),
    "label": (
        {"args": {"bad_label": 20}},
        "sample 20 of the training data has the target 7; expected a label from 0 to 3",
        "sample 20 of the training data has the target 7; expected a label from 0 to 3",
    ),
    "not a tensor": ({"model": "NotATensor"}, "the model returns dict; a run's", "the model returns dict; a run's"),
    "loss of another task": (
        {"loss": "sigmoid_cross_entropy"},
        r"outputs have shape \(2, 4\), the targets \(2,\)",
        r"outputs have shape \(2, 4\), the targets \(2,\)",
    ),
    "constant inputs": ({"args": {"constant": True}}, None, None),
    "unused layer": (
        {"model": "Branches", "model_args": {"rule": "left"}},
        None,
        "the loss doesn't depend on right.weight, right.bias, whose gradients DDP waits for: set engine.find_unused",
    ),
    "unused layer, allowed": (
        {
            "model": "Branches",
            "model_args": {"rule": "left"},
            "engine": {"find_unused_parameters": True},
        },
        None,
        None,
    ),
    "another layer on each rank": (
        {
            "model": "Branches",
            "model_args": {"rule": "rank"},
            "engine": {"find_unused_parameters": True},
        },
        None,
        None,
    ),
    "another layer on each rank, not allowed": (
        {"model": "Branches", "model_args": {"rule": "rank"}},
        None,
        "the loss doesn't depend on (left|right).weight, (left|right).bias, whose gradients",
    ),
    "another shape on each rank": (
        {"model": "shaped_by_rank"},
        None,
        r"PlanMismatchError: .*first at block 0 \(0.weight\):\n  ranks 0, 2: 0.weight: float32 \[8, 6\]\n  rank 1:",
    ),
    "another kind of model on each rank": ({"model": "covered_by_rank"}, None, "PlanMismatchError: .*0.weight / mat"),
    "ragged items": (
        {"data": "tests.bad_models:items", "args": {"kind": "ragged"}},
        "DataError: BadItems: reading samples fails with RuntimeError: .*equal size",
        "DataError: BadItems: reading samples fails with RuntimeError: .*equal size",
    ),
    "items that are no pairs": (
        {"data": "tests.bad_models:items", "args": {"kind": "single"}},
        r"an item must be a pair \(input, target\)",
        r"an item must be a pair \(input, target\)",
    ),
    "items that raise": (
        {"data": "tests.bad_models:items", "args": {"kind": "raises"}},
        r"fails with KeyError: 'no such image' \(\S+bad_models.py:\d+\)",
        r"fails with KeyError: 'no such image' \(\S+bad_models.py:\d+\)",
    ),
    "batch norm of one sample a rank": (
        {"model": "normalised", "train": {"batch_size": 3}},
        None,
        r"step 1: model or loss refuse the data: Expected more than 1 value per channel",
    ),
}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    directory = str(tmp_path_factory.mktemp("ranks"))
    return run_ranks(WORLD_SIZE, _outcomes_on_rank, directory, {name: case[0] for name, case in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_alone(name: str, tmp_path: Path) -> None:
    case, expected, _ = CASES[name]
    _assert_said(_outcome(str(tmp_path), case), expected)


@pytest.mark.parametrize("name", CASES)
def test_on_three_ranks(name: str, on_ranks: list[dict[str, str]]) -> None:
    for outcomes in on_ranks:
        _assert_said(outcomes[name], CASES[name][2])


def _assert_said(message: str, expected: str | None) -> None:
    if expected is None:
        assert message == ""
    else:
        assert re.search(expected, message, flags=re.DOTALL), message


def _outcome_on_rank(directory: str, case: dict[str, Any]) -> str:
    return _outcomes_on_rank(directory, {"late": case})["late"]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            {"data": "tests.bad_models:items", "args": {"kind": "label", "start": 29}},
            r"DataError: step [1-5]: model or loss refuse the data: Target 4 is out of bounds.; inputs float32 ",
        ),
        (
            {"model": "Branches", "model_args": {"rule": "data"}, "train": {"batch_size": 9}},
            r"ModelError: step 1: the loss doesn't depend on (left|right).weight, .*, whose gradients DDP waits for",
        ),
    ],
    ids=["label", "branch"],
)
def test_a_rank_that_fails_late_says_why_and_the_others_that_it_has_left(
    tmp_path: Path, case: dict[str, Any], said: str
) -> None:
    outcomes = run_ranks(WORLD_SIZE, _outcome_on_rank, str(tmp_path), case, group_timeout=8.0)
    assert any(re.search(said, outcome) for outcome in outcomes), outcomes
    for outcome in outcomes:
        assert re.search(said, outcome) or re.match(r"CollectiveError: ", outcome), outcomes
