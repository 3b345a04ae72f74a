"""The communicator over torch.distributed: a process group (gloo, NCCL) that belongs to K-FAC alone."""

from __future__ import annotations

import atexit
import ctypes
import pickle
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from kfac_dist.distributed.communicators.base import Communicator, SoloCommunicator, Work, check_splits, group_of
from kfac_dist.distributed.communicators.traffic import Traffic, all_gather_bytes, all_reduce_bytes, broadcast_bytes
from kfac_dist.errors import CollectiveError

# torch 2.13 renamed it.
_all_gather: Callable[..., dist.Work | None] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# gloo ends the process with an abort when Python drops the last reference to a group while it shuts down.
_alive: weakref.WeakSet[TorchCommunicator] = weakref.WeakSet()


@atexit.register
def _let_go_of_groups() -> None:
    for communicator in list(_alive):
        communicator.let_go()


class TorchCommunicator(Communicator):
    """A process group of torch.distributed, for K-FAC alone.

    K-FAC never shares a group with DDP: the order of collectives within a group must be the same on every rank, and
    DDP starts its own from hooks whose timing K-FAC doesn't control.

    Over gloo, a rank that stays away makes `wait` raise once the timeout has passed. Over NCCL `wait` only orders the
    current stream, and it is NCCL's watchdog that ends the process at the same timeout, naming the collective.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        timeout_seconds: float,
        traffic: Traffic | None = None,
        *,
        destroy: bool = True,
    ) -> None:
        self._group: dist.ProcessGroup | None = group
        self._destroy = destroy
        _alive.add(self)
        self._timeout = timedelta(seconds=timeout_seconds)
        self._ranks = dist.get_process_group_ranks(group)
        self._children: list[TorchCommunicator] = []
        self._unfinished: list[_PendingWork] = []
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        nccl = "nccl" in str(dist.get_backend(group))
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        self.traffic = traffic or Traffic()
        self.in_order = nccl  # all of a group's run on one stream; gloo's threads take them as they come

    @classmethod
    def create(
        cls, parent: dist.ProcessGroup | None, timeout_seconds: float, *, on_host: bool = False
    ) -> TorchCommunicator:
        """A communicator over the ranks of `parent` (default: the world) with a new process group of its own.

        Collective over `parent`. With `on_host` the group is gloo's, for any backend of `parent`.
        """
        ranks = dist.get_process_group_ranks(parent or dist.group.WORLD)
        timeout = timedelta(seconds=timeout_seconds)
        group = _new_group([range(len(ranks))], ranks, timeout, backend="gloo" if on_host else None)
        assert group is not None
        return cls(group, timeout_seconds, destroy=_is_world(ranks))

    @property
    @override
    def group(self) -> dist.ProcessGroup | None:
        return self._group

    @override
    def all_reduce(self, tensor: Tensor, *, label: str) -> Work:
        return self._start(
            lambda: dist.all_reduce(tensor, group=self._group, async_op=True),
            f"all_reduce of {label}",
            label,
            tensor.nbytes,
            all_reduce_bytes(tensor.nbytes, self.size),
        )

    @override
    def broadcast(self, tensor: Tensor, root: int, *, label: str) -> Work:
        return self._start(
            lambda: dist.broadcast(tensor, src=self._ranks[root], group=self._group, async_op=True),
            f"broadcast of {label} from rank {root}",
            label,
            tensor.nbytes,
            broadcast_bytes(tensor.nbytes, self.size) if self.rank == root else 0,
        )

    @override
    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> Work:
        return self._start(
            lambda: _all_gather(output, input, group=self._group, async_op=True),
            f"all_gather of {label}",
            label,
            input.nbytes,
            all_gather_bytes(input.nbytes, self.size),
        )

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
        return self._start(
            lambda: dist.all_to_all_single(
                output, input, list(output_splits), list(input_splits), group=self._group, async_op=True
            ),
            f"all_to_all of {label}",
            label,
            input.nbytes,
            sent,
        )

    @override
    def gather_objects(self, value: Any, *, label: str = "objects") -> list[Any]:
        values: list[Any] = [None] * self.size
        nbytes = len(pickle.dumps(value))

        def gather() -> None:
            dist.all_gather_object(values, value, group=self._group)

        # Every rank's bytes have to reach the other N-1.
        self._start(gather, f"gather of {label}", label, nbytes, nbytes * (self.size - 1)).wait()
        return values

    @override
    def barrier(self) -> None:
        # A sum, read on the host: on NCCL only that holds the host back, not its barrier's wait.
        flag = torch.zeros(1, device=self.device, dtype=torch.float32)
        self.all_reduce(flag, label="barrier").wait()
        flag.item()

    @override
    def split(self, groups: Sequence[Sequence[int]]) -> Communicator:
        alone = len(group_of(groups, self.rank, self.size)) == 1
        world = _is_world(self._ranks)
        if world:  # every rank makes every group: at 4096 ranks, a group for each alone would take the start minutes
            groups = [group for group in groups if len(group) > 1]
        created = _new_group(groups, self._ranks, self._timeout)
        if created is None:
            return SoloCommunicator(self.traffic, self.device)
        child = type(self)(created, self._timeout.total_seconds(), self.traffic, destroy=world)
        self._children.append(child)
        return SoloCommunicator(self.traffic, self.device) if alone else child

    @override
    def close(self) -> None:
        for child in self._children:
            child.close()
        self._children.clear()
        # The world may have been torn down before its communicators, at the end of a run.
        if self._destroy and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self.let_go()

    def let_go(self) -> None:
        """Drop the process group without telling other ranks; the communicator can't be used afterwards."""
        self._destroy = False
        group, self._group = self._group, None
        if group is not None and any(not pending.completed for pending in self._unfinished):
            # A rank that fails leaves collectives behind which will never complete, and gloo's destructor waits for
            # them: its reason would reach no rank before their timeout. The process's end closes the connections.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        self._unfinished.clear()

    def _start(
        self, launch: Callable[[], dist.Work | None], operation: str, label: str, nbytes: int, sent: int
    ) -> Work:
        if self._group is None:  # torch would take None for the whole world's group
            raise CollectiveError(f"{operation}: the communicator is closed (KFAC.remove was called)")
        self.traffic.count(label, sent)
        pending = _PendingWork(f"{operation} ({nbytes} bytes)", self.rank, self.size)
        pending.start(launch)
        self._unfinished = [other for other in self._unfinished if not other.completed]
        self._unfinished.append(pending)
        return pending


