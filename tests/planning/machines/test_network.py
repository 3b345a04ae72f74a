from __future__ import annotations

import pytest

from kfac_dist.distributed.communicators.recording import Call, Collective
from kfac_dist.planning.machines.hardware import Hardware, load_hardware
from kfac_dist.planning.machines.network import Spread, seconds_of

FLAT = Hardware.model_validate(
    load_hardware("h100-ib400").model_dump()
    | {"intra": {"latency": 0.0, "bandwidth": 100.0}, "inter": {"latency": 0.0, "bandwidth": 10.0}}
)


def call(kind: Collective, ranks: tuple[int, ...], nbytes: int = 1200, sent: int = 0, received: int = 0) -> Call:
    return Call(kind, "anything", nbytes, sent, received, ranks)


def test_groups_lie_on_nodes() -> None:
    assert Spread.of(range(8), 4) == Spread(8, 2, 4)
    assert Spread.of((0, 4, 8, 12), 4) == Spread(4, 4, 1)
    assert Spread.of((4, 5), 4) == Spread(2, 1, 2)


@pytest.mark.parametrize(
    ("kind", "ranks", "seconds"),
    [
        (Collective.ALL_REDUCE, (0, 1, 2, 3), 2 * 3 / 4 * 1200 / 100),
        (Collective.ALL_REDUCE, tuple(range(8)), 2 * 7 / 8 * 1200 / 40),  # four ways out of each node
        (Collective.ALL_REDUCE, (0, 4), 2 * 1 / 2 * 1200 / 10),  # one
        (Collective.BROADCAST, (0, 1), 1200 / 100),
        (Collective.ALL_GATHER, (0, 1), 1 / 2 * 1200 / 100),
    ],
)
def test_bandwidth_is_that_of_the_slowest_link(kind: Collective, ranks: tuple[int, ...], seconds: float) -> None:
    assert seconds_of(call(kind, ranks), FLAT, 4) == pytest.approx(seconds)


def test_who_receives_most_sets_an_all_to_alls_pace() -> None:
    inside = call(Collective.ALL_TO_ALL, (0, 1, 2, 3), sent=300, received=900)
    assert seconds_of(inside, FLAT, 4) == pytest.approx(900 / 100)
    across = call(Collective.ALL_TO_ALL, tuple(range(8)), sent=700, received=70)
    assert seconds_of(across, FLAT, 4) == pytest.approx(700 * 4 / 7 / 10)


def test_latencies_add_up_over_hops() -> None:
    slow = Hardware.model_validate(
        FLAT.model_dump()
        | {"intra": {"latency": 1.0, "bandwidth": 1e30}, "inter": {"latency": 10.0, "bandwidth": 1e30}}
    )
    assert seconds_of(call(Collective.BROADCAST, tuple(range(16))), slow, 4) == pytest.approx(2 * 1 + 2 * 10)
    assert seconds_of(call(Collective.ALL_REDUCE, tuple(range(16))), slow, 4) == pytest.approx(2 * (2 * 1 + 2 * 10))


def test_what_was_measured_counts_where_it_was_measured() -> None:
    measured = Hardware.model_validate(
        FLAT.model_dump() | {"inter": None, "collectives": {"broadcast": {2: {100: 3.0, 10000: 300.0}}}}
    )
    assert seconds_of(call(Collective.BROADCAST, (0, 1), 1000), measured, 4) == pytest.approx(30.0)
    assert seconds_of(call(Collective.BROADCAST, (0, 1, 2), 1000), measured, 4) == pytest.approx(10.0)
