"""A job that was started again goes on with its own run, however it was told to begin."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from kfac_dist.distributed.startup import bootstrap
from kfac_dist.training import train
from kfac_dist.training.records.metrics import read_metrics
from tests.harness import run_ranks
from tests.training.runs import launched, losses, small_config


def _start(directory: Path, *, steps: int, restart: int, resume: str = "never", job: str = "7") -> None:
    """Start a run as SLURM would; one that dies is one that is to take fewer steps."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SLURM_JOB_ID", job)
        environment.setenv("SLURM_RESTART_COUNT", str(restart))
        config = small_config(directory, train={"steps": steps}, checkpoint={"every": 3, "keep": 9, "resume": resume})
        train(config, quiet=True)


def test_a_restarted_job_goes_on_with_its_own_run_and_spares_the_earlier_one(tmp_path: Path) -> None:
    _start(tmp_path, steps=9, restart=0, job="6")
    _start(tmp_path, steps=4, restart=0)
    first = read_metrics(tmp_path / "small/metrics.jsonl")[:4]
    _start(tmp_path, steps=8, restart=1)
    assert read_metrics(tmp_path / "small/metrics.jsonl")[:4] == first, "they were not run again"
    _start(tmp_path, steps=12, restart=2)
    assert read_metrics(tmp_path / "small/metrics.jsonl")[:4] == first
    assert sorted(losses(tmp_path / "small")) == list(range(1, 13))
    assert sorted(losses(tmp_path / "small.previous")) == list(range(1, 10)), "job 6's"


def test_a_job_that_died_before_it_began_its_run_begins_it(tmp_path: Path) -> None:
    _start(tmp_path, steps=9, restart=0, job="6")
    _start(tmp_path, steps=4, restart=1)
    assert sorted(losses(tmp_path / "small")) == list(range(1, 5))
    assert sorted(losses(tmp_path / "small.previous")) == list(range(1, 10))


def test_a_restarted_job_does_not_go_back_to_the_checkpoint_that_it_was_given(tmp_path: Path) -> None:
    _start(tmp_path, steps=9, restart=0, job="6")
    given = str(tmp_path / "small/checkpoints/step-00000003")
    _start(tmp_path, steps=5, restart=1, resume=given)  # the first start had saved nothing
    before = read_metrics(tmp_path / "small/metrics.jsonl")
    assert [record["step"] for record in before] == [1, 2, 3, 4, 5]
    saved = sorted(path.name for path in (tmp_path / "small/checkpoints").glob("step-*[0-9]"))
    assert saved == ["step-00000003", "step-00000005"], "job 6's later ones are no part of this run"
    _start(tmp_path, steps=8, restart=2, resume=given)
    assert read_metrics(tmp_path / "small/metrics.jsonl")[:5] == before


def _meet_again(directory: str, port: int) -> None:
    """Two starts of a job, as torchrun's agents make them when a node has come: neither counts it."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ.update(launched(rank, size, port), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    for steps in (4, 8):
        train(small_config(directory, train={"steps": steps}, checkpoint={"every": 3}), quiet=True)
        bootstrap._this_process.cache_clear()  # the ranks of the next start are other processes


def test_ranks_that_start_again_because_a_node_came_go_on_too(tmp_path: Path) -> None:
    agent = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    run_ranks(2, _meet_again, str(tmp_path), agent.port, process_group=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    assert sorted(losses(tmp_path / "small")) == list(range(1, 9))
