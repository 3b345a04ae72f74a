"""The one interface through which ranks talk: asynchronous collectives on flat tensors, counted and with a deadline.

    Communicator                 the interface
    ├── SoloCommunicator         one rank: everything completes at once
    ├── TorchCommunicator        a process group of torch.distributed         process_group.py
    └── MPICommunicator          an MPI communicator, for CPU clusters        mpi_communicator.py

Every operation is started by every rank of the communicator in the same order, also when its tensor is empty: a rank
that skips a collective because it has nothing to send hangs the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from kfac_dist.distributed.communicators.traffic import Traffic


class Work(Protocol):
    """A collective in flight."""

    def wait(self) -> None:
        """Returns once the result may be used (on a GPU: by the current stream).

        Raises:
            CollectiveError: The collective failed, or a rank did not join it in time.
        """


class Communicator(ABC):
    """A fixed set of ranks that compute together.

    Attributes:
        rank: This process's rank within the communicator.
        size: Number of ranks.
        device: Device of small tensors that carry decisions.
        traffic: Counters of this rank's messages; shared with the communicators split from this one.
        in_order: Whether collectives on a GPU's memory run one after the other, as they were started: then one may be
            started whose input is the output of another that is still in flight.
    """

    rank: int
    size: int
    device: torch.device
    traffic: Traffic
    in_order: bool = False

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of torch.distributed beneath, for libraries that want one; None if there is none."""
        return None

    @abstractmethod
    def all_reduce(self, tensor: Tensor, *, label: str) -> Work:
        """Sums a contiguous `tensor` over the ranks, in place, the same bits on each."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, root: int, *, label: str) -> Work:
        """Overwrites a contiguous `tensor` with that of `root`, a rank of this communicator."""

    @abstractmethod
    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> Work:
        """Fills the 1-D `output` with every rank's `input`, by rank; all inputs have the same number of elements."""

    @abstractmethod
    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        *,
        label: str,
    ) -> Work:
        """Sends the r-th part of the 1-D `input` to rank r, and receives rank r's part for this rank into `output`.

        `output_splits` and `input_splits` hold the parts' elements, by rank. Parts may be uneven or empty: NCCL, MPI
        and gloo (its `alltoallv`, in every torch that is supported) take them as they are, without padding.
        """

    @abstractmethod
    def gather_objects(self, value: Any, *, label: str = "objects") -> list[Any]:
        """The picklable `value` of every rank, by rank; for start-up and errors, not for the training step."""

    @abstractmethod
    def barrier(self) -> None:
        """Returns when every rank has come here."""

    @abstractmethod
    def split(self, groups: Sequence[Sequence[int]]) -> Communicator:
        """The communicator of the group that holds this rank; its ranks stand in the order that they have here.

        Collective: every rank passes the same partition of this communicator's ranks.

        Raises:
            ValueError: `groups` is no partition of this communicator's ranks.
        """

    @abstractmethod
    def close(self) -> None:
        """Frees what the communicator holds, and what was split from it; collective, and harmless when repeated."""


class _Done:
    """Work that was complete when it was started."""

    def wait(self) -> None:
        """Returns at once."""


class SoloCommunicator(Communicator):
    """One rank: it receives its own data."""

    def __init__(self, traffic: Traffic | None = None, device: torch.device | None = None) -> None:
        self.rank = 0
        self.size = 1
        self.device = device or torch.device("cpu")
        self.traffic = traffic or Traffic()

    @override
    def all_reduce(self, tensor: Tensor, *, label: str) -> Work:
        return _Done()

    @override
    def broadcast(self, tensor: Tensor, root: int, *, label: str) -> Work:
        return _Done()

    @override
    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> Work:
        output.copy_(input)
        return _Done()

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
        output.copy_(input)
        return _Done()

    @override
    def gather_objects(self, value: Any, *, label: str = "objects") -> list[Any]:
        return [value]

    @override
    def barrier(self) -> None:
        return

    @override
    def split(self, groups: Sequence[Sequence[int]]) -> Communicator:
        group_of(groups, 0, 1)
        return SoloCommunicator(self.traffic, self.device)

    @override
    def close(self) -> None:
        return


def check_splits(
    output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], label: str
) -> None:
    """Refuses splits that don't add up, which gloo takes in silence.

    Raises:
        ValueError: They don't.
    """
    if (sum(output_splits), sum(input_splits)) != (output.numel(), input.numel()):
        raise ValueError(
            f"all_to_all of {label}: splits {list(output_splits)} and {list(input_splits)} don't add up to the "
            f"{output.numel()} elements of the output and the {input.numel()} of the input"
        )


def group_of(groups: Sequence[Sequence[int]], rank: int, size: int) -> Sequence[int]:
    """The group that holds this rank.

    Raises:
        ValueError: `groups` is no partition of the ranks below `size`.
    """
    if sorted(member for group in groups for member in group) != list(range(size)):
        raise ValueError(f"groups {groups} are no partition of ranks 0 to {size - 1}")
    return next(group for group in groups if rank in group)
