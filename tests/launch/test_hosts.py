"""launch/torchrun.sh on two hosts: the link between them breaks in the midst of a run, and is mended later."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from kfac_dist.config.schema import Config
from kfac_dist.config.yaml.load import dump_yaml
from kfac_dist.training import train
from tests.harness import run_ranks
from tests.hosts import Hosts, missing
from tests.training.runs import final_model, launched, losses, small_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("unmeasured"),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
ROOT = Path(__file__).parents[2]
STEPS = 40
TIMEOUT_SECONDS = 4
# How long torchrun's agent waits for an answer of the other's store; then it waits until TCP takes the connection for
# lost, see `tests.hosts`.
AGENT_SECONDS = 2
PATIENCE_SECONDS = 60
PORT = 29400


def _config(directory: Path) -> Config:
    return small_config(
        directory,
        kfac=True,
        run={"timeout_seconds": TIMEOUT_SECONDS},
        model={"name": "tests.training.runs:DropoutNet", "args": {}},
        data={"name": "tests.training.recovery.test_preemption:slow_pixels"},
        train={"steps": STEPS, "log_every": 5, "batch_size": 13},
        checkpoint={"every": 10, "resume": "auto"},
    )


def _train(directory: Path) -> None:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()))
    train(_config(directory), quiet=True)


def _start(hosts: Hosts, directory: Path, job: str) -> list[subprocess.Popen[str]]:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "eth0",
        "PET_RDZV_CONF": f"read_timeout={AGENT_SECONDS}",
        "SECONDS_PER_SAMPLE": "0.015",
    }
    meeting = ["--nnodes", "2", "--rdzv-endpoint", f"{hosts.name(1)}:{PORT}", "--rdzv-id", job]
    command = [str(ROOT / "launch/torchrun.sh"), str(directory / "run.yaml"), "--nproc-per-node", "1", *meeting]
    started = []
    for host in (1, 2):
        with (directory / f"{job}-{host}.out").open("w") as output:
            started.append(hosts.start(host, [*command, "--quiet"], environment, output))
        _await_rendezvous(started[0])
    return started


def _await_rendezvous(agent: subprocess.Popen[str]) -> None:
    """Wait until the first host's agent listens: the other's gives up on it after a few seconds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    process, here = Path(f"/proc/{agent.pid}"), Path("/proc/self/ns/net").readlink()
    while agent.poll() is None and (
        (process / "ns/net").readlink() == here
        or not any(f":{PORT:04X} " in (process / "net" / family).read_text() for family in ("tcp", "tcp6"))
    ):
        assert time.monotonic() < deadline, f"nothing listens on port {PORT}"
        time.sleep(0.05)


def _said(directory: Path, job: str) -> list[str]:
    return [(directory / f"{job}-{host}.out").read_text() for host in (1, 2)]


def _wait(agents: list[subprocess.Popen[str]], directory: Path, job: str) -> list[int]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(agent.poll() is None for agent in agents):
        assert time.monotonic() < deadline, "\n".join(_said(directory, job))
        time.sleep(0.05)
    return [agent.returncode for agent in agents]


def test_a_cut_link_ends_both_sides_and_the_run_goes_on_once_it_is_mended(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump_yaml(_config(tmp_path)))
    with Hosts(2) as hosts, ThreadPoolExecutor(1) as background:
        agents = _start(hosts, tmp_path, "cut")
        whole = background.submit(run_ranks, 2, _train, tmp_path / "whole")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while max(losses(tmp_path / "small"), default=0) < 15:
            assert time.monotonic() < deadline, "\n".join(_said(tmp_path, "cut"))
            assert all(agent.poll() is None for agent in agents), "\n".join(_said(tmp_path, "cut"))
            time.sleep(0.02)

        hosts.cut(2)
        cut = time.monotonic()
        assert all(_wait(agents, tmp_path, "cut"))
        took = time.monotonic() - cut
        said = _said(tmp_path, "cut")
        for text in said:
            assert "error [rank " in text, text
            assert "the other ranks are gone or stand still" in text, text
            assert "the data" not in text, text
        assert took < TIMEOUT_SECONDS + 10 * AGENT_SECONDS, said
        assert max(losses(tmp_path / "small")) < STEPS

        hosts.mend(2)
        agents = _start(hosts, tmp_path, "mended")
        assert _wait(agents, tmp_path, "mended") == [0, 0], "\n".join(_said(tmp_path, "mended"))
        whole.result()
    assert losses(tmp_path / "small") == losses(tmp_path / "whole/small")
    expected = final_model(tmp_path / "whole/small")
    assert all((value == expected[name]).all() for name, value in final_model(tmp_path / "small").items())
