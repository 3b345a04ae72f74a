"""What is made of the answers of squeue and sacct; `test_cluster.py` asks real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.slurm import queue
from kfac_dist.slurm.queue import FORGOTTEN, slurm_state
from tests.slurm.commands import NO_SUCH_JOB, install

DISABLED = 'echo "Slurm accounting storage is disabled" >&2; exit 1'
UNREACHABLE = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'


@pytest.mark.parametrize(
    ("squeue", "sacct", "expected"),
    [
        ("echo RUNNING", None, "RUNNING"),
        ("echo RUNNING", "echo PENDING", "RUNNING"),
        ("echo COMPLETED; echo FAILED; echo PENDING", None, "PENDING"),
        ("echo COMPLETED; echo FAILED", None, "COMPLETED"),
        (NO_SUCH_JOB, "echo 'CANCELLED by 0'", "CANCELLED"),
        (NO_SUCH_JOB, None, FORGOTTEN),
        (NO_SUCH_JOB, DISABLED, FORGOTTEN),
        (NO_SUCH_JOB, "true", FORGOTTEN),
        ("true", None, FORGOTTEN),
        (UNREACHABLE, None, None),
        (UNREACHABLE, "true", None),
        (UNREACHABLE, "echo TIMEOUT", "TIMEOUT"),
        (None, "echo COMPLETED", "COMPLETED"),
        (None, None, None),
        ("exec sleep 60", "exec sleep 60", None),
    ],
)
def test_the_queue_is_asked_and_then_the_accounts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str | None, sacct: str | None, expected: str | None
) -> None:
    monkeypatch.setattr(queue, "_PATIENCE_SECONDS", 0.2 if squeue == "exec sleep 60" else 20.0)
    install(tmp_path, monkeypatch, squeue=squeue, sacct=sacct)
    assert slurm_state("17") == expected


def test_the_job_is_named_to_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, squeue=f'echo "$@" >> {tmp_path}/asked', sacct=f'echo "$@" >> {tmp_path}/asked')
    slurm_state("9_1")
    assert [line.count("--jobs=9_1") for line in (tmp_path / "asked").read_text().splitlines()] == [1, 1]
