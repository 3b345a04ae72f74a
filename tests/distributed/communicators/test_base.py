from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kfac_dist.distributed.communicators.base import Communicator, SoloCommunicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.communicators.torch_communicator import TorchCommunicator
from kfac_dist.distributed.communicators.traffic import all_gather_bytes, all_reduce_bytes, broadcast_bytes
from kfac_dist.errors import CollectiveError
from tests.harness import run_ranks


def exercise(dtype: torch.dtype) -> dict[str, Any]:
    comm = build_communicator(20.0)
    rank, size = comm.rank, comm.size
    results: dict[str, Any] = {"kind": type(comm).__name__, "place": (rank, size)}
    total = torch.full((6,), rank + 1.0, dtype=dtype)
    comm.all_reduce(total, label="sum").wait()
    results["sum"] = total.tolist()
    sent = torch.full((3,), float(rank), dtype=dtype)
    comm.broadcast(sent, size - 1, label="last").wait()
    results["last"] = sent.tolist()
    # Rank r sends r + s elements with value 10 r + s to rank s; the pair (0, 0) is empty.
    input_splits = [rank + other for other in range(size)]
    outgoing = torch.cat([torch.full((rank + other,), 10.0 * rank + other, dtype=dtype) for other in range(size)])
    incoming = torch.empty(sum(input_splits), dtype=dtype)
    work = comm.all_to_all(incoming, outgoing, input_splits, input_splits, label="uneven")
    work.wait()
    work.wait()
    results["uneven"] = incoming.tolist()
    everyone = torch.empty(2 * size, dtype=dtype)
    comm.all_gather(everyone, torch.full((2,), float(rank), dtype=dtype), label="gathered").wait()
    results["gathered"] = everyone.tolist()
    empty = torch.empty(0, dtype=dtype)
    comm.all_reduce(empty, label="empty").wait()
    comm.broadcast(empty, 0, label="empty").wait()
    comm.all_to_all(empty, empty, [0] * size, [0] * size, label="empty").wait()
    comm.all_gather(empty, empty, label="empty").wait()
    results["objects"] = comm.gather_objects({"rank": rank})
    comm.barrier()
    results["traffic"] = comm.traffic.snapshot()
    comm.close()
    comm.close()
    return results


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collectives(size: int, dtype: torch.dtype) -> None:
    width = dtype.itemsize
    for rank, results in enumerate(run_ranks(size, exercise, dtype)):
        assert results["kind"] == ("SoloCommunicator" if size == 1 else "TorchCommunicator")
        assert results["place"] == (rank, size)
        assert results["sum"] == [size * (size + 1) / 2] * 6
        assert results["last"] == [size - 1.0] * 3
        assert results["uneven"] == [10.0 * other + rank for other in range(size) for _ in range(rank + other)]
        assert results["gathered"] == [float(other) for other in range(size) for _ in range(2)]
        assert results["objects"] == [{"rank": other} for other in range(size)]
        if size == 1:
            assert results["traffic"] == {}
            continue
        assert results["traffic"]["sum"] == (1, all_reduce_bytes(6 * width, size))
        assert results["traffic"]["last"] == (1, broadcast_bytes(3 * width, size) if rank == size - 1 else 0)
        assert results["traffic"]["uneven"] == (1, width * sum(rank + other for other in range(size) if other != rank))
        assert results["traffic"]["gathered"] == (1, all_gather_bytes(2 * width, size))
        assert results["traffic"]["empty"] == (4, 0)


def test_traffic_counts_each_byte_once_over_the_ranks() -> None:
    results = run_ranks(3, exercise, torch.float32)
    assert sum(result["traffic"]["last"][1] for result in results) == 2 * 3 * 4  # two receivers of three floats


def split_world() -> list[tuple[str, int, int, float]]:
    world = build_communicator(20.0)
    seen = []
    # Groups of one and of many side by side, then others: each rank has created a different number of real groups.
    for groups in ([[0], [1, 2, 3]], [[0, 1], [2, 3]], [[3, 0], [1], [2]]):
        child = world.split(groups)
        value = torch.tensor([float(world.rank)])
        child.all_reduce(value, label="child").wait()
        grandchild = child.split([[member] for member in range(child.size)])
        seen.append((type(grandchild).__name__, child.rank, child.size, value.item()))
    assert world.traffic.calls["child"] == sum(size > 1 for _, _, size, _ in seen)
    world.close()
    # A second set of groups after the first was destroyed must not meet the first one's leftovers in the store.
    again = build_communicator(20.0).split([[0, 2], [1, 3]])
    again.barrier()
    return seen


