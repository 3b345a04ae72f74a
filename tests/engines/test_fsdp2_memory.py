"""What a rank keeps between steps shrinks with the number of ranks: factors, inverses and gradients of its own blocks.

Real processes count for a few ranks; for many, a rank alone counts whose collectives go nowhere (torch's fake process
group): what it is sent doesn't matter for what it keeps. Where both count, they count the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from kfac_dist import KFAC
from kfac_dist.curvature.factors import FactorKind
from kfac_dist.preconditioner.memory import rank_bytes
from tests.engines.fsdp2_runs import mesh_of, needs_sharding, sharded
from tests.engines.live_bytes import live_bytes
from tests.harness import run_ranks

pytestmark = needs_sharding

LAYERS, WIDTH = 16, 32
# The fake process group refuses an all-to-all in which a rank has nothing to send, hence one bucket for all blocks.
LEAN = {"placement": "owner", "reduction": "reduce_scatter", "reduce_every": "step", "buckets": 1}


@dataclass(frozen=True)
class Kept:
    """Bytes on one rank.

    Attributes:
        bytes: Counted: all tensors that the `KFAC` keeps alive.
        planned: What `kfac-dist plan` says.
        most: What it says of the rank that has most.
        small: What every rank has, whatever it owns: where the diagonals of all factors lie, and a few numbers a unit.
    """

    bytes: int
    planned: int
    most: int
    small: int


def even() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def uneven() -> nn.Module:
    """One layer has most of the parameters."""
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), *even())


def kept(name: str, size: int) -> Kept:
    """Trains a few steps."""
    model = sharded({"even": even, "uneven": uneven}[name](), mesh_of((size,)))
    config = {"curvature": {"factor_every": 1}, "inversion": {"inverse_every": 2}, "distribution": LEAN}
    kfac = KFAC(model, {**config, "update": {"kl_clip": None}})
    constructed = live_bytes(kfac)
    for _ in range(3):
        model(torch.randn(4, WIDTH)).square().mean().backward()
        kfac.step()
        model.zero_grad()
    after = live_bytes(kfac)
    assert size == 1 or after == constructed
    planned = rank_bytes(kfac.monitor.plan, kfac.solver_access.config, sharded=size > 1)
    diagonals = sum(unit.batch * unit.dim for unit in kfac.monitor.plan.units if unit.kind is FactorKind.DENSE)
    small = 8 * diagonals + 64 * len(kfac.monitor.plan.units)
    kfac.remove()
    return Kept(after, planned[dist.get_rank()].total, max(rank.total for rank in planned), small)


def kept_alone(name: str, rank: int, size: int) -> Kept:
    """The same on one rank of a world that isn't there."""
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        return kept(name, size)
    finally:
        dist.destroy_process_group()


def many(name: str, sizes: list[int]) -> dict[int, list[Kept]]:
    """What the first and the last rank that has a block keep, by number of ranks."""
    last = {size: min(size, LAYERS) - 1 for size in sizes}
    return {size: [kept_alone(name, rank, size) for rank in (0, last[size])] for size in sizes}


def test_bytes_fall_as_one_over_the_ranks() -> None:
    """Averages, inverses, gradients where they are preconditioned, and gradients on both ways of the exchange."""
    factors, gradient = 4 * (WIDTH**2 + (WIDTH + 1) ** 2), 4 * WIDTH * (WIDTH + 1)
    everything = LAYERS * (2 * factors + 3 * gradient)
    [counted] = run_ranks(1, many, "even", [2, 4, 8, 16], process_group=False)
    for size, ranks in counted.items():
        for rank in ranks:
            assert 0.8 * everything / size <= rank.bytes <= everything / size + rank.small, size


def test_no_rank_keeps_more_than_the_plan_says() -> None:
    by_size = {size: run_ranks(size, kept, "uneven", size) for size in (1, 2, 4)}
    [alone] = run_ranks(1, many, "uneven", [2, 4, 8, 16], process_group=False)
    for size, ranks in (by_size | alone).items():
        for rank in ranks:
            assert rank.planned <= rank.bytes <= rank.planned + rank.small, size
            assert rank.bytes <= rank.most + rank.small
    for size in (2, 4):
        assert [by_size[size][0], by_size[size][-1]] == alone[size]


def test_more_ranks_than_blocks_keep_what_one_block_takes() -> None:
    [counted] = run_ranks(1, many, "even", [16, 24], process_group=False)
    assert counted[24][0].bytes <= counted[16][0].bytes
