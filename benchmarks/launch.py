"""Starts the ranks of a benchmark: processes of this machine, or one on each of some hosts behind links of a rate."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta

import torch
import torch.distributed as dist

from tests.hosts import Hosts, missing

PATIENCE = timedelta(seconds=120)


def run_ranks(module: str, size: int, rate: str | None, arguments: Sequence[str]) -> None:
    """Run `python -m module ARGUMENTS --rank R --size W --address A` on every rank, and wait.

    Args:
        module: The benchmark's; its ranks call `join`.
        size: Number of ranks.
        rate: Bandwidth of each host, in `tc`'s syntax; None for processes of this machine.
        arguments: For all ranks.

    Raises:
        SystemExit: This machine can't make hosts, or a rank failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        address = f"127.0.0.1:{_free_port()}"
        hosts = None
        if rate is not None:
            if why := missing():
                raise SystemExit(f"this machine can't make hosts: {why}")
            hosts = stack.enter_context(Hosts(size))
            hosts.limit(rate)
            address = f"{hosts.name(1)}:29500"
            environment |= {"GLOO_SOCKET_IFNAME": "eth0"}
        ranks = []
        for rank in range(size):
            place = ["--rank", str(rank), "--size", str(size), "--address", address]
            command = [sys.executable, "-m", module, *arguments, *place]
            if hosts is None:
                ranks.append(subprocess.Popen(command, env=environment, text=True))
            else:
                ranks.append(hosts.start(rank + 1, command, environment))
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise SystemExit(f"a rank of {size} failed")


def join(rank: int, size: int, address: str) -> None:
    """Join the other ranks; one thread each."""
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(size)
    dist.init_process_group("gloo", init_method=f"tcp://{address}", rank=rank, world_size=size, timeout=PATIENCE)


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port: int = trial.getsockname()[1]
        return port
