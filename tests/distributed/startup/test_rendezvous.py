from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from kfac_dist.distributed.startup.rendezvous import fresh_store

ROOT = Path(__file__).parents[3]


def test_ranks_that_miss_one_say_which() -> None:
    store = dist.HashStore()
    with pytest.raises(dist.DistStoreError, match="rank 1 has not come"):
        fresh_store(store, 0, 2, timedelta(seconds=0.05))
    with pytest.raises(dist.DistStoreError, match="rank 0 has not come"):
        fresh_store(store, 1, 2, timedelta(seconds=0.05))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def test_nodes_whose_agents_share_a_store_restart_after_a_death(tmp_path: Path) -> None:
    # Two agents on this host stand for two nodes. They count their restarts apart: only the dead rank's agent counts.
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    command += ["-m", "tests.distributed.restart_job", str(tmp_path / "died")]
    environment = {name: text for name, text in os.environ.items() if name != "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}
    environment["OMP_NUM_THREADS"] = "1"
    agents = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    try:
        outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()

    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert (tmp_path / "died").exists()
    assert "sum 4.0 after restart" in "".join(outputs)
