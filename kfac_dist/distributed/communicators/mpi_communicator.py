"""The communicator over MPI: non-blocking collectives on the tensors' own memory, each with a deadline.

    tensor ── view as a numpy array, no copy ──▶ MPI.Iallreduce / Ibcast / Iallgather / Ialltoallv ──▶ request
    wait()  asks the request until it is done or the time is over

For clusters of CPUs whose network only MPI drives. bfloat16 and float16 have no numpy or MPI type: they travel as
16-bit words, two bytes a value, and an operation of our own adds them in their own precision, as gloo does.

MPI makes progress only during its calls. A collective that was started during backward continues when the next one
starts, and in `wait`; MPICH moves it in between too with MPICH_ASYNC_PROGRESS=1, at the price of a busy thread a rank.
"""

from __future__ import annotations

import functools
import os
import pickle
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from kfac_dist.distributed.communicators.base import Communicator, SoloCommunicator, Work, check_splits, group_of
from kfac_dist.distributed.communicators.traffic import Traffic, all_gather_bytes, all_reduce_bytes, broadcast_bytes
from kfac_dist.distributed.startup.mpi import import_mpi, leave_without_finalizing
from kfac_dist.errors import CollectiveError, ConfigError

KEY = "kfac.distribution.backend: mpi"
HALVES = (torch.bfloat16, torch.float16)
# Seconds that `wait` polls without a pause: a collective among ranks that are ready takes less.
EAGER_SECONDS = 0.002
PAUSE_SECONDS = 0.0002