def test_split() -> None:
    solo = "SoloCommunicator"
    assert run_ranks(4, split_world) == [
        [(solo, 0, 1, 0.0), (solo, 0, 2, 1.0), (solo, 0, 2, 3.0)],
        [(solo, 0, 3, 6.0), (solo, 1, 2, 1.0), (solo, 0, 1, 1.0)],
        [(solo, 1, 3, 6.0), (solo, 0, 2, 5.0), (solo, 0, 1, 2.0)],
        [(solo, 2, 3, 6.0), (solo, 1, 2, 5.0), (solo, 1, 2, 3.0)],
    ]


def split_half_of_the_world() -> list[tuple[int, int, float]]:
    half = dist.new_group([1, 2, 3])
    if dist.get_rank() == 0:
        return []
    seen = []
    for _ in range(2):
        comm = build_communicator(20.0, half)
        for groups in ([[0], [1, 2]], [[0, 1], [2]]):
            child = comm.split(groups)
            value = torch.tensor([float(dist.get_rank())])
            child.broadcast(value, child.size - 1, label="child").wait()
            seen.append((child.rank, child.size, value.item()))
        comm.close()
    return seen


def test_split_of_a_sub_group_needs_no_other_rank() -> None:
    assert run_ranks(4, split_half_of_the_world) == [
        [],
        [(0, 1, 1.0), (0, 2, 2.0)] * 2,
        [(0, 2, 3.0), (1, 2, 2.0)] * 2,
        [(1, 2, 3.0), (0, 1, 3.0)] * 2,
    ]


def stay_away() -> str:
    comm = build_communicator(1.0)
    if comm.rank == 1:
        time.sleep(2.0)
        return ""
    with pytest.raises(CollectiveError) as caught:
        comm.all_reduce(torch.ones(5), label="factors").wait()
    return str(caught.value)


def test_rank_that_stays_away_is_an_error_that_says_what_waited() -> None:
    message = run_ranks(2, stay_away)[0]
    assert message.startswith("rank 0 of 2: all_reduce of factors (20 bytes) failed after 1.")


def leave_with_a_collective_in_flight() -> float:
    """Rank 0 starts what the others never join, and closes: only its timeout would end the collective."""
    comm = build_communicator(60.0)
    started = time.monotonic()
    if comm.rank == 0:
        comm.all_reduce(torch.ones(5), label="factors")
        comm.close()
    else:
        time.sleep(3.0)  # alive, so that no connection closes
    return time.monotonic() - started


def test_closing_waits_for_no_collective_that_others_never_join() -> None:
    assert run_ranks(2, leave_with_a_collective_in_flight)[0] < 2.0


def splits_do_not_add_up() -> str:
    comm = build_communicator(20.0)
    with pytest.raises(ValueError, match="splits") as caught:
        comm.all_to_all(torch.empty(2), torch.empty(2), [1, 2], [1, 1], label="shards")
    return str(caught.value)


def test_wrong_splits_are_refused() -> None:
    message = "all_to_all of shards: splits [1, 2] and [1, 1] don't add up"
    assert [said[: len(message)] for said in run_ranks(2, splits_do_not_add_up)] == [message] * 2


def skip_the_gather() -> str:
    comm = build_communicator(1.0)
    if comm.rank == 1:
        time.sleep(2.0)
        return ""
    with pytest.raises(CollectiveError) as caught:
        comm.gather_objects("plan", label="plan")
    return str(caught.value)


def test_blocking_collective_fails_with_the_same_words() -> None:
    assert "rank 0 of 2: gather of plan (" in run_ranks(2, skip_the_gather)[0]


def test_without_torch_distributed_there_is_one_rank() -> None:
    comm: Communicator = build_communicator(20.0)
    assert isinstance(comm, SoloCommunicator)
    assert comm.split([[0]]).traffic is comm.traffic
    for groups in ([], [[0], [0]], [[0, 1]]):
        with pytest.raises(ValueError, match="no partition of ranks 0 to 0"):
            comm.split(groups)
    assert not issubclass(SoloCommunicator, TorchCommunicator)
