"""What `test_rendezvous.py` runs under torchrun: a rank that dies once, and a sum that all ranks agree on after it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from kfac_dist.distributed.startup.bootstrap import bootstrap

if __name__ == "__main__":
    died = Path(sys.argv[1])
    with bootstrap("cpu", 20.0) as world:
        total = torch.ones(1)
        dist.all_reduce(total)
        if world.rank == 1 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(total)
        if world.rank == 0:
            print(f"sum {total.item()} after restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", flush=True)