class MPICommunicator(Communicator):
    """An MPI communicator of mpi4py that belongs to K-FAC alone; tensors live on the CPU."""

    def __init__(self, communicator: Any, timeout_seconds: float, traffic: Traffic | None = None) -> None:
        self._mpi = import_mpi(KEY)
        self._communicator = communicator
        self._timeout = timeout_seconds
        self._children: list[MPICommunicator] = []
        self._unfinished: list[_PendingRequest] = []
        self.rank = communicator.Get_rank()
        self.size = communicator.Get_size()
        self.device = torch.device("cpu")
        self.traffic = traffic or Traffic()

    @classmethod
    def create(cls, group: dist.ProcessGroup | None, timeout_seconds: float) -> MPICommunicator:
        """A communicator over the ranks of `group` (default: torch's world), in their order.

        Collective over `group`.

        Raises:
            ConfigError: These ranks are not those of an MPI job, or they compute on GPUs.
        """
        if "nccl" in str(dist.get_backend(group)):
            raise ConfigError(
                f"{KEY} is for clusters of CPUs, but these ranks compute on GPUs: write torch, or set run.device to cpu"
            )
        mpi = import_mpi(KEY)
        world = mpi.COMM_WORLD
        _check_world(world.Get_rank(), world.Get_size(), dist.get_rank(), dist.get_world_size())
        members = world.Get_group()
        chosen = members.Incl(dist.get_process_group_ranks(group or dist.group.WORLD))
        return cls(world.Create_group(chosen), timeout_seconds)

    @override
    def all_reduce(self, tensor: Tensor, *, label: str) -> Work:
        operation = _sum_of(tensor.dtype) if tensor.dtype in HALVES else self._mpi.SUM
        return self._start(
            lambda: self._communicator.Iallreduce(self._mpi.IN_PLACE, _array(tensor), operation),
            f"all_reduce of {label}",
            label,
            tensor.nbytes,
            all_reduce_bytes(tensor.nbytes, self.size),
            tensor,
        )

    @override
    def broadcast(self, tensor: Tensor, root: int, *, label: str) -> Work:
        return self._start(
            lambda: self._communicator.Ibcast(_array(tensor), root),
            f"broadcast of {label} from rank {root}",
            label,
            tensor.nbytes,
            broadcast_bytes(tensor.nbytes, self.size) if self.rank == root else 0,
            tensor,
        )

    @override
    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> Work:
        return self._start(
            lambda: self._communicator.Iallgather(_array(input), _array(output)),
            f"all_gather of {label}",
            label,
            input.nbytes,
            all_gather_bytes(input.nbytes, self.size),
            input,
            output,
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
        return self._start(
            lambda: self._communicator.Ialltoallv(
                [_array(input), _parts(input_splits)],
                [_array(output), _parts(output_splits)],
            ),
            f"all_to_all of {label}",
            label,
            input.nbytes,
            (sum(input_splits) - input_splits[self.rank]) * input.element_size(),
            input,
            output,
        )

    @override
    def gather_objects(self, value: Any, *, label: str = "objects") -> list[Any]:
        own = np.frombuffer(pickle.dumps(value), np.uint8)
        counts = np.zeros(self.size, np.int64)
        operation, sent = f"gather of {label}", len(own) * (self.size - 1)
        length = np.array([len(own)])
        self._wait_for(lambda: self._communicator.Iallgather(length, counts), operation, len(own))
        everything = np.empty(int(counts.sum()), np.uint8)
        self.traffic.count(label, sent)
        self._wait_for(
            lambda: self._communicator.Iallgatherv(own, [everything, _parts(counts.tolist())]),
            operation,
            len(own),
        )
        parts = np.split(everything, np.cumsum(counts)[:-1])
        return [pickle.loads(part.tobytes()) for part in parts]

    @override
    def barrier(self) -> None:
        self._wait_for(lambda: self._communicator.Ibarrier(), "barrier", 0)

    @override
    def split(self, groups: Sequence[Sequence[int]]) -> Communicator:
        group = group_of(groups, self.rank, self.size)
        # MPI's own split has no deadline: a rank that stays away shows here.
        self.barrier()
        color = next(index for index, members in enumerate(groups) if self.rank in members)
        child = MPICommunicator(self._communicator.Split(color, self.rank), self._timeout, self.traffic)
        self._children.append(child)
        return SoloCommunicator(self.traffic, self.device) if len(group) == 1 else child

    @override
    def close(self) -> None:
        for child in self._children:
            child.close()
        self._children.clear()
        communicator, self._communicator = self._communicator, None
        if communicator is None:
            return
        if any(not pending.completed for pending in self._unfinished):
            # A rank that fails leaves collectives behind which will never complete. MPI can't take them back, and
            # would wait for them: their buffers stay, and so does the communicator.
            _abandoned.extend(self._unfinished)
            leave_without_finalizing()
        else:
            communicator.Free()
        self._unfinished.clear()

    def _start(
        self, launch: Callable[[], Any], operation: str, label: str, nbytes: int, sent: int, *tensors: Tensor
    ) -> Work:
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise CollectiveError(
                    f"{operation}: {KEY} is for tensors on the CPU, and this one is on "
                    f"{tensor.device}: write backend: torch"
                )
        self.traffic.count(label, sent)
        return self._launch(launch, operation, nbytes)

    def _wait_for(self, launch: Callable[[], Any], operation: str, nbytes: int) -> None:
        self._launch(launch, operation, nbytes).wait()

    def _launch(self, launch: Callable[[], Any], operation: str, nbytes: int) -> _PendingRequest:
        if self._communicator is None:
            raise CollectiveError(f"{operation}: the communicator is closed (KFAC.remove was called)")
        pending = _PendingRequest(f"rank {self.rank} of {self.size}: {operation} ({nbytes} bytes)", self._timeout)
        pending.start(launch, self._mpi.Exception)
        self._unfinished = [other for other in self._unfinished if not other.completed]
        self._unfinished.append(pending)
        return pending


class _PendingRequest:
    """A collective of MPI whose failure names the waiting rank, the collective and the time.

    mpi4py's request keeps the buffers alive.
    """

    def __init__(self, description: str, timeout_seconds: float) -> None:
        self._description = description
        self._timeout = timeout_seconds
        self._request: Any = None
        self._errors: type[Exception] = RuntimeError
        self._started = time.monotonic()

    def start(self, launch: Callable[[], Any], errors: type[Exception]) -> None:
        """Starts the collective; `errors` is MPI's exception type."""
        self._errors = errors
        try:
            self._request = launch()
        except errors as error:
            raise self._failure(str(error)) from error

    @property
    def completed(self) -> bool:
        """Whether it is over; asking lets MPI move data."""
        return self._request is None or self._done()

    def wait(self) -> None:
        """Waits, once; later calls return at once."""
        began = time.monotonic()
        while self._request is not None and not self._done():
            waited = time.monotonic() - began
            if waited > self._timeout:
                raise self._failure("another rank has stopped, is late, or runs another collective")
            if waited < EAGER_SECONDS:
                os.sched_yield()  # ranks may share a core
            else:
                time.sleep(PAUSE_SECONDS)

    def _done(self) -> bool:
        try:
            if not self._request.Test():
                return False
        except self._errors as error:
            raise self._failure(str(error)) from error
        self._request = None
        return True

    def _failure(self, reason: str) -> CollectiveError:
        seconds = time.monotonic() - self._started
        return CollectiveError(f"{self._description} failed after {seconds:.1f} s over MPI: {reason}")


_abandoned: list[_PendingRequest] = []


def _check_world(rank: int, size: int, torch_rank: int, torch_size: int) -> None:
    if size == 1 and torch_size > 1:
        raise ConfigError(
            f"{KEY} needs ranks that mpirun has started, but MPI knows this process alone while torch.distributed has "
            f"{torch_size} ranks: start with launch/mpirun.sh, or write backend: torch"
        )
    if (rank, size) != (torch_rank, torch_size):
        raise ConfigError(
            f"{KEY}: this process is rank {rank} of {size} in MPI, but rank {torch_rank} of {torch_size} in "
            "torch.distributed: start every rank with mpirun, and let nothing else number them"
        )


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as a numpy array."""
    plain = tensor.detach()
    return (plain.view(torch.int16) if plain.dtype in HALVES else plain).numpy()


def _parts(counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Lengths and offsets of parts that lie one behind the other."""
    return list(counts), [0, *accumulate(counts)][:-1]


@functools.cache
def _sum_of(dtype: torch.dtype) -> Any:
    """MPI's sum for a 16-bit floating-point type; MPI calls it with pieces of the two buffers."""

    def add(received: Any, total: Any, datatype: Any) -> None:
        torch.frombuffer(total, dtype=dtype).add_(torch.frombuffer(received, dtype=dtype))

    return import_mpi(KEY).Op.Create(add, commute=True)