class _PendingWork:
    """A collective of torch.distributed whose failure names the waiting rank, the collective and the time."""

    def __init__(self, description: str, rank: int, size: int) -> None:
        self._description = description
        self._rank = rank
        self._size = size
        self._work: dist.Work | None = None
        self._started = time.monotonic()

    def start(self, launch: Callable[[], dist.Work | None]) -> None:
        """Starts the collective; one that blocks until it is done returns no work."""
        try:
            self._work = launch()
        except RuntimeError as error:
            raise self._failure(error) from error

    @property
    def completed(self) -> bool:
        """Whether it is over, or nothing is known against it."""
        return self._work is None or self._work.is_completed()

    def wait(self) -> None:
        """Waits, once; later calls return at once."""
        work, self._work = self._work, None
        if work is None:
            return
        try:
            work.wait()
        except RuntimeError as error:
            raise self._failure(error) from error

    def _failure(self, error: RuntimeError) -> CollectiveError:
        seconds = time.monotonic() - self._started
        return CollectiveError(
            f"rank {self._rank} of {self._size}: {self._description} failed after {seconds:.1f} s: "
            f"another rank has stopped, is late, or runs another collective ({error})"
        )


def _is_world(ranks: Sequence[int]) -> bool:
    return len(ranks) == dist.get_world_size()


def _new_group(
    groups: Sequence[Sequence[int]], ranks: Sequence[int], timeout: timedelta, *, backend: str | None = None
) -> dist.ProcessGroup | None:
    """This process's new process group out of `groups`, disjoint parts of `ranks` given by positions in it.

    None if no group holds it. When `ranks` are the world, every rank creates every group, and torch names them by a
    counter that all ranks share and that never goes back. Ranks outside of a sub-group of the world don't come here;
    torch then names a group by its ranks and by the number of groups that the process holds. Hence every rank gets a
    group there, also of one, so that these numbers stay equal; and hence such a group is left to the end of the world:
    once destroyed, its name, and the dead addresses that the store holds under it, would go to the next group.
    """
    own = dist.get_rank()
    global_groups = [sorted(ranks[member] for member in group) for group in groups]
    mine = next((group for group in global_groups if own in group), None)
    created: dist.ProcessGroup | None = None
    if _is_world(ranks):
        for group in global_groups:
            process_group = dist.new_group(group, timeout=timeout, backend=backend)
            if group is mine:
                created = process_group
    elif mine is not None:
        created = dist.new_group(mine, timeout=timeout, backend=backend, use_local_synchronization=True)
    return created
