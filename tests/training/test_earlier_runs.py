"""Checkpoints of an earlier version go on as they went on there, in every form of K-FAC and under every engine."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from kfac_dist.training import train
from tests.harness import run_ranks
from tests.training.earlier_runs import ALONE, ON_TWO, STEPS, begin_on_ranks, earlier_config
from tests.training.runs import deepspeed_ends_here, losses

ARCHIVE = Path(__file__).parent / "earlier.tar.xz"
# Sums in another order are to pass; statistics, dampings or random states that begin anew are not.
TOLERANCE = 2e-6


def _unpack(names: dict[str, object], directory: Path) -> dict[str, dict[int, float]]:
    """Put runs where they were interrupted; returns their losses from there on."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    expected = {}
    for name in names:
        (directory / name / "small").mkdir()
        (directory / name / "checkpoints").rename(directory / name / "small/checkpoints")
        found = json.loads((directory / name / "losses.json").read_text())
        expected[name] = {int(step): loss for step, loss in found.items()}
    return expected


def test_every_run_goes_on_as_it_did(tmp_path: Path) -> None:
    expected = _unpack(ALONE, tmp_path)
    for name in ALONE:
        config = earlier_config(name, tmp_path / name, resume="auto")
        assert train(config, quiet=True).runs[0].steps == STEPS
    assert {name: losses(tmp_path / name / "small") for name in ALONE} == {
        name: pytest.approx(after, rel=TOLERANCE) for name, after in expected.items()
    }


@pytest.mark.parametrize("name", ["ekfac", "newton", "game"])
def test_without_its_state_it_would_not(name: str, tmp_path: Path) -> None:
    expected = _unpack({name: None}, tmp_path)
    train(earlier_config(name, tmp_path / name, resume="auto", kfac="fresh"), quiet=True)
    assert losses(tmp_path / name / "small") != pytest.approx(expected[name], rel=100 * TOLERANCE)


def _go_on_on_ranks(directory: str) -> None:
    with deepspeed_ends_here():
        begin_on_ranks()
        for name in ON_TWO:
            train(earlier_config(name, f"{directory}/{name}", resume="auto"), quiet=True)


def test_runs_of_every_engine_go_on_as_they_did(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    expected = _unpack(ON_TWO, tmp_path)
    run_ranks(2, _go_on_on_ranks, str(tmp_path), timeout=120)
    assert {name: losses(tmp_path / name / "small") for name in ON_TWO} == {
        name: pytest.approx(after, rel=TOLERANCE) for name, after in expected.items()
    }
