"""Joins the world: from the launcher's variables to a device and a process group.

rank_info.find_rank_info  rank and number of ranks       torchrun, deepspeed, srun, mpirun, or none
choose_device        NCCL and a GPU, or gloo; all ranks the same (`devices.compare`)
_join                meet at rank 0's address, with a deadline
World                the result; leaving its context leaves the process group
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from types import TracebackType
from typing import Literal, Self

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore

from kfac_dist.distributed.startup.devices import Found, compare
from kfac_dist.distributed.startup.rank_info import Launcher, RankInfo, find_rank_info
from kfac_dist.distributed.startup.rendezvous import fresh_store
from kfac_dist.errors import CollectiveError, ConfigError

# Seconds that a name server may be out of order, and between questions.
NAME_SECONDS = 10.0
NAME_PAUSE_SECONDS = 1.0
# In a store that outlives the ranks: which process was rank 0 first.
FIRST = "kfac_dist/first"
# Newer releases of torch read the first name, older ones the second.
FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}


@dataclass(frozen=True)
class World:
    """The ranks of this run, joined; leaving the context leaves the world.

    Attributes:
        info: This process's rank and launcher.
        device: Its device.
        backend: Backend of torch.distributed; None when alone, without a process group.
        owns_group: Whether `bootstrap` made the process group, and `close` destroys it.
        exported: Variables that `bootstrap` has set, and `close` takes away.
        store: The store of the rendezvous; None when alone, or when the process group existed already.
        first: The process that was rank 0 when this job's ranks first met; known to rank 0 alone, and only where the
            launcher's store outlives the ranks.
    """

    info: RankInfo
    device: torch.device
    backend: str | None
    owns_group: bool
    exported: tuple[str, ...] = ()
    store: Store | None = None
    first: str | None = None

    @property
    def restarted(self) -> bool:
        """Whether rank 0 knows that ranks of this job have met before, whether or not their launcher counts it."""
        return self.first is not None and self.first != _this_process()

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.info.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.info.world_size

    @property
    def local_rank(self) -> int:
        """Rank within the node."""
        return self.info.local_rank

    @property
    def local_world_size(self) -> int:
        """Ranks on this node."""
        return self.info.local_world_size

    def describe(self) -> str:
        """One line: number of ranks, nodes, launcher and backend."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        if self.backend is None:
            return f"1 process on {name}"
        nodes = -(-self.world_size // self.local_world_size)
        return (
            f"{_count(self.world_size, 'rank')} on {_count(nodes, 'node')} ({self.info.launcher}), "
            f"{self.backend} on {name}"
        )

    def close(self) -> None:
        """Leaves the process group, if `bootstrap` joined it."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()
        for name in self.exported:
            os.environ.pop(name, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.info.launcher is Launcher.MPI:
            from kfac_dist.distributed.startup.mpi import leave_without_finalizing

            leave_without_finalizing()
        self.close()


def bootstrap(device: Literal["auto", "cpu", "cuda"], timeout_seconds: float) -> World:
    """Joins the ranks that the launcher started; a process without a launcher is alone and needs no process group.

    With CUDA the backend is NCCL and each rank takes the GPU of its local rank, else it is gloo. `auto` uses CUDA where
    there are GPUs. A process group that exists already is used as it is. Under every
    launcher, RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set until the world is
    closed.

    Args:
        device: The device of this rank.
        timeout_seconds: Timeout of a collective, and of the rendezvous.

    Raises:
        ConfigError: The launcher's variables are incomplete, malformed or contradict each other; on every rank: a node
            has GPUs, or was to have some, but not one for each of its ranks, or only some of the nodes have any.
        CollectiveError: The ranks did not meet in time.
    """
    info = find_rank_info(os.environ)
    if dist.is_available() and dist.is_initialized():
        return _joined_already(info, device)
    if info.launcher is Launcher.MPI:
        from kfac_dist.distributed.startup.mpi import meet_over_mpi

        info = meet_over_mpi(info)
    if info.address is None:
        return World(info, _take_device(device, info), None, owns_group=False)
    chosen, problem = torch.device("cpu"), ""
    try:
        chosen = _take_device(device, info)
    except ConfigError as error:  # the other ranks would wait for this one, and must know of it
        problem = str(error)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if backend == "nccl":
        _record_flights()
    found = Found(backend, socket.gethostname(), _gpus(device), problem)
    store, first = _join(info, info.address, found, timeout_seconds)
    return World(info, chosen, backend, owns_group=True, exported=_export(info), store=store, first=first)


def _record_flights() -> None:
    """Have NCCL's watchdog write down the last collectives of every rank when one of them times out.

    Variables set by the user stay. The dumps go to TORCH_NCCL_DEBUG_INFO_TEMP_FILE, a path that gets the rank appended.
    """
    for name, value in FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value)


def _joined_already(info: RankInfo, device: Literal["auto", "cpu", "cuda"]) -> World:
    if (dist.get_rank(), dist.get_world_size()) != (info.rank, info.world_size):
        raise ConfigError(
            f"this process is rank {dist.get_rank()} of {dist.get_world_size()} in torch.distributed, but "
            f"rank {info.rank} of {info.world_size} in its environment ({info.launcher})"
        )
    return World(info, _take_device(device, info), dist.get_backend(), owns_group=False)


def _export(info: RankInfo) -> tuple[str, ...]:
    """Sets torchrun's variables; returns the names of those that were missing."""
    missing = {name: text for name, text in info.exports().items() if name not in os.environ}
    os.environ.update(missing)
    return tuple(missing)


def _take_device(device: Literal["auto", "cpu", "cuda"], info: RankInfo) -> torch.device:
    chosen = choose_device(device, info)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def choose_device(device: Literal["auto", "cpu", "cuda"], info: RankInfo) -> torch.device:
    """The device of a rank.

    Raises:
        ConfigError: This node has fewer GPUs than ranks, but `cuda` was asked for, or it has some.
    """
    gpus = _gpus(device)
    if gpus and info.own_gpus:
        return torch.device("cuda", 0)
    if gpus >= info.local_world_size:
        return torch.device("cuda", info.local_rank)
    if device == "cuda":
        raise ConfigError(
            f"run.device: cuda needs a GPU for each of the {info.local_world_size} ranks of this node, which has "
            f"{gpus}: start fewer ranks, or set run.device to cpu"
        )
    if gpus:
        raise ConfigError(
            f"run.device: auto finds {_count(gpus, 'GPU')} for the {info.local_world_size} ranks of this node: start "
            f"{_count(gpus, 'rank')} a node, or set run.device=cpu"
        )
    return torch.device("cpu")


def _gpus(device: Literal["auto", "cpu", "cuda"]) -> int:
    return torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0


def _join(info: RankInfo, address: tuple[str, int], found: Found, timeout_seconds: float) -> tuple[Store, str | None]:
    """The store in which the ranks have met, and which process was rank 0 first."""
    timeout = timedelta(seconds=timeout_seconds)
    host, port = address
    _check_name(info, host, min(timeout_seconds, NAME_SECONDS))
    try:
        store, first = _store(info, host, port, timeout)
        compare(store, info.rank, info.world_size, found)
        dist.init_process_group(found.backend, store=store, rank=info.rank, world_size=info.world_size, timeout=timeout)
        return store, first
    except RuntimeError as error:  # torch's store, socket and timeout errors all derive from it
        raise CollectiveError(
            f"rank {info.rank} of {info.world_size} did not meet the others at {host}:{port} "
            f"(MASTER_ADDR, MASTER_PORT) within {timeout_seconds:g} s: {error}"
        ) from error


def _check_name(info: RankInfo, host: str, seconds: float) -> None:
    """A host without an address is an error at once: torch would look for it until the timeout, a page a try."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() + NAME_PAUSE_SECONDS > deadline:
                raise CollectiveError(
                    f"rank {info.rank} of {info.world_size} finds no address of {host!r}, where the ranks shall meet "
                    f"({info.launcher}): {error}; set MASTER_ADDR to a name or an address that every node knows"
                ) from error
        time.sleep(NAME_PAUSE_SECONDS)


def _store(info: RankInfo, host: str, port: int, timeout: timedelta) -> tuple[Store, str | None]:
    """The store that rank 0 serves, or torchrun's agent: that one outlives its workers, and tells of the first."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        agents = TCPStore(host, port, world_size=info.world_size, is_master=False, timeout=timeout)
        first = agents.compare_set(FIRST, "", _this_process()).decode() if info.rank == 0 else None
        return fresh_store(agents, info.rank, info.world_size, timeout), first
    # multi_tenant: other users of the same variables in this process (DeepSpeed, say) share rank 0's server.
    store = TCPStore(
        host, port, world_size=info.world_size, is_master=info.rank == 0, timeout=timeout, multi_tenant=True
    )
    return store, None


@cache
def _this_process() -> str:
    """A name that no other process has; made when it is asked for, so that forks don't share it."""
    return uuid.uuid4().hex


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
