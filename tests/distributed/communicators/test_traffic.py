from __future__ import annotations

from kfac_dist.distributed.communicators.traffic import Traffic


def test_traffic_totals_and_reset() -> None:
    traffic = Traffic()
    traffic.count("b", 3)
    traffic.count("a", 0)
    traffic.count("b", 4)
    assert traffic.snapshot() == {"a": (1, 0), "b": (2, 7)}
    assert (traffic.total_calls, traffic.total_bytes) == (3, 7)
    traffic.reset()
    assert (traffic.snapshot(), traffic.total_calls, traffic.total_bytes) == ({}, 0, 0)
