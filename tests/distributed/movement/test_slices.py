"""Slices made whole: cut by rows or anywhere, replicated, and held by nobody but one rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.movement.gradient_layout import GradientLayout, ParameterSlices, Slice
from kfac_dist.distributed.movement.slices import gather_slices
from tests.harness import run_ranks


def a_layout(size: int) -> GradientLayout:
    return GradientLayout(
        (
            ParameterSlices.rows("rows", (5, 3), size),
            ParameterSlices.rows("few", (1, 2), size),  # all but one rank hold nothing
            ParameterSlices.sharded(
                "range", (7,), [Slice(0, 0, 7)] if size == 1 else [Slice(size - 1, 0, 4), Slice(0, 4, 7)]
            ),
            ParameterSlices.replicated("everywhere", (2, 2)),
        ),
        size,
    )


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"rows": (5, 3), "few": (1, 2), "range": (7,), "everywhere": (2, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def held_by(rank: int, layout: GradientLayout) -> dict[str, Tensor]:
    whole, local = values(), {}
    for parameter in layout.parameters:
        piece = parameter.held_by(rank)
        if parameter.is_replicated:
            local[parameter.name] = whole[parameter.name]
        elif piece is not None:
            local[parameter.name] = whole[parameter.name].flatten()[piece.start : piece.stop]
    return local


def gathered() -> tuple[dict[str, Tensor], int]:
    comm = build_communicator(30)
    layout = a_layout(comm.size)
    whole = gather_slices(comm, layout, held_by(dist.get_rank(), layout), label="test")
    calls = comm.traffic.total_calls
    comm.close()
    return whole, calls


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_all_of_everything(size: int) -> None:
    for whole, calls in run_ranks(size, gathered):
        assert calls <= size
        assert list(whole) == list(values())
        assert all(torch.equal(whole[name], value) for name, value in values().items())


def test_one_rank_copies() -> None:
    layout, comm = a_layout(1), SoloCommunicator()
    local = held_by(0, layout)
    whole = gather_slices(comm, layout, local, label="test")
    assert all(torch.equal(whole[name], value) for name, value in values().items())
    assert all(whole[name].data_ptr() != local[name].data_ptr() for name in whole)
