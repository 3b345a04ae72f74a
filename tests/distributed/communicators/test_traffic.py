from __future__ import annotations

from kfac_dist.distributed.communicators.traffic import (
    Traffic,
    all_reduce_bytes,
    broadcast_bytes,
    reduce_scatter_bytes,
)
from kfac_dist.distributed.movement.packing import triangle_numel


def test_formulas() -> None:
    assert [triangle_numel(n) for n in (1, 2, 5)] == [1, 3, 15]
    assert [all_reduce_bytes(100, size) for size in (1, 2, 3, 4)] == [0, 100, 134, 150]
    assert [reduce_scatter_bytes(100, size) for size in (1, 2, 3, 4)] == [0, 50, 67, 75]
    assert [broadcast_bytes(100, size) for size in (1, 2, 3, 4)] == [0, 100, 200, 300]


def test_traffic_totals_and_reset() -> None:
    traffic = Traffic()
    traffic.count("b", 3)
    traffic.count("a", 0)
    traffic.count("b", 4)
    assert traffic.snapshot() == {"a": (1, 0), "b": (2, 7)}
    assert (traffic.total_calls, traffic.total_bytes) == (3, 7)
    traffic.reset()
    assert (traffic.snapshot(), traffic.total_calls, traffic.total_bytes) == ({}, 0, 0)
