"""How a run stands, from what it left behind and from SLURM's word; `test_cluster.py` asks a real SLURM."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kfac_dist.cli import app
from kfac_dist.errors import KFACError
from kfac_dist.slurm.queue import FORGOTTEN
from kfac_dist.slurm.status import Standing, run_status, run_statuses
from kfac_dist.training import train
from tests.slurm.commands import NO_SUCH_JOB, install
from tests.training.runs import small_config

ENDED = subprocess.Popen([sys.executable, "-c", ""])
ENDED.wait()


def write_record(directory: Path, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    record = {
        "state": "running", "reason": "", "step": None, "total_steps": 12, "ranks": 2, "host": socket.gethostname(),
        "pid": os.getpid(), "job": None, "restarts": 0, "changed": 0.0, **changes,
    }  # fmt: skip
    (directory / "state.json").write_text(json.dumps(record))
    return directory


def standing(directory: Path, told: str | None = None, job: str | None = None) -> tuple[Standing, str]:
    status = run_status(directory, job, lambda number: told)
    return status.standing, status.reason


def test_a_finished_run_tells_its_last_step_loss_and_checkpoint(tmp_path: Path) -> None:
    train(small_config(tmp_path, checkpoint={"every": 5}), quiet=True)
    (status,) = run_statuses(tmp_path / "small")
    assert status.standing is Standing.FINISHED
    assert status.logged is not None
    assert status.checkpoint is not None
    assert (status.logged.step, status.total_steps, status.checkpoint.step) == (12, 12, 12)
    assert 0 <= status.logged.age < 60
    said = CliRunner().invoke(app, ["status", str(tmp_path / "small")]).output
    assert f"{tmp_path}/small: finished\n  step        12 of 12, 100%\n" in said
    assert "  checkpoint  step 12, saved " in said
    (as_json,) = json.loads(CliRunner().invoke(app, ["status", str(tmp_path / "small"), "--json"]).output)
    assert (as_json["standing"], as_json["logged"]["step"]) == ("finished", 12)

    torn = tmp_path / "small/checkpoints/step-00000012/manifest.json"
    torn.write_text(torn.read_text()[:20])
    (status,) = run_statuses(tmp_path / "small")
    assert status.checkpoint is not None
    assert status.checkpoint.step == 10, "the newest complete one"


def test_an_interrupted_run_says_so_and_where_the_run_before_it_is(tmp_path: Path) -> None:
    write_record(tmp_path, state="interrupted", reason="SIGINT on rank 0", earlier="runs/a.previous.2")
    assert standing(tmp_path) == (Standing.INTERRUPTED, "SIGINT on rank 0")
    assert standing(tmp_path, "PENDING", job="7") == (Standing.QUEUED, "again")
    said = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert said.startswith(f"{tmp_path}: interrupted (SIGINT on rank 0)\n")
    assert said.endswith("  before it   runs/a.previous.2\n")


def test_a_process_that_is_gone_no_longer_runs(tmp_path: Path) -> None:
    assert standing(write_record(tmp_path / "a")) == (Standing.RUNNING, "")
    dead = write_record(tmp_path / "b", pid=ENDED.pid)
    assert standing(dead) == (Standing.FAILED, "its process is gone, without a word")
    elsewhere = write_record(tmp_path / "c", pid=ENDED.pid, host="elsewhere")
    assert standing(elsewhere) == (Standing.RUNNING, "")


@pytest.mark.parametrize(
    ("state", "told", "expected"),
    [
        ("running", "RUNNING", (Standing.RUNNING, "")),
        ("running", "COMPLETING", (Standing.RUNNING, "")),
        ("running", "PENDING", (Standing.QUEUED, "again")),
        ("running", "NODE_FAIL", (Standing.FAILED, "SLURM says NODE_FAIL")),
        ("running", "TIMEOUT", (Standing.FAILED, "SLURM says TIMEOUT")),
        ("running", FORGOTTEN, (Standing.FAILED, "SLURM no longer knows job 17")),
        ("running", None, (Standing.RUNNING, "")),
        ("preempted", "PENDING", (Standing.PREEMPTED, "told; queued again")),
        ("preempted", FORGOTTEN, (Standing.PREEMPTED, "told")),
        ("preempted", None, (Standing.PREEMPTED, "told")),
        ("failed", "FAILED", (Standing.FAILED, "told")),
        ("failed", FORGOTTEN, (Standing.FAILED, "told")),
        ("failed", "PENDING", (Standing.QUEUED, "again")),
        ("finished", "COMPLETED", (Standing.FINISHED, "")),
        ("finished", FORGOTTEN, (Standing.FINISHED, "")),
    ],
)
def test_slurms_word_settles_what_the_run_could_not_say(
    tmp_path: Path, state: str, told: str | None, expected: tuple[Standing, str]
) -> None:
    reason = "told" if state in ("preempted", "failed") else ""
    directory = write_record(tmp_path / "run", state=state, reason=reason, job="17", restarts=2)
    assert standing(directory, told) == expected
    said = run_status(directory, None, lambda number: told).describe()
    shown = {FORGOTTEN: "(SLURM no longer knows it)", None: "(no word from SLURM here)"}.get(told, told)
    assert f"SLURM job   17 {shown}, started again 2 times" in said


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("PENDING", (Standing.QUEUED, "")),
        ("RUNNING", (Standing.RUNNING, "its ranks still start")),
        ("FAILED", (Standing.FAILED, "it never began to train; SLURM says FAILED")),
        (FORGOTTEN, (Standing.FAILED, "it never began to train; SLURM no longer knows job 3")),
        (None, (Standing.QUEUED, "by its submission; SLURM can't be asked here")),
    ],
)
def test_a_submitted_run_that_has_not_begun(tmp_path: Path, told: str | None, expected: tuple[Standing, str]) -> None:
    assert standing(tmp_path, told, job="3") == expected


def test_a_killed_job_that_the_queue_has_forgotten_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen from a login node, where the ranks' processes never were."""
    directory = write_record(tmp_path / "run", host="elsewhere", job="17")
    install(tmp_path, monkeypatch, squeue=NO_SUCH_JOB)
    said = CliRunner().invoke(app, ["status", str(directory)]).output
    assert said.startswith(f"{directory}: failed (SLURM no longer knows job 17)\n")
    assert "SLURM job   17 (SLURM no longer knows it)" in said


