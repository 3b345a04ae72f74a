"""launch/deepspeed.sh over real ssh: a daemon on this host, which two names reach."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kfac_dist.config.yaml.load import dump_yaml
from kfac_dist.reporting.run_file import State, read_record
from tests.training.runs import losses, small_config

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 90
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")


def _missing() -> str:
    programs = [name for name in ("ssh", "ssh-keygen", "pdsh") if shutil.which(name) is None]
    programs += [] if SSHD else ["sshd"]
    if programs:
        return f"needs {', '.join(programs)} (Debian: openssh-server, pdsh)"
    return "" if importlib.util.find_spec("deepspeed") else "needs pip install 'kfac_dist[deepspeed]'"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("unmeasured"),
    pytest.mark.skipif(bool(_missing()), reason=_missing()),
]


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[str]:
    """A PATH whose ssh reaches node1 and node2, both of them this host, by keys of its own."""
    port = _free_port()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / key)], check=True)
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/user.pub\n"
        "PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
    )
    (tmp_path / "ssh_config").write_text(
        f"Host node1 node2\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {tmp_path}/user\n  IdentitiesOnly yes\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/ssh_config "$@"\n')
    (programs / "ssh").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # which a daemon of root's insists on
    assert SSHD is not None
    with (tmp_path / "sshd.log").open("w") as log:
        daemon = subprocess.Popen([SSHD, "-D", "-e", "-f", str(tmp_path / "sshd_config")], stderr=log)
    try:
        deadline = time.monotonic() + 10
        while subprocess.run([programs / "ssh", "node1", "true"], env={"PATH": path}, check=False).returncode:
            if daemon.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"sshd lets nobody in: {(tmp_path / 'sshd.log').read_text()[-500:]}")
            time.sleep(0.1)
        yield path
    finally:
        daemon.terminate()
        daemon.wait()


def test_ranks_of_two_hosts_save_in_their_own_time(tmp_path: Path, two_hosts: str) -> None:
    config = tmp_path / "run.yaml"
    sections: dict[str, Any] = {
        "data": {"name": "tests.training.recovery.test_preemption:slow_pixels"},
        "train": {"steps": 10_000},
    }
    config.write_text(dump_yaml(small_config(tmp_path, **sections)))
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    options = ["--hostfile", str(tmp_path / "hosts"), "--master-addr", "127.0.0.1", "--master-port", _free_port()]
    # Of the environment, DeepSpeed takes only some along.
    (tmp_path / ".deepspeed_env").write_text("SECONDS_PER_SAMPLE=0.01\n")
    launcher = subprocess.Popen(
        ["bash", str(ROOT / "launch/deepspeed.sh"), str(config), *options, "--quiet"],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": two_hosts,
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "DS_ENV_FILE": str(tmp_path / ".deepspeed_env"),
            "GLOO_SOCKET_IFNAME": "lo",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not losses(tmp_path / "small"):
            assert launcher.poll() is None, launcher.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        said, _ = launcher.communicate(timeout=PATIENCE_SECONDS)
    finally:
        launcher.kill()

    assert launcher.returncode == 0, said
    assert "deepspeed.sh: told to stop; the run saves its state\n" in said
    assert "Traceback" not in said
    record = read_record(tmp_path / "small")
    assert record is not None
    assert (record.state, record.ranks) == (State.PREEMPTED, 2)
    assert (tmp_path / f"small/checkpoints/step-{record.step:08}").is_dir()
    assert not (tmp_path / "small.lock").exists()
