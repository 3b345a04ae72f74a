"""A communicator that sends nothing: it records the collectives of one rank of any number of ranks.

Code that runs on it with tensors of the device `meta` shows its collectives without memory, network or other ranks.
Bytes are counted by the formulas of `cost`, as by every communicator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from kfac_dist.distributed.communicators.base import Communicator, SoloCommunicator, Work, check_splits, group_of
from kfac_dist.distributed.communicators.traffic import Traffic, all_gather_bytes, all_reduce_bytes, broadcast_bytes


class Collective(StrEnum):
    """A collective, as it is recorded."""

    ALL_REDUCE = "all_reduce"
    BROADCAST = "broadcast"
    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"


@dataclass(frozen=True)
class Call:
    """One collective, as one rank sees it.

    Attributes:
        kind: The collective.
        label: Label of its contents.
        nbytes: Bytes of the whole message: of the tensor, or of all that this rank has in the end.
        sent: Bytes that this rank sends, by the formulas of `cost`.
        received: Bytes that reach this rank, where it isn't the same for all.
        ranks: Ranks that take part, in the numbers of the world.
    """

    kind: Collective
    label: str
    nbytes: int
    sent: int
    received: int
    ranks: tuple[int, ...]


class _Over:
    def wait(self) -> None:
        """Returns at once."""


class RecordingCommunicator(Communicator):
    """One rank of many, the others of which aren't there.

    Attributes:
        calls: Its calls, and those of the communicators split from it.
        ranks: Its ranks, in the numbers of the world.
    """

    in_order = True

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        ranks: Sequence[int] | None = None,
        traffic: Traffic | None = None,
        calls: list[Call] | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device("meta")
        self.traffic = traffic or Traffic()
        self.calls: list[Call] = [] if calls is None else calls
        self.ranks = tuple(range(size) if ranks is None else ranks)

    @override
    def all_reduce(self, tensor: Tensor, *, label: str) -> Work:
        sent = all_reduce_bytes(tensor.nbytes, self.size)
        return self._note(Collective.ALL_REDUCE, label, tensor.nbytes, sent)

    @override
    def broadcast(self, tensor: Tensor, root: int, *, label: str) -> Work:
        sent = broadcast_bytes(tensor.nbytes, self.size) if root == self.rank else 0
        return self._note(Collective.BROADCAST, label, tensor.nbytes, sent)

    @override
    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> Work:
        sent = all_gather_bytes(input.nbytes, self.size)
        return self._note(Collective.ALL_GATHER, label, output.nbytes, sent)

    @override
    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        *,
        label: str,
    ) -> Work:
        check_splits(output, input, output_splits, input_splits, label)
        sent = (sum(input_splits) - input_splits[self.rank]) * input.element_size()
        received = (sum(output_splits) - output_splits[self.rank]) * output.element_size()
        return self._note(Collective.ALL_TO_ALL, label, max(input.nbytes, output.nbytes), sent, received)

    @override
    def gather_objects(self, value: Any, *, label: str = "objects") -> list[Any]:
        raise NotImplementedError("a recording receives nothing")

    @override
    def barrier(self) -> None:
        return

    @override
    def split(self, groups: Sequence[Sequence[int]]) -> Communicator:
        own = group_of(groups, self.rank, self.size)
        if len(own) == 1:
            return SoloCommunicator(self.traffic, self.device)
        ranks = [self.ranks[member] for member in own]
        return RecordingCommunicator(
            list(own).index(self.rank), len(own), ranks=ranks, traffic=self.traffic, calls=self.calls
        )

    @override
    def close(self) -> None:
        return

    def _note(self, kind: Collective, label: str, nbytes: int, sent: int, received: int = 0) -> Work:
        self.traffic.count(label, sent)
        self.calls.append(Call(kind, label, nbytes, sent, received, self.ranks))
        return _Over()
