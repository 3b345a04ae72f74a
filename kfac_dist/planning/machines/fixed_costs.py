"""Fixed costs of K-FAC's steps: launches and Python, found on chains of layers too small to compute.

Every layer has a shape of its own, so that no two are preconditioned by one product. A line through the seconds of a
short and a long chain gives the costs per step and per block.
"""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from torch import nn

from kfac_dist.config.schema import Backend
from kfac_dist.distributed.communicators.base import Communicator, SoloCommunicator
from kfac_dist.engines.ddp import DDPEngine
from kfac_dist.planning.machines.caches import Caches
from kfac_dist.planning.machines.hardware import Overhead
from kfac_dist.preconditioner.kfac import KFAC

_CHAINS = (4, 24)
_KINDS = ("refreshing", "preconditioning", "measuring", "preconditioning")
_CONFIG = {
    "curvature": {"factor_every": 2},
    "inversion": {"inverse_every": 4, "early_refresh": 0, "damping": 0.1},
}


class _Alone(DDPEngine):
    """A module on one rank, independent of other ranks."""

    def communicator(self, timeout_seconds: float, backend: Backend = Backend.TORCH) -> Communicator:
        return SoloCommunicator(device=torch.device("cpu"))


def fixed_costs(device: torch.device, rounds: int) -> dict[str, Overhead]:
    """Return the seconds of ordinary steps, and the additional ones of measuring and refreshing."""
    short, long = (_kinds(blocks, device, rounds) for blocks in _CHAINS)
    found: dict[str, Overhead] = {}
    for key in ("preconditioning", "measuring", "refreshing"):
        few, many = max(short[key], 0.0), max(long[key], 0.0)
        block = max((many - few) / (_CHAINS[1] - _CHAINS[0]), 0.0)
        found[key] = Overhead(step=max(few - block * _CHAINS[0], 0.0), block=block)
    return found


def _kinds(blocks: int, device: torch.device, rounds: int) -> dict[str, float]:
    """Return the seconds (lower quartiles) that K-FAC adds to steps of a chain, each kind on top of the one before."""
    widths = list(range(2, 2 + blocks + 1))
    plain = [nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))).to(device) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in plain]
    kfac = KFAC(_Alone(plain[1]), _CONFIG, optimizer=optimizers[1], check_scale=False)
    inputs = torch.randn(8, widths[0], device=device)
    caches = Caches(device)

    def step(index: int) -> float:
        caches.evict()
        started = time.perf_counter()
        plain[index](inputs).square().mean().backward()
        if index:
            kfac.step()
        optimizers[index].step()
        optimizers[index].zero_grad()
        _wait(device)
        return time.perf_counter() - started

    seconds: dict[str, list[float]] = {kind: [] for kind in ("bare", *_KINDS)}
    for turn in range(rounds + 1):
        for kind in _KINDS:
            bare, own = step(0), step(1)
            if turn:  # the first steps allocate
                seconds["bare"].append(bare)
                seconds[kind].append(own)
    kfac.remove()
    typical = {kind: sorted(values)[(len(values) - 1) // 4] for kind, values in seconds.items()}
    return {
        "preconditioning": typical["preconditioning"] - typical["bare"],
        "measuring": typical["measuring"] - typical["preconditioning"],
        "refreshing": typical["refreshing"] - typical["measuring"],
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
