"""Nodes come and go under torchrun: the run goes on with those that are there, on the same global batches."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor, nn

from benchmarks.chaos_job import alive, child_pid
from kfac_dist.config.yaml.load import dump_yaml
from kfac_dist.training import train
from kfac_dist.training.checkpoints.checkpoint import read_manifest
from tests.distributed.startup.test_rendezvous import free_port
from tests.training.runs import losses, small_config

STEPS = 300


class WaitingNet(nn.Sequential):
    """Takes its time for each step until a file is there."""

    def __init__(self, hurry: str) -> None:
        super().__init__(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
        self.hurry = Path(hurry)

    def forward(self, pixels: Tensor) -> Tensor:
        if self.training and not self.hurry.exists():
            time.sleep(0.1)
        outputs: Tensor = super().forward(pixels)
        return outputs


def _start_node(config: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:3", "--nproc-per-node", "1"]
    command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    # A node is given up after 6 s of silence, and others are waited for only briefly.
    command += ["--rdzv-conf", "last_call_timeout=2,keep_alive_interval=2,keep_alive_max_attempt=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command += ["-m", "kfac_dist", "train", str(config), "--resume", "auto", "--quiet"]
    with (config.parent / "output.txt").open("a") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def _wait(condition: Callable[[], bool], nodes: list[subprocess.Popen[bytes]], output: Path) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert all(node.poll() is None for node in nodes), output.read_text()[-4000:]
        assert time.monotonic() < deadline, output.read_text()[-4000:]
        time.sleep(0.02)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_a_node_dies_and_another_joins(tmp_path: Path) -> None:
    hurry = tmp_path / "hurry"
    sections = {
        "model": {"name": "tests.training.test_elastic:WaitingNet", "args": {"hurry": str(hurry)}},
        "train": {"steps": STEPS},
        "checkpoint": {"every": 10, "keep": 200},
    }
    config, directory, output = tmp_path / "run.yaml", tmp_path / "elastic/small", tmp_path / "output.txt"
    config.write_text(dump_yaml(small_config(tmp_path / "elastic", kfac=True, **sections)))

    def worlds() -> dict[int, int]:
        found = [read_manifest(path) for path in sorted(directory.glob("checkpoints/step-????????"))]
        return {checkpoint.step: checkpoint.facts["world_size"] for checkpoint in found}

    def reached(step: int) -> bool:
        return max(losses(directory), default=0) >= step

    port = free_port()
    first = _start_node(config, port)
    _wait(lambda: _listens(port), [first], output)  # the first node serves the rendezvous, and outlives the second
    second = _start_node(config, port)
    nodes = [first, second]
    try:
        _wait(lambda: reached(22), nodes, output)
        worker = child_pid(second.pid)
        assert worker is not None
        for pid in (second.pid, worker):
            os.kill(pid, signal.SIGKILL)
        second.wait()
        nodes.remove(second)
        alone_from = max(losses(directory))
        _wait(lambda: reached(alone_from + 20), nodes, output)
        nodes.append(_start_node(config, port))
        _wait(lambda: 2 in list(worlds().values())[-1:], nodes, output)
        hurry.touch()
        assert [node.wait(90) for node in nodes] == [0, 0], output.read_text()[-4000:]
    finally:
        for node in nodes:
            worker = child_pid(node.pid)
            for pid in (node.pid, worker):
                if pid is not None and alive(pid):
                    os.kill(pid, signal.SIGKILL)
            node.wait()

    sizes = worlds()
    steps = sorted(sizes)
    changes = [step for before, step in itertools.pairwise(steps) if sizes[before] != sizes[step]]
    assert [sizes[step] for step in (steps[0], *changes)] == [2, 1, 2]
    train(small_config(tmp_path / "whole", kfac=True, **sections), quiet=True)
    whole, elastic = losses(tmp_path / "whole/small"), losses(directory)
    assert sorted(elastic) == list(range(1, STEPS + 1))
    # Later on, roundings have grown: other numbers of ranks add up in another order.
    for step in range(1, changes[-1] + 20):
        assert elastic[step] == pytest.approx(whole[step], rel=1e-3), step
