"""Kill a run at any moment: what is resumed is the same run, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from kfac_dist.config.yaml.load import dump_yaml
from kfac_dist.errors import CheckpointError
from kfac_dist.preconditioner import state
from kfac_dist.training import train
from kfac_dist.training.records.metrics import read_metrics
from tests.distributed.startup.test_rendezvous import free_port
from tests.harness import run_ranks
from tests.started import Started
from tests.training.runs import final_model, launched, losses, small_config

DROPOUT = {"name": "tests.training.runs:DropoutNet", "args": {}}
STEPS = 40


def _continue_from(directory: Path, finished: Path, step: int) -> None:
    """Make a run directory as a kill after the checkpoint at `step` would have left it."""
    (directory / "checkpoints").mkdir(parents=True)
    name = f"step-{step:08d}"
    shutil.copytree(finished / "checkpoints" / name, directory / "checkpoints" / name)
    shutil.copy(finished / "metrics.jsonl", directory)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kfac", [True, False], ids=["kfac", "plain"])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, optimizer: str, kfac: bool) -> None:
    sections = {
        "model": DROPOUT,
        "optimizer": {"name": optimizer, "lr": 0.01},
        # Two logged losses straddle a checkpoint, and one window is left open by it.
        "train": {"steps": 20, "log_every": 3},
        "checkpoint": {"every": 7, "keep": 9},
    }
    whole, resumed = (small_config(tmp_path / name, kfac=kfac, **sections) for name in ("whole", "resumed"))
    train(whole, quiet=True)
    _continue_from(tmp_path / "resumed/small", tmp_path / "whole/small", 14)
    auto = resumed.model_copy(update={"checkpoint": resumed.checkpoint.model_copy(update={"resume": "auto"})})
    train(auto, quiet=True)
    assert losses(tmp_path / "resumed/small") == losses(tmp_path / "whole/small")
    expected = final_model(tmp_path / "whole/small")
    assert all((value == expected[name]).all() for name, value in final_model(tmp_path / "resumed/small").items())
    before, after = (read_metrics(tmp_path / name / "small/metrics.jsonl") for name in ("whole", "resumed"))
    assert after[:4] == before[:4], "the first steps, to the microsecond: they were not run again"
    seconds = [record["seconds"] for record in after]
    assert seconds == sorted(seconds), "training time goes on counting"


def test_a_checkpoint_from_before_dampings_were_saved_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"train": {"steps": 6, "log_every": 3}, "checkpoint": {"every": 3, "keep": 9}}
    held = state.held
    with monkeypatch.context() as patch:
        patch.setattr(state, "held", lambda *args: {k: v for k, v in held(*args).items() if k != "damping"})
        train(small_config(tmp_path / "whole", kfac=True, **sections), quiet=True)
    _continue_from(tmp_path / "resumed/small", tmp_path / "whole/small", 3)
    sections["checkpoint"] |= {"resume": "auto"}
    train(small_config(tmp_path / "resumed", kfac=True, **sections), quiet=True)
    assert losses(tmp_path / "resumed/small") == losses(tmp_path / "whole/small")


@pytest.mark.parametrize("every", [False, True])
def test_a_run_that_left_layers_out_resumes_without_them(tmp_path: Path, every: bool) -> None:
    sections: dict[str, Any] = {
        "model": {"name": "tests.training.runs:WeightByHand", "args": {"every": every}},
        "checkpoint": {"every": 7, "keep": 9},
    }
    whole, resumed = (small_config(tmp_path / name, kfac=True, **sections) for name in ("whole", "resumed"))
    with pytest.warns(UserWarning, match=r"keep their plain gradient from now on"):
        train(whole, quiet=True)
    _continue_from(tmp_path / "resumed/small", tmp_path / "whole/small", 7)
    auto = resumed.model_copy(update={"checkpoint": resumed.checkpoint.model_copy(update={"resume": "auto"})})
    with warnings.catch_warnings():
        # Nothing is left out only now.
        warnings.filterwarnings("error", "the inputs and output gradients captured")
        train(auto, quiet=True)
    assert losses(tmp_path / "resumed/small") == losses(tmp_path / "whole/small")
    expected = final_model(tmp_path / "whole/small")
    assert all((value == expected[name]).all() for name, value in final_model(tmp_path / "resumed/small").items())


def _save_by_the_clock(directory: str) -> None:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    sections = {"train": {"steps": 20, "log_every": 3}, "model": {"args": {"dims": [6, 5, 3]}}}
    train(small_config(f"{directory}/whole", kfac=True, **sections), quiet=True)
    timed = sections | {"checkpoint": {"every_minutes": 1e-5, "keep": 99}}
    train(small_config(f"{directory}/timed", kfac=True, **timed), quiet=True)


def _resume_as_it_was(directory: str) -> None:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    sections = {"train": {"steps": 20, "log_every": 3}, "checkpoint": {"resume": "auto"}}
    train(small_config(directory, kfac=True, **sections), quiet=True)


def test_checkpoints_by_the_clock_leave_no_trace_in_the_run(tmp_path: Path) -> None:
    run_ranks(2, _save_by_the_clock, str(tmp_path))
    whole, timed = losses(tmp_path / "whole/small"), losses(tmp_path / "timed/small")
    assert timed == whole
    saved = sorted((tmp_path / "timed/small/checkpoints").iterdir())
    assert len(saved) > 1
    step = int(saved[0].name.removeprefix("step-"))
    _continue_from(tmp_path / "resumed/small", tmp_path / "timed/small", step)
    run_ranks(2, _resume_as_it_was, str(tmp_path / "resumed"))
    assert losses(tmp_path / "resumed/small") == whole


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    train(small_config(tmp_path), quiet=True)
    path = str(tmp_path / "small/checkpoints/step-00000012")
    other = small_config(
        tmp_path / "other", model={"args": {"dims": [6, 5, 2]}}, checkpoint={"every": 0, "resume": path}
    )
    with pytest.raises(CheckpointError, match=r"model\.linear2\.weight has shape \(3, 5\), in this run \(2, 5\)"):
        train(other, quiet=True)
    missing = small_config(tmp_path / "other", checkpoint={"resume": str(tmp_path / "step-00000001")})
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        train(missing, quiet=True)


def _resume_on_ranks(directory: str) -> None:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    config = small_config(directory, kfac=True, train={"steps": 20}, checkpoint={"every": 7, "resume": "auto"})
    train(config, quiet=True)


def test_a_chain_of_layers_is_not_resumed_by_layers_alone(tmp_path: Path) -> None:
    chained = {"structure": "block_tridiagonal", "solver": "eigen", "inverse_every": 4}
    train(small_config(tmp_path, kfac={"inversion": chained}, train={"steps": 2}), quiet=True)
    begun = str(tmp_path / "small/checkpoints/step-00000002")
    alone = small_config(
        tmp_path / "alone", kfac={"inversion": {**chained, "structure": "block_diagonal"}}, checkpoint={"resume": begun}
    )
    with pytest.raises(CheckpointError, match=r"kfac\.inversion\.structure: block_tridiagonal → block_diagonal"):
        train(alone, quiet=True)


def test_another_number_of_ranks_continues_the_run(tmp_path: Path) -> None:
    config = small_config(tmp_path / "1", kfac=True, train={"steps": 20}, checkpoint={"every": 7, "keep": 9})
    train(config, quiet=True)
    for world_size, step in ((2, 14), (3, 7)):
        directory = tmp_path / str(world_size)
        _continue_from(directory / "small", tmp_path / "1/small", step)
        run_ranks(world_size, _resume_on_ranks, str(directory))
        assert losses(directory / "small") == pytest.approx(losses(tmp_path / "1/small"), rel=1e-4)


def _start_ranks(config_file: Path, world_size: int = 2) -> list[Started]:
    port = free_port()
    words = ["train", str(config_file), "--resume", "auto", "--quiet"]
    return [Started(words, {**os.environ, **launched(rank, world_size, port)}) for rank in range(world_size)]


def _wait_for_step(directory: Path, step: int, ranks: list[Started]) -> None:
    deadline = time.monotonic() + 120
    while max(losses(directory), default=0) < step:
        assert all(rank.poll() is None for rank in ranks), "a rank ended by itself: " + "".join(
            rank.said for rank in ranks if rank.poll() is not None
        )
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(("engine", "kills"), [("ddp", (4, 17)), ("fsdp2", (11,)), ("zero3", (11,))])
def test_killed_ranks_resume_bit_for_bit(tmp_path: Path, engine: str, kills: tuple[int, ...]) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    config = small_config(
        tmp_path / "killed",
        kfac=True,
        model=DROPOUT,
        engine={"name": engine},
        train={"steps": STEPS, "batch_size": 8},
        checkpoint={"every": 3, "keep": 2},
    )
    config_file = tmp_path / "killed.yaml"
    config_file.write_text(dump_yaml(config))
    whole_file = tmp_path / "whole.yaml"
    values = yaml.safe_load(config_file.read_text())
    values["run"]["directory"] = str(tmp_path / "whole")
    whole_file.write_text(yaml.safe_dump(values))

    whole = _start_ranks(whole_file)
    assert [rank.wait(120) for rank in whole] == [0, 0]

    directory = tmp_path / "killed/small"
    generator = random.Random(0)
    first_steps = []
    for first in kills:
        ranks = _start_ranks(config_file)
        _wait_for_step(directory, first + generator.randrange(12), ranks)
        time.sleep(generator.random() * 0.02)
        victim = generator.randrange(2)
        ranks[victim].kill()
        # The other rank must not wait for ever; it too is gone before the next attempt.
        ranks[1 - victim].communicate(timeout=60)
        assert ranks[1 - victim].returncode != 0
        ranks[victim].communicate()
        first_steps.append(read_metrics(directory / "metrics.jsonl")[:3])
    assert [rank.wait(120) for rank in _start_ranks(config_file)] == [0, 0]

    first_steps.append(read_metrics(directory / "metrics.jsonl")[:3])
    assert all(steps == first_steps[0] for steps in first_steps), "runs went on from a checkpoint, not from the start"
    assert losses(directory) == losses(tmp_path / "whole/small")
    expected = final_model(tmp_path / "whole/small")
    assert all((value == expected[name]).all() for name, value in final_model(directory).items())
