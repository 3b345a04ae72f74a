"""Seconds of a collective: as it was measured on as many ranks, or by latency and bandwidth.

    N ranks on M nodes, L of them on one        latency                     bytes over the bandwidth of the slowest link
    all-reduce                                  2 (a·log2 L + i·log2 M)     2(N-1)/N · b
    broadcast                                   a·log2 L + i·log2 M         b
    all-gather, of b bytes together             a·log2 L + i·log2 M         (N-1)/N · b
    all-to-all                                  (1 + N/16) times the same   what a rank sends or receives, whichever
                                                                            is more: to other nodes, and in its own

Rings and trees cross a link between nodes once for all of a node's ranks, each of which has its own way out: there L
links carry a message together, as NCCL's channels do. An all-to-all's messages don't share.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kfac_dist.distributed.communicators.recording import Call, Collective
from kfac_dist.errors import ConfigError
from kfac_dist.planning.machines.hardware import Hardware, Link

_MESSAGES = 16


@dataclass(frozen=True)
class Spread:
    """The nodes of a group of ranks.

    Attributes:
        size: Its ranks.
        nodes: Nodes that they are on.
        local: Most of them on one node.
    """

    size: int
    nodes: int
    local: int

    @classmethod
    def of(cls, ranks: Sequence[int], node_size: int) -> Spread:
        """Return the spread of some ranks of a world whose nodes hold `node_size` consecutive ones."""
        by_node = Counter(rank // node_size for rank in ranks)
        return cls(len(ranks), len(by_node), max(by_node.values()))


def check_network(hardware: Hardware, sizes: Sequence[int]) -> None:
    """Refuse numbers of ranks that a machine without a network can't have.

    Raises:
        ConfigError: One rank measured alone.
    """
    if hardware.intra is None and max(sizes) > 1:
        raise ConfigError(
            f"--hardware: {hardware.name} was measured by one rank, which knows no network, and --world-size asks for "
            f"{max(sizes)}: calibrate on several, such as `torchrun --standalone --nproc-per-node 4 -m kfac_dist "
            "calibrate --out measured.json`"
        )


def seconds_of(call: Call, hardware: Hardware, node_size: int) -> float:
    """Return the seconds of one collective."""
    spread = Spread.of(call.ranks, node_size)
    known = hardware.measured_collectives.get((call.kind, spread.size))
    if known is not None and (spread.nodes == 1 or hardware.inter is None):
        return known.at(max(call.nbytes, 4))
    assert hardware.intra is not None  # see `check_network`
    between = hardware.inter or hardware.intra
    return _latency(call.kind, hardware.intra, between, spread) + _transfer(call, hardware.intra, between, spread)


def _latency(kind: Collective, intra: Link, between: Link, spread: Spread) -> float:
    ways = intra.latency * _log2(spread.local) + between.latency * _log2(spread.nodes)
    match kind:
        case Collective.ALL_REDUCE:
            return 2 * ways
        case Collective.ALL_TO_ALL:
            return ways * (1 + spread.size / _MESSAGES)
        case _:
            return ways


def _transfer(call: Call, intra: Link, between: Link, spread: Spread) -> float:
    inside, outside = intra.bandwidth, between.bandwidth
    shared = inside if spread.nodes == 1 else min(inside, outside * spread.local)
    size = spread.size
    match call.kind:
        case Collective.ALL_REDUCE:
            return 2 * (size - 1) / size * call.nbytes / shared
        case Collective.BROADCAST:
            return call.nbytes / shared
        case Collective.ALL_GATHER:
            return (size - 1) / size * call.nbytes / shared
        case Collective.ALL_TO_ALL:
            moved = max(call.sent, call.received)
            away = (size - spread.local) / (size - 1) if spread.nodes > 1 else 0.0
            return max(moved * away / outside, moved * (1 - away) / inside)


def _log2(count: int) -> int:
    return math.ceil(math.log2(count)) if count > 1 else 0
