"""What the scripts of launch/ do when they are told to stop: all ranks save, and the launcher ends with 0."""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kfac_dist.config.yaml.load import dump_yaml
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
        "data": {"name": "tests.training.recovery.test_preemption:slow_pixels"},
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

    assert said.endswith("passes on\n")
    assert said.count("passes on") == 1
    assert started.returncode == 7


SSH = """
[[ $1 == -o && $3 == -o ]] || exit 1
printf '%s\\n' "$5" >> "${0%/*}/asked"
exec bash -c "${*:6}"
"""
FAR_RANK = (
    "import os, signal, sys, time\n"
    "def save(number, frame):\n"
    "    time.sleep(1)\n"
    "    open(sys.argv[-1], 'w').write(signal.Signals(number).name)\n"
    "    os._exit(0)\n"
    "signal.signal(signal.SIGUSR1, save)\n"
    "signal.signal(signal.SIGINT, save)\n"
    "print('begins', flush=True)\n"
    "time.sleep(20)\n"
)


@pytest.mark.parametrize(("number", "code", "heard"), [(signal.SIGTERM, 0, "SIGUSR1"), (signal.SIGINT, 130, "SIGINT")])
def test_ranks_over_ssh_have_the_time_to_save(tmp_path: Path, number: signal.Signals, code: int, heard: str) -> None:
    """The launcher is told nothing. What stands for ssh runs its command here."""
    config, saved, rank = tmp_path / "a run.yaml", tmp_path / "saved", tmp_path / "rank.py"
    config.write_text("{}")
    rank.write_text(FAR_RANK)
    (tmp_path / "hosts").write_text("# two\nnode1 slots=1\n  node2 slots=1\n")
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/bash{SSH}")
    ssh.chmod(0o755)
    words = shlex.join([sys.executable, "-S", str(rank), "kfac_dist", "train", str(config), str(saved)])
    starts = (
        f"( MASTER_PORT=29511 setsid {words} & )\n"
        f"trap 'echo launcher was told' TERM INT\nuntil [[ -s {saved} ]]; do sleep 0.1; done\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    options = ["--hostfile", str(tmp_path / "hosts"), "--master-port", "29511"]
    started = _start("deepspeed.sh", str(config), *options, PYTHON=_program(tmp_path, starts), PATH=path)
    assert started.stdout is not None
    assert started.stdout.readline() == "begins\n"
    started.send_signal(number)
    said, _ = started.communicate(timeout=30)
    assert started.returncode == code, said
    assert saved.read_text() == heard
    assert "launcher was told" not in said
    assert (tmp_path / "asked").read_text().splitlines()[:2] == ["node1", "node2"]


def _in_terminal(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start a command on a terminal of its own, whose keys are what is written to standard input."""
    program = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    return subprocess.Popen(
        [sys.executable, "-S", "-c", program, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _press_ctrl_c(terminal: subprocess.Popen[str]) -> None:
    assert terminal.stdin is not None
    terminal.stdin.write("\x03")
    terminal.stdin.flush()


def _ranks(config: Path) -> list[int]:
    return [int(process.name) for process in Path("/proc").glob("[0-9]*") if _is_rank(process, config)]


def _is_rank(process: Path, config: Path) -> bool:
    try:
        return str(config).encode() in _command(process) and b"\0LOCAL_RANK=" in (process / "environ").read_bytes()
    except OSError:
        return False


def _wait(condition: Callable[[], bool], terminal: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert terminal.poll() is None, terminal.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


LAUNCHES = {
    "torchrun.sh": ["--nproc-per-node", "2", "--max-restarts", "2"],
    "deepspeed.sh": ["--num-ranks", "2", "--master-port"],
    "mpirun.sh": ["-n", "2"],
}
DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs pip install 'kfac_dist[deepspeed]'"
)
MPI = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or not (Path(sys.executable).parent / "mpirun").exists(),
    reason="needs pip install 'kfac_dist[mpi]' mpich",
)


def _launch(script: str, config: Path) -> list[str]:
    words = LAUNCHES[script]
    words = [*words, _free_port()] if words[-1] == "--master-port" else words
    return ["bash", str(ROOT / "launch" / script), str(config), *words, "--quiet"]


def _slow_run(tmp_path: Path) -> Path:
    config = tmp_path / "run.yaml"
    sections: dict[str, Any] = {
        "data": {"name": "tests.training.recovery.test_preemption:slow_pixels"},
        "train": {"steps": 10_000},
    }
    config.write_text(dump_yaml(small_config(tmp_path, **sections)))
    return config


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    "script",
    ["torchrun.sh", pytest.param("deepspeed.sh", marks=DEEPSPEED), pytest.param("mpirun.sh", marks=MPI)],
)
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, script: str) -> None:
    config = _slow_run(tmp_path)
    command = _launch(script, config)
    terminal = _in_terminal(command, SECONDS_PER_SAMPLE="0.01")
    try:
        _wait(lambda: bool(losses(tmp_path / "small")), terminal)
        _press_ctrl_c(terminal)
        said, _ = terminal.communicate(timeout=PATIENCE_SECONDS)
    finally:
        terminal.kill()
    assert terminal.returncode == 130, said
    assert "Traceback" not in said
    assert f"{script}: interrupted; continue with: {shlex.join(command[1:])} --resume auto" in said.splitlines()
    record = read_record(tmp_path / "small")
    assert record is not None
    assert record.state is State.INTERRUPTED
    assert record.reason == "SIGINT on rank 0"
    assert (tmp_path / f"small/checkpoints/step-{record.step:08}").is_dir()
    assert not _trains(config)
    assert not (tmp_path / "small.lock").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_at_once_while_nothing_can_be_saved(tmp_path: Path, times: int) -> None:
    """Once before the ranks train, twice while they are in a step that takes its time."""
    config, standstill = _slow_run(tmp_path), tmp_path / "standstill"
    terminal = _in_terminal(_launch("torchrun.sh", config), SECONDS_PER_SAMPLE="0.01", STANDSTILL=str(standstill))
    try:
        if times == 1:
            _wait(lambda: bool(_ranks(config)), terminal)
        else:
            _wait(lambda: bool(losses(tmp_path / "small")), terminal)
            standstill.touch()
            time.sleep(0.5)
            _press_ctrl_c(terminal)
            time.sleep(1.5)
        began = time.monotonic()
        _press_ctrl_c(terminal)
        said, _ = terminal.communicate(timeout=PATIENCE_SECONDS)
    finally:
        terminal.kill()
    assert terminal.returncode == 130, said
    assert time.monotonic() - began < 20
    assert "Traceback" not in said
    _wait_until_gone(config)


def _wait_until_gone(config: Path) -> None:
    deadline = time.monotonic() + 10
    while _trains(config):
        assert time.monotonic() < deadline
        time.sleep(0.05)