def test_every_task_of_a_sweep_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    directory = tmp_path / "sweep"
    directory.mkdir()
    (directory / "job.json").write_text(json.dumps({"job": "9", "submitted": 0.0, "tasks": 2}))
    write_record(tmp_path / "sweep-1", job="10")
    first, second = run_statuses(directory)
    assert (first.directory, first.job, first.standing) == (f"{directory}-0", "9_0", Standing.QUEUED)
    assert (second.directory, second.job, second.standing) == (f"{directory}-1", "9_1", Standing.RUNNING)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\n", "metrics.jsonl:1: no UTF-8 text"),
        (b'{"step": 4, "loss": 2.5}\nnonsense\n', "metrics.jsonl:2: no JSON"),
    ],
)
def test_how_a_run_stands_is_told_though_its_metrics_are_not_readable(
    tmp_path: Path, content: bytes, message: str
) -> None:
    directory = write_record(tmp_path / "run", state="finished")
    (directory / "metrics.jsonl").write_bytes(content)

    ended = CliRunner().invoke(app, ["status", str(directory)], catch_exceptions=False)

    assert ended.exit_code == 0
    assert ended.output.startswith(f"{directory}: finished\n")
    assert f"  metrics     {directory}/{message}: remove the line" in ended.output
    told = json.loads(CliRunner().invoke(app, ["status", str(directory), "--json"], catch_exceptions=False).output)
    assert message in told[0]["unreadable"]


def test_a_loss_that_was_not_finite_is_told(tmp_path: Path) -> None:
    directory = write_record(tmp_path / "run", state="finished")
    (directory / "metrics.jsonl").write_text('{"step": 4, "loss": null}\n')

    assert "  loss        not finite, logged" in run_status(directory, None).describe()


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KFACError, match="no run is here; expected a run's directory"):
        run_statuses(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(KFACError, match=r"state\.json: can't be read"):
        run_statuses(tmp_path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [os.mkfifo, _device, Path.mkdir, lambda path: path.write_text("[" * 200_000)])
@pytest.mark.parametrize("file", ["state.json", "job.json"])
def test_what_is_no_file_of_a_run_is_named_and_not_read(tmp_path: Path, file: str, make: Callable[[Path], Any]) -> None:
    make(tmp_path / file)

    with pytest.raises(KFACError, match=rf"^{re.escape(str(tmp_path / file))}: (can't be read|is a )"):
        run_statuses(tmp_path)
