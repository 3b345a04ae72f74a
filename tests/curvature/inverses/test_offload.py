"""Inverses on the host: the same updates to the last bit, from two slots, whatever was loaded when."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_dist.config.schema import Solver
from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.curvature.blocks import find_blocks
from kfac_dist.curvature.inverses.offload import Offload
from kfac_dist.curvature.inverses.precondition import Group, build_groups
from kfac_dist.curvature.inverses.solvers import payload_numel
from kfac_dist.preconditioner.plan import block_units

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two like layers, a diagonal factor, and a layer of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)


def groups_of(solver: Solver, dtype: torch.dtype, largest: int | None = None) -> list[Group]:
    config = parse_kfac({"inversion": {"solver": solver}})
    blocks = find_blocks(Net(), config.curvature).blocks
    groups = build_groups(
        blocks, {block.name: block_units(block, config) for block in blocks}, solver, CPU, dtype, largest
    )
    for index, group in enumerate(groups):
        group.gradient.copy_(torch.randn(group.gradient.shape, generator=torch.Generator().manual_seed(index)))
    return groups


def load(groups: list[Group], solver: Solver, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in groups:
        for unit in group.units:
            group.load(unit, torch.rand(payload_numel(unit, solver), generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", [Solver.CHOLESKY, Solver.EIGEN])
def test_updates_and_payloads_are_the_same_bits(solver: Solver, dtype: torch.dtype) -> None:
    here, there = groups_of(solver, dtype), groups_of(solver, dtype)
    offload = Offload(there, CPU)
    for seed in (0, 1):
        load(here, solver, seed)
        load(there, solver, seed)
        for _ in range(2):  # as often as a solver asks
            offload.begin()
            updates = [group.apply(group.gradient, 0.1) for group in offload.streamed(there)]
            for group, update in zip(here, updates, strict=True):
                assert torch.equal(group.apply(group.gradient, 0.1), update)
    for group, other in zip(here, there, strict=True):
        for unit in group.units:
            assert torch.equal(group.payload(unit), other.payload(unit))


def test_what_was_fetched_before_a_payload_came_is_fetched_again() -> None:
    here, there = groups_of(Solver.CHOLESKY, torch.float32), groups_of(Solver.CHOLESKY, torch.float32)
    offload = Offload(there, CPU)
    offload.begin()
    load(here, Solver.CHOLESKY, 3)
    load(there, Solver.CHOLESKY, 3)
    updates = [group.apply(group.gradient, 0.1) for group in offload.streamed(there)]
    assert all(
        torch.equal(group.apply(group.gradient, 0.1), update) for group, update in zip(here, updates, strict=True)
    )


def test_the_device_holds_two_groups_and_the_host_all() -> None:
    groups = groups_of(Solver.EIGEN, torch.float32)
    offload = Offload(groups, CPU)
    sizes = [
        sum(-(-t.nbytes // 256) * 256 for p in g.pieces for t in (p.matrix, p.vector) if t is not None) for g in groups
    ]
    assert len(sizes) == 3
    assert offload.host_bytes == sum(sizes)
    assert offload.device_bytes == 2 * max(sizes)
    slots = {slot.data_ptr() for slot in offload._slots}
    homes = set()
    for group in groups:
        homes |= {t.data_ptr() for piece in group.pieces for t in (piece.matrix, piece.vector) if t is not None}
    for group in offload.streamed(groups):
        first = group.pieces[0].matrix if group.pieces[0].matrix is not None else group.pieces[0].vector
        assert first is not None
        assert first.data_ptr() in slots
    assert not homes & slots


def test_large_groups_are_cut_so_that_there_is_something_to_stream() -> None:
    whole = groups_of(Solver.CHOLESKY, torch.float32)
    cut = groups_of(Solver.CHOLESKY, torch.float32, largest=1)
    assert [len(group.blocks) for group in whole] == [1, 2, 1]
    assert [len(group.blocks) for group in cut] == [1, 1, 1, 1]
    assert [block.name for group in cut for block in group.blocks] == ["embedding", "first", "second", "head"]
