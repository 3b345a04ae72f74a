"""What `test_mpi_communicator.py` runs under mpirun: `python -m tests.distributed.mpi_job FUNCTION DIRECTORY`.

Each rank joins the world, calls the function, and leaves what it returned, pickled, in DIRECTORY/<rank>.
"""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kfac_dist.config.schema import Backend
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.movement import owner_buffer as segments
from kfac_dist.distributed.movement.owner_buffer import PendingBroadcast, Segment, SegmentLayout, share_segments
from kfac_dist.distributed.startup.bootstrap import World, bootstrap
from kfac_dist.errors import CollectiveError
from tests.preconditioner.workloads import Run

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8)
STEPS = 20


def values(rank: int, number: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (8 * torch.rand(number, generator=generator)).to(dtype)


def collectives(comm: Communicator) -> dict[str, Any]:
    """Every operation in every type, many in flight at once; empty ones among them."""
    rank, size = comm.rank, comm.size
    results: dict[str, Tensor] = {}
    works = []
    for dtype in DTYPES:
        results[f"sum {dtype}"] = values(rank, 1000, dtype)
        works.append(comm.all_reduce(results[f"sum {dtype}"], label="sum"))
        results[f"last {dtype}"] = values(rank, 7, dtype)
        works.append(comm.broadcast(results[f"last {dtype}"], size - 1, label="last"))
        # Rank r sends r + s values to rank s; the pair (0, 0) is empty.
        splits = [rank + other for other in range(size)]
        results[f"uneven {dtype}"] = torch.empty(sum(splits), dtype=dtype)
        works.append(
            comm.all_to_all(
                results[f"uneven {dtype}"], values(rank, sum(splits), dtype), splits, splits, label="uneven"
            )
        )
        results[f"gathered {dtype}"] = torch.empty(9 * size, dtype=dtype)
        works.append(comm.all_gather(results[f"gathered {dtype}"], values(rank, 9, dtype), label="gathered"))
        results[f"shared {dtype}"], sharing = shared(comm, dtype)
        works.append(sharing)
        empty = torch.empty(0, dtype=dtype)
        works += [comm.all_reduce(empty, label="empty"), comm.broadcast(empty, 0, label="empty")]
        works.append(comm.all_to_all(empty, empty, [0] * size, [0] * size, label="empty"))
    for work in works:
        work.wait()
        work.wait()
    objects = comm.gather_objects({"rank": rank, "text": "x" * rank}, label="objects")
    comm.barrier()
    return {
        "kind": type(comm).__name__,
        "tensors": results,
        "same": [len(set(comm.gather_objects(bits(t), label="bits"))) == 1 for n, t in results.items() if "sum" in n],
        "objects": objects,
        "traffic": {label: comm.traffic.snapshot()[label] for label in COUNTED},
    }


COUNTED = ("sum", "last", "uneven", "gathered", "shared", "empty", "objects")


def shared(comm: Communicator, dtype: torch.dtype) -> tuple[Tensor, PendingBroadcast]:
    """Uneven parts, scattered and gathered as those of many owners are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "MOST_BROADCASTS", 1)
        layout = SegmentLayout([Segment(str(rank), 4 + 3 * rank, rank) for rank in range(comm.size)], comm.size)
        assert layout.scatters
        buffer = torch.zeros(layout.sharing_numel, dtype=dtype)
        layout.part(buffer, comm.rank).copy_(values(comm.rank, 4 + 3 * comm.rank, dtype))
        return buffer[: layout.numel], share_segments(comm, buffer, layout, label="shared")


def bits(tensor: Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


def splits(comm: Communicator) -> list[tuple[str, int, int, float]]:
    seen = []
    for groups in ([[0], [1, 2]], [[2, 0], [1]]):
        child = comm.split(groups)
        value = torch.tensor([float(comm.rank)])
        child.all_reduce(value, label="child").wait()
        grandchild = child.split([[member] for member in range(child.size)])
        seen.append((type(grandchild).__name__, child.rank, child.size, value.item()))
    return seen


def train(backend: str, **distribution: Any) -> dict[str, Tensor]:
    config = {
        "curvature": {"factor_every": 2, "decay": 0.8},
        "inversion": {"inverse_every": 4, "damping": 0.05},
        "distribution": {"backend": backend, **distribution},
    }
    run = Run("mlp", config)
    parameters = run.train(STEPS)
    kind = type(run.kfac.communicator).__name__
    assert kind == {"mpi": "MPICommunicator", "torch": "TorchCommunicator"}[backend]
    run.close()
    return parameters


def compare(world: World) -> dict[str, Any]:
    """The same work over both backends."""
    both: dict[str, Any] = {"world": world.describe(), "place": (world.rank, world.local_rank, world.local_world_size)}
    for backend in Backend:
        comm = build_communicator(20.0, None, backend)
        both[f"collectives {backend}"] = collectives(comm)
        both[f"splits {backend}"] = splits(comm)
        comm.close()
        comm.close()
        with pytest.raises(CollectiveError, match="the communicator is closed"):
            comm.all_reduce(torch.ones(1), label="late")
        for name, options in CONFIGURATIONS.items():
            both[f"{name} {backend}"] = train(str(backend), **options)
    both["refused"] = refusals()
    return both


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "replicated": {"placement": "replicated"},
    "owner": {"placement": "owner", "reduction": "reduce_scatter", "pack_triangles": True},
    "bf16": {"placement": "replicated", "communication_dtype": "bfloat16"},
}


def refusals() -> list[str]:
    comm = build_communicator(20.0, None, Backend.MPI)
    messages = []
    for refused in (
        lambda: comm.all_to_all(torch.empty(2), torch.empty(2), [1, 2, 0], [1, 1, 0], label="shards"),
        lambda: comm.all_reduce(torch.empty(2, device="meta"), label="factors"),
        lambda: comm.split([[0, 1]]),
    ):
        with pytest.raises((ValueError, CollectiveError)) as caught:
            refused()
        messages.append(str(caught.value))
    # A part of the world has a communicator of its own, which the others know nothing of.
    half = dist.new_group([2, 1])
    if dist.get_rank() > 0:
        own = build_communicator(20.0, half, Backend.MPI)
        value = torch.tensor([float(dist.get_rank())])
        own.all_reduce(value, label="half").wait()
        messages.append(f"{own.rank} of {own.size}: {value.item()}")
    return messages


def stay_away(world: World) -> dict[str, Any]:
    """Rank 0 waits for one that is busy elsewhere, leaves, and mpirun ends the other."""
    comm = build_communicator(1.0, None, Backend.MPI)
    if comm.rank == 1:
        time.sleep(60.0)
    began = time.monotonic()
    with pytest.raises(CollectiveError) as caught:
        comm.all_reduce(torch.ones(5), label="factors").wait()
    with pytest.raises(CollectiveError, match="barrier"):
        comm.split([[0], [1]])
    comm.close()
    save(world.rank, {"message": str(caught.value), "seconds": time.monotonic() - began})
    raise caught.value


def save(rank: int, result: Any) -> None:
    (Path(sys.argv[2]) / str(rank)).write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    with bootstrap("cpu", 20.0) as joined:
        save(joined.rank, {"compare": compare, "stay_away": stay_away}[sys.argv[1]](joined))
