"""What the scripts of launch/ do when they are told to stop: all ranks save, and the launcher ends with 0."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kfac_dist.config.load import dump_yaml
from kfac_dist.reporting.run_file import State, read_record
from tests.training.runs import losses, small_config

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 60


def _start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _wait_for_steps(directory: Path, launcher: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not losses(directory):
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def _trains(config: Path) -> bool:
    """Whether any process still trains this run, or starts ranks that do."""
    return any(f"kfac_dist\0train\0{config}".encode() in _command(process) for process in Path("/proc").glob("[0-9]*"))


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("script", "number"),
    [
        ("torchrun.sh", signal.SIGTERM),
        ("torchrun.sh", signal.SIGUSR1),
        pytest.param(
            "deepspeed.sh",
            signal.SIGTERM,
            marks=pytest.mark.skipif(
                importlib.util.find_spec("deepspeed") is None, reason="needs pip install 'kfac_dist[deepspeed]'"
            ),
        ),
    ],
)
def test_ranks_save_and_the_launcher_ends_with_0(tmp_path: Path, script: str, number: signal.Signals) -> None:
    config = tmp_path / "run.yaml"
    sections: dict[str, Any] = {
        "data": {"name": "tests.training.test_preemption:slow_pixels"},
        "train": {"steps": 10_000},
    }
    config.write_text(dump_yaml(small_config(tmp_path, **sections)))
    ranks = {
        "torchrun.sh": ["--nproc-per-node", "2", "--max-restarts", "2"],
        "deepspeed.sh": ["--num-ranks", "2", "--master-port", _free_port()],
    }[script]
    launcher = _start(script, str(config), *ranks, "--quiet", PYTHONPATH=str(ROOT), SECONDS_PER_SAMPLE="0.01")
    try:
        _wait_for_steps(tmp_path / "small", launcher)
        launcher.send_signal(number)
        said, _ = launcher.communicate(timeout=PATIENCE_SECONDS)
    finally:
        launcher.kill()

    assert launcher.returncode == 0, said
    assert "Traceback" not in said
    assert f"{script}: told to stop; the run saves its state\n" in said
    record = read_record(tmp_path / "small")
    assert record is not None
    assert record.state is State.PREEMPTED
    assert (tmp_path / f"small/checkpoints/step-{record.step:08}").is_dir()
    assert not _trains(config)


def _program(directory: Path, script: str) -> str:
    """A program in the place of a launcher, or of the interpreter that would run it."""
    program = directory / "launcher"
    program.write_text(f"#!/bin/bash\n{script}")
    program.chmod(0o755)
    return str(program)


def test_a_launcher_without_ranks_is_told_itself(tmp_path: Path) -> None:
    launcher = _program(tmp_path, "echo waits for other nodes\nexec sleep 60\n")
    started = _start("torchrun.sh", "configs/digits_autoencoder.yaml", PYTHON=launcher)
    assert started.stdout is not None
    assert started.stdout.readline() == "waits for other nodes\n"
    started.send_signal(signal.SIGUSR1)
    started.communicate(timeout=20)

    assert started.returncode == 128 + signal.SIGTERM


def test_ranks_that_do_not_train_yet_are_told_again(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import signal, sys, time\n"
        "print('begins', flush=True)\n"
        "time.sleep(1)\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit('saves'))\n"
        "time.sleep(20)\n"
    )
    launcher = _program(tmp_path, f"LOCAL_RANK=0 {sys.executable} -S {rank} &\nwait\nexit 7\n")
    started = _start("torchrun.sh", "configs/digits_autoencoder.yaml", PYTHON=launcher)
    assert started.stdout is not None
    assert started.stdout.readline() == "begins\n"
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=20)

    assert "saves\n" in said
    assert started.returncode == 7, "the launcher's end is the script's"


def test_open_mpi_is_told_by_the_signal_that_it_passes_on(tmp_path: Path) -> None:
    says = "[[ $1 != --version ]] || { echo 'mpirun (Open MPI) 5.0.8'; exit; }\n"
    waits = "trap 'echo passes on; exit 7' USR1\necho begins\nfor second in {1..200}; do sleep 0.1; done\n"
    started = _start(
        "mpirun.sh", "configs/digits_autoencoder.yaml", "-n", "2", "--mpirun", _program(tmp_path, says + waits)
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "begins\n"
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate(timeout=20)

    assert said == "passes on\n"
    assert started.returncode == 7
