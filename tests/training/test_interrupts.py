"""Ctrl-C on a run without a launcher: the first saves and says how to go on, the second ends at once."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from kfac_dist.config.yaml.load import dump_yaml
from kfac_dist.reporting.run_file import State, read_record
from tests.started import Started
from tests.training.runs import losses, small_config

PATIENCE_SECONDS = 60
pytestmark = pytest.mark.usefixtures("unmeasured")


class Endless(nn.Sequential):
    """Takes its time to be built."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6))
        Path(os.environ["STANDSTILL"]).touch()
        time.sleep(60)


def _write(directory: Path, **sections: Any) -> Path:
    values: dict[str, Any] = {
        "data": {"name": "tests.training.recovery.test_preemption:slow_pixels"},
        "train": {"steps": 10_000, "log_every": 1},
    }
    config = directory / "run.yaml"
    config.write_text(dump_yaml(small_config(directory, **(values | sections))))
    return config


def _start(*words: str, standstill: Path) -> Started:
    return Started(words, {**os.environ, "SECONDS_PER_SAMPLE": "0.005", "STANDSTILL": str(standstill)})


def _wait(condition: Callable[[], bool], run: Started) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _interrupt(run: Started) -> str:
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=PATIENCE_SECONDS)
    assert run.returncode == 130, said
    assert "Traceback" not in said
    return said


def test_the_first_saves_and_the_command_that_it_says_goes_on(tmp_path: Path) -> None:
    config, small = _write(tmp_path), tmp_path / "small"
    words = ["train", str(config), "--quiet", "--resume", "never", "train.log_every=1"]
    run = _start(*words, standstill=tmp_path / "no")
    _wait(lambda: bool(losses(small)), run)
    said = _interrupt(run)
    record = read_record(small)
    assert record is not None
    assert (record.state, record.reason) == (State.INTERRUPTED, "SIGINT on rank 0")
    assert (small / f"checkpoints/step-{record.step:08}").is_dir()
    assert max(losses(small)) == record.step, "no step is lost"
    assert not (tmp_path / "small.lock").exists()
    first, last = said.splitlines()
    assert first == "Ctrl-C: the run saves its state and ends; once more ends it at once"
    expected = f"kfac-dist train {config} --quiet train.log_every=1 --resume auto"
    assert last == f"interrupted at step {record.step} by SIGINT on rank 0; continue with: {expected}"

    _, command = last.split("continue with: kfac-dist ")
    again = _start(*shlex.split(command), f"train.steps={record.step + 2}", standstill=tmp_path / "no")
    assert again.wait(PATIENCE_SECONDS) == 0
    assert sorted(losses(small)) == list(range(1, record.step + 3))


def test_the_second_ends_a_step_that_never_does(tmp_path: Path) -> None:
    config, standstill = _write(tmp_path), tmp_path / "standstill"
    run = _start("train", str(config), "--quiet", standstill=standstill)
    _wait(lambda: bool(losses(tmp_path / "small")), run)
    standstill.touch()
    time.sleep(0.3)
    run.send_signal(signal.SIGINT)
    time.sleep(0.1)
    run.send_signal(signal.SIGINT)  # the same key, by another way
    time.sleep(1.5)
    assert run.poll() is None
    assert _interrupt(run).count("\n") == 1
    record = read_record(tmp_path / "small")
    assert record is not None
    assert record.state is State.INTERRUPTED


def test_before_training_the_first_ends_the_run(tmp_path: Path) -> None:
    built = tmp_path / "built"
    config = _write(tmp_path, model={"name": "tests.training.test_interrupts:Endless", "args": {}})
    run = _start("train", str(config), "--quiet", standstill=built)
    _wait(built.exists, run)
    began = time.monotonic()
    assert _interrupt(run) == ""
    assert time.monotonic() - began < 20
    record = read_record(tmp_path / "small")
    assert record is not None
    assert record.state is State.INTERRUPTED
    assert not (tmp_path / "small.lock").exists()
