"""Starts that meet: a run's directory is one start's, and what is left of a killed one ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kfac_dist.config.yaml.load import dump_yaml
from kfac_dist.processes import parent_of, process
from kfac_dist.reporting.run_file import State, read_record
from kfac_dist.training.records.metrics import read_metrics
from tests.started import Started
from tests.training.runs import losses, small_config

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 60
pytestmark = pytest.mark.usefixtures("unmeasured")


def _write(directory: Path, **sections: Any) -> Path:
    values: dict[str, Any] = {
        "data": {"name": "tests.training.recovery.test_preemption:slow_pixels"},
        "train": {"steps": 60, "log_every": 1},
        "checkpoint": {"every": 5, "keep": 3},
    }
    config = directory / "run.yaml"
    config.write_text(dump_yaml(small_config(directory, **(values | sections))))
    return config


def _start(config: Path, *words: str) -> Started:
    return Started(
        ["train", str(config), "--quiet", *words], {**os.environ, "SECONDS_PER_SAMPLE": "0.01"}, new_session=True
    )


def _torchrun(config: Path, *, seconds_per_sample: float = 0.01) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "kfac_dist", "train", str(config), "--quiet", "--resume", "auto"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SECONDS_PER_SAMPLE": str(seconds_per_sample)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _wait_for_step(directory: Path, step: int, job: Started | subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while max(losses(directory), default=0) < step:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _children(pid: int) -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if parent_of(int(path.name)) == pid]


def test_starts_that_meet_a_running_one_are_refused_and_leave_it_alone(tmp_path: Path) -> None:
    config = _write(tmp_path, train={"steps": 100_000, "log_every": 1}, checkpoint={"every": 100})
    first = _start(config)
    try:
        _wait_for_step(tmp_path / "small", 1, first)
        others = [_start(config), _start(config, "--resume", "auto")]
        for other in others:
            said, _ = other.communicate(timeout=PATIENCE_SECONDS)
            assert other.returncode == 2
            assert said.startswith(f"error: {tmp_path}/small is in use by process {first.pid} on ")
            assert said.count("\n") == 1
        first.send_signal(signal.SIGTERM)
        said, _ = first.communicate(timeout=PATIENCE_SECONDS)
    finally:
        first.kill()
    assert first.returncode == 0, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml", "small"]
    steps = [record["step"] for record in read_metrics(tmp_path / "small/metrics.jsonl")]
    assert steps == list(range(1, steps[-1] + 1))
    record = read_record(tmp_path / "small")
    assert record is not None
    assert (record.state, record.step) == (State.PREEMPTED, steps[-1])


def test_of_two_that_resume_at_once_one_goes_on_and_its_checkpoints_are_whole(tmp_path: Path) -> None:
    config = _write(tmp_path, train={"steps": 10, "log_every": 1})
    job = _start(config)
    job.communicate(timeout=PATIENCE_SECONDS)
    both = [_start(config, "--resume", "auto", "train.steps=60") for _ in range(2)]
    ends = [job.communicate(timeout=PATIENCE_SECONDS)[0] for job in both]
    assert sorted(job.returncode for job in both) == [0, 2], ends
    assert [" is in use by process " in said for said in ends].count(True) == 1
    assert [record["step"] for record in read_metrics(tmp_path / "small/metrics.jsonl")] == list(range(1, 61))
    saved = sorted(path.name for path in (tmp_path / "small/checkpoints").iterdir())
    assert saved == ["step-00000050", "step-00000055", "step-00000060"]


@pytest.mark.slow
def test_ranks_of_a_killed_agent_end_and_the_next_start_loses_nothing(tmp_path: Path) -> None:
    config = _write(tmp_path)
    agent = _torchrun(config)
    directory = tmp_path / "small"
    _wait_for_step(directory, 7, agent)
    ranks = [process(pid) for pid in _children(agent.pid)]
    assert len(ranks) == 2
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    again = _torchrun(config, seconds_per_sample=0)
    said, _ = again.communicate(timeout=PATIENCE_SECONDS)
    assert again.returncode == 0, said
    assert not any(rank.alive for rank in ranks)
    assert [record["step"] for record in read_metrics(directory / "metrics.jsonl")] == list(range(1, 61))
    record = read_record(directory)
    assert record is not None
    assert record.state is State.FINISHED
    assert json.loads((directory / "state.json").read_text())["pid"] not in [rank.pid for rank in ranks]
    assert not (tmp_path / "small.lock").exists()
