from __future__ import annotations

from typing import Any

import torch

from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.movement.broadcast import broadcast_all
from tests.harness import run_ranks


def tensors(rank: int) -> list[torch.Tensor]:
    """Two dtypes in turn; one transposed, one without dimensions, one empty, and what autograd watches."""
    made = [
        torch.full((2, 3), float(rank)).mT,
        torch.tensor(7 + rank),
        torch.arange(4.0) * rank,
        torch.empty(0),
        torch.tensor([rank, 5]),
    ]
    return [*made, torch.nn.Parameter(torch.full((2,), -1.0 - rank))]


def shared() -> tuple[bool, Any]:
    comm = build_communicator(20.0)
    own = tensors(comm.rank)
    before = [tensor.data_ptr() for tensor in own]
    broadcast_all(comm, own, 1, label="buffers")
    assert [tensor.data_ptr() for tensor in own] == before
    equal = all(torch.equal(mine, root) for mine, root in zip(own, tensors(1), strict=True))
    return equal, comm.traffic.snapshot()["buffers"]


def test_many_tensors_take_a_collective_a_dtype() -> None:
    nbytes = 2 * (4 * (6 + 4 + 2) + 8 * 3)  # to two others
    assert run_ranks(3, shared) == [(True, (2, nbytes if rank == 1 else 0)) for rank in range(3)]


def test_one_rank_sends_nothing() -> None:
    comm, own = build_communicator(20.0), tensors(0)
    broadcast_all(comm, own, 0, label="buffers")
    assert all(torch.equal(mine, same) for mine, same in zip(own, tensors(0), strict=True))
    assert comm.traffic.total_calls == 0
