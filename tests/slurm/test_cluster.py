"""Jobs on a real SLURM: two nodes of this host. What is requeued in its midst ends as if it had never been."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from kfac_dist.config.schema import Config
from kfac_dist.config.yaml.load import dump_yaml, load_config
from kfac_dist.errors import ConfigError
from kfac_dist.slurm.job import SlurmJob
from kfac_dist.slurm.queue import FORGOTTEN, slurm_state
from kfac_dist.slurm.status import Standing, run_statuses
from kfac_dist.slurm.submission import prepare
from kfac_dist.training import train
from tests.harness import run_ranks
from tests.slurm.cluster import Cluster, missing
from tests.training.runs import final_model, launched, losses, small_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("unmeasured"),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
ROOT = Path(__file__).parents[2]
STEPS = 210  # long enough that a loaded machine still finds the run under way
PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(nodes=2) as running:
        # Jobs inherit the environment of their submission. The nodes' names resolve nowhere: they are all this host.
        running.environment |= {
            "PYTHONPATH": str(ROOT),
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        running.environment.pop("COVERAGE_PROCESS_CONFIG", None)  # as `unmeasured` has it
        yield running


def _config(directory: Path, name: str = "small") -> Config:
    return small_config(
        directory,
        kfac=True,
        run={"name": name, "timeout_seconds": 60},
        model={"name": "tests.training.runs:DropoutNet", "args": {}},
        data={"name": "tests.training.recovery.test_preemption:slow_pixels"},
        train={"steps": STEPS, "log_every": 7, "batch_size": 13},
        checkpoint={"every": 50, "resume": "auto"},
    )


def _train(config: Config) -> None:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    train(config, quiet=True)


class Submitted:
    """A run that `kfac-dist submit` has submitted."""

    def __init__(self, cluster: Cluster, directory: Path, name: str, *options: str) -> None:
        self.cluster = cluster
        config = directory / f"{name}.yaml"
        config.write_text(dump_yaml(_config(directory, name)))
        self.directory = directory / name
        ended = subprocess.run(
            [sys.executable, "-m", "kfac_dist", "submit", str(config), "--nodes=2", "--time=20", *options],
            env={**cluster.environment, "SECONDS_PER_SAMPLE": "0.007"},
            cwd=directory,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        self.job = ended.stdout.split()[2].rstrip(";")
        self.output = self.directory / f"slurm-{self.job}.out"

    @property
    def step(self) -> int:
        """The last logged step."""
        return max(losses(self.directory), default=0)

    @property
    def said(self) -> str:
        """What the job printed."""
        return self.output.read_text() if self.output.exists() else ""

    def standing(self) -> Standing:
        (status,) = run_statuses(self.directory)
        assert status.job == self.job
        return status.standing


Phase = tuple[Callable[[], object], Callable[[], object]]
"""What is waited for, and what is done then."""


def follow(runs: Mapping[Submitted, Sequence[Phase]], seconds: float = 200) -> None:
    """Takes every run through its phases, each as soon as it gets there: none ends while the test waits for another."""
    left, deadline = {run: list(phases) for run, phases in runs.items()}, time.monotonic() + seconds
    while any(left.values()):
        for run, phases in left.items():
            while phases and phases[0][0]():
                phases.pop(0)[1]()
            if phases:
                assert run.cluster.alive(run.job), f"{run.cluster.state(run.job)}: {run.said}"
                assert time.monotonic() < deadline, f"{run.cluster.state(run.job)} after {seconds} s: {run.said}"
        time.sleep(0.05)


def test_requeued_jobs_end_as_if_they_had_not_been(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    runs = [
        Submitted(cluster, tmp_path, "torchrun", "--with=torchrun", "--cpus-per-task=2"),
        Submitted(cluster, tmp_path, "srun", "--with=srun"),
    ]
    seen = dict.fromkeys(runs, 0)

    def requeue(run: Submitted) -> None:
        assert run.standing() is Standing.RUNNING
        with pytest.raises(ConfigError, match=f"belongs to job {run.job}, which SLURM says is RUNNING"):
            prepare(load_config(run.directory / "job.yaml"), SlurmJob())
        cluster.run("scontrol", "requeue", run.job)  # what an administrator, or preemption, does

    def out_of_time(run: Submitted) -> None:
        cluster.run("scancel", "--signal=USR1", "--batch", run.job)  # what --signal does before the time limit

    def phases(run: Submitted) -> list[Phase]:
        return [
            (lambda: run.step >= 14, lambda: requeue(run)),
            (lambda: "resumed from" in run.said, lambda: seen.update({run: run.step})),
            (lambda: run.step >= seen[run] + 14, lambda: out_of_time(run)),
            (lambda: cluster.state(run.job) == "COMPLETED", lambda: None),
        ]

    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(run_ranks, 2, _train, _config(tmp_path / "whole"), timeout=120)
        follow({run: phases(run) for run in runs})
        whole.result()

    expected = final_model(tmp_path / "whole/small")
    for run in runs:
        said = run.said
        assert [f"{count} restarts" in said for count in (0, 1, 2, 3)] == [True, True, True, False], said
        assert said.count("preempted at step") == 2, said
        assert "by SIGTERM on rank" in said
        assert "by SIGUSR1 on rank" in said
        assert losses(run.directory) == losses(tmp_path / "whole/small")
        assert all((value == expected[name]).all() for name, value in final_model(run.directory).items())
        assert run.standing() is Standing.FINISHED


def test_an_unknown_job_is_forgotten(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    assert (slurm_state("4711"), slurm_state("4711_2")) == (FORGOTTEN, FORGOTTEN)


def test_a_task_gets_the_cores_of_its_node(cluster: Cluster, tmp_path: Path) -> None:
    """Of an exclusive job, whatever a node has: nobody has to know the number."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nscontrol show step "$SLURM_JOB_ID.$SLURM_STEP_ID" | grep -o "CPUs=[0-9]*"\n')
    python.chmod(0o755)
    jobs = {
        cluster.run(
            "sbatch", "--parsable", "--exclusive", f"--output={tmp_path / name}.out", str(ROOT / "slurm" / name),
            "a.yaml", PYTHON=str(python),
        ).strip(): tmp_path / f"{name}.out"
        for name in ("train.sbatch", "train_srun.sbatch")
    }  # fmt: skip
    deadline = time.monotonic() + PATIENCE_SECONDS
    for job, output in jobs.items():
        while cluster.state(job) != "COMPLETED":
            assert cluster.alive(job), output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        assert "CPUs=4" in output.read_text().split(), output.read_text()


def test_a_scaling_study_ends_with_its_table(cluster: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump_yaml(_config(tmp_path)))
    output = tmp_path / "scaling.out"
    job = cluster.run(
        "sbatch", "--parsable", "--nodes=2", f"--output={output}", f"--chdir={tmp_path}",
        str(ROOT / "slurm/scaling.sbatch"), str(config), "checkpoint.keep=1",
        PYTHON=sys.executable, STEPS="20", DIRECTORY="study",
    ).strip()  # fmt: skip
    deadline = time.monotonic() + PATIENCE_SECONDS
    while cluster.state(job) != "COMPLETED":
        assert cluster.alive(job), output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.2)
    rows = [line.split(" | ") for line in output.read_text().splitlines() if line.startswith("| ")]
    assert [row[:3] for row in rows[1:]] == [
        ["| strong", "1", "13"],
        ["| strong", "2", "13"],
        ["| weak", "1", "13"],
        ["| weak", "2", "26"],
    ]
    assert all(float(row[5].rstrip(" |")) > 0 for row in rows[1:])
