"""A game in the ordinary loop: any number of ranks, exact resume, steps that are skipped whole, pictures."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.distributed.startup.bootstrap import bootstrap
from kfac_dist.errors import DataError, ModelError
from kfac_dist.tasks import DataSplits, TwoPlayers
from kfac_dist.training import train
from kfac_dist.training.data.sampler import Position
from kfac_dist.training.game.passes import GamePasses
from kfac_dist.training.game.players import PlayersKFAC
from kfac_dist.training.records.metrics import read_metrics
from kfac_dist.training.records.window import Window
from kfac_dist.training.recovery.divergence import Guard
from kfac_dist.training.setup import build_parts
from tests.harness import run_ranks
from tests.training.games import small_game
from tests.training.runs import final_model, launched, losses

MC = {"curvature": {"factor_every": 2, "fisher": "mc"}}
# Logged windows straddle checkpoints, which the clock asks for at every boundary.
STEPS = {"train": {"steps": 10, "log_every": 3, "evaluate_every": 4}}
CASES: dict[str, dict[str, Any]] = {
    "mc": {"kfac": MC},
    "empirical, aligned": {"game": {"align": True, "score_samples": 30, "objective": "minimax"}},
}


def _train_every_case(directory: str) -> None:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    for name, sections in CASES.items():
        train(small_game(f"{directory}/{name}", **STEPS, **sections), quiet=True)


def _resumed_runs(directory: str) -> None:
    """A run that the clock saves, and one that goes on from its first checkpoint."""
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    timed = {**STEPS, "checkpoint": {"every_minutes": 1e-5, "keep": 99}, "kfac": MC}
    train(small_game(f"{directory}/timed", **timed), quiet=True)
    resumed = Path(directory, "resumed/small")
    if dist.get_rank() == 0:
        first = min(Path(directory, "timed/small/checkpoints").iterdir())
        (resumed / "checkpoints").mkdir(parents=True)
        shutil.copytree(first, resumed / "checkpoints" / first.name)
        shutil.copy(Path(directory, "timed/small/metrics.jsonl"), resumed)
    dist.barrier()
    train(small_game(resumed.parent, **STEPS, checkpoint={"resume": "auto"}, kfac=MC), quiet=True)


def _assert_same(one: Path, other: Path, tolerance: float) -> None:
    expected = final_model(other)
    for name, value in final_model(one).items():
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def _evaluations(directory: Path) -> list[dict[str, float]]:
    return [record for record in read_metrics(directory / "metrics.jsonl") if "test_loss" in record]


def test_three_ranks_play_the_game_of_one(tmp_path: Path) -> None:
    for size in (1, 3):
        run_ranks(size, _train_every_case, str(tmp_path / str(size)), timeout=120)
    for case in CASES:
        one, three = (tmp_path / size / case / "small" for size in ("1", "3"))
        _assert_same(three, one, 2e-4)
        assert losses(three) == pytest.approx(losses(one), rel=1e-4)
        for found, wanted in zip(_evaluations(three), _evaluations(one), strict=True):
            assert found == pytest.approx(wanted, rel=2e-3)
        record = read_metrics(one / "metrics.jsonl")[-1]
        assert record["game/adjustment_norm"] > 0
        assert record["kfac/discriminator/damping"] == 2 * record["kfac/generator/damping"]


def test_a_resumed_game_is_the_same_game_to_the_bit(tmp_path: Path) -> None:
    run_ranks(2, _resumed_runs, str(tmp_path), timeout=120)
    whole, resumed = (tmp_path / name / "small" for name in ("timed", "resumed"))
    assert losses(resumed) == losses(whole)
    _assert_same(resumed, whole, 0.0)
    assert _evaluations(resumed) == _evaluations(whole)
    kept = [{k: v for k, v in r.items() if k.startswith("game/")} for r in read_metrics(whole / "metrics.jsonl")]
    again = [{k: v for k, v in r.items() if k.startswith("game/")} for r in read_metrics(resumed / "metrics.jsonl")]
    assert again == kept


def test_a_run_leaves_figures_and_pictures_that_show_something(tmp_path: Path) -> None:
    result = train(small_game(tmp_path, **STEPS), quiet=True)
    from matplotlib.image import imread

    pictures = sorted((result.directory / "samples").iterdir())
    assert [path.name for path in pictures] == [f"step-{step:08d}.png" for step in (4, 8, 10)]
    first, last = imread(pictures[0]), imread(pictures[-1])
    assert last.std() > 0.05, "not blank"
    assert (first != last).any(), "the generator has learned something in between"
    [summary] = result.runs
    assert summary.evaluated == "Fréchet distance"
    assert summary.metric == "classifier score"
    assert summary.metric_value is not None
    assert 1 <= summary.metric_value <= 8
    assert _evaluations(result.directory)[0]["score/judge_accuracy"] > 0.9


def test_a_step_that_is_not_finite_for_one_player_is_skipped_by_both(tmp_path: Path) -> None:
    """Only the discriminator sees real samples, of which one is NaN: the generator's own gradient is finite."""
    config = small_game(
        tmp_path,
        data={"name": "tests.training.games:bars", "args": {"poisoned": 3, "samples": 7}},
        game={"adjustment": 0.0, "score_samples": 30},
        train={"steps": 2, "log_every": 2, "divergence": {"skips": 9, "rollbacks": 0}},
        kfac={"curvature": {"factor_every": 1}, "inversion": {"inverse_every": 1, "damping": 0.1}},
    )
    parts = build_parts(config, bootstrap("cpu", 10), SoloCommunicator())
    assert isinstance(parts.kfac, PlayersKFAC)
    assert parts.game is not None
    guard, window = Guard(parts.engine, SoloCommunicator(), torch.device("cpu")), Window(torch.device("cpu"))
    passes = GamePasses(parts.game, parts.kfac, SoloCommunicator(), guard, window)
    before = {name: p.detach().clone() for name, p in parts.engine.module.named_parameters()}
    counts = passes.run(next(parts.stream.steps(Position())), 0)
    parts.kfac.step()
    taken = guard.taken()
    parts.engine.take_step(parts.optimizer, None)
    window.add_step(7, counts.everywhere, taken)
    assert not taken
    assert all(torch.equal(p, before[name]) for name, p in parts.engine.module.named_parameters())
    for member in parts.kfac.members:
        statistics = member.solver_access.local_statistics()
        assert all((value == 0).all() for value in statistics.values() if value.is_floating_point())


def no_game() -> nn.Module:
    return nn.Linear(2, 2)


def of_other_shape() -> TwoPlayers:
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    return TwoPlayers(nn.Linear(3, 9), nn.Sequential(nn.AdaptiveAvgPool1d(16), discriminator), 3)


def unlabelled() -> DataSplits:
    pictures = torch.zeros(20, 1, 4, 4)
    return DataSplits(TensorDataset(pictures, pictures), TensorDataset(pictures, pictures))


def test_players_and_data_that_make_no_game_are_refused(tmp_path: Path) -> None:
    here = "tests.training.game.test_passes"
    with pytest.raises(ModelError, match=r"returned Linear; a game's model is a kfac_dist\.tasks\.TwoPlayers"):
        train(small_game(tmp_path, model={"name": f"{here}:no_game"}), quiet=True)
    with pytest.raises(ModelError, match=r"generator makes samples of shape \[9\], those of the data have \[1, 4, 4\]"):
        train(small_game(tmp_path, model={"name": f"{here}:of_other_shape"}), quiet=True)
    with pytest.raises(DataError, match="targets must be class labels"):
        train(small_game(tmp_path, data={"name": f"{here}:unlabelled"}), quiet=True)
