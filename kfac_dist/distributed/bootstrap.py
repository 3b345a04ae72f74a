"""Who am I among which ranks: reads the launcher's variables, joins the world, picks the device.

One function per launcher turns its variables into a `Place`; the first that finds its own wins, and a process that
nobody launched is alone. What follows (device, rendezvous, process group) is the same for all of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Literal, Self

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from kfac_dist.errors import CollectiveError, ConfigError


@dataclass(frozen=True)
class Place:
    """A process's place among the ranks, as its launcher tells it.

    Attributes:
        launcher: Who told.
        rank: Global rank.
        world_size: Number of ranks.
        local_rank: Rank within the node.
        local_world_size: Ranks on this node.
        address: Host and port where the ranks meet; None when alone.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: tuple[str, int] | None


@dataclass(frozen=True)
class World:
    """The ranks of this run, joined; leaving the context leaves the world.

    Attributes:
        place: Where this process stands.
        device: What it computes on.
        backend: Backend of torch.distributed; None when alone, without a process group.
        owns_group: Whether `bootstrap` made the process group, and `close` destroys it.
    """

    place: Place
    device: torch.device
    backend: str | None
    owns_group: bool

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.place.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.place.world_size

    @property
    def local_rank(self) -> int:
        """Rank within the node."""
        return self.place.local_rank

    @property
    def local_world_size(self) -> int:
        """Ranks on this node."""
        return self.place.local_world_size

    def describe(self) -> str:
        """One line: how many ranks, where, over what."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        if self.backend is None:
            return f"1 process on {name}"
        nodes = -(-self.world_size // self.local_world_size)
        return (
            f"{_count(self.world_size, 'rank')} on {_count(nodes, 'node')} ({self.place.launcher}), "
            f"{self.backend} on {name}"
        )

    def close(self) -> None:
        """Leaves the process group, if `bootstrap` joined it."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def bootstrap(device: Literal["auto", "cpu", "cuda"], timeout_seconds: float) -> World:
    """Joins the ranks that the launcher started; a process without a launcher is alone and needs no process group.

    With CUDA the backend is NCCL and each rank takes the GPU of its local rank, else it is gloo. `auto` uses CUDA when
    the node has a GPU for each of its ranks. A process group that exists already is used as it is.

    Args:
        device: What to compute on.
        timeout_seconds: How long a collective, and the meeting of the ranks, may take.

    Raises:
        ConfigError: The launcher's variables are incomplete, malformed or contradict each other, or CUDA was asked for
            and there is no GPU for this rank.
        CollectiveError: The ranks did not meet in time.
    """
    place = find_place(os.environ)
    chosen = choose_device(device, place)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if dist.is_available() and dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (place.rank, place.world_size):
            raise ConfigError(
                f"this process is rank {dist.get_rank()} of {dist.get_world_size()} in torch.distributed, but "
                f"RANK={place.rank} and WORLD_SIZE={place.world_size} in its environment"
            )
        return World(place, chosen, dist.get_backend(), owns_group=False)
    if place.address is None:
        return World(place, chosen, None, owns_group=False)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    _join(place, place.address, backend, timeout_seconds)
    return World(place, chosen, backend, owns_group=True)


def find_place(environment: Mapping[str, str]) -> Place:
    """The place that the environment's variables tell.

    Raises:
        ConfigError: The variables are incomplete, malformed, or contradict each other.
    """
    for find in (_torchrun,):  # one function per launcher
        place = find(environment)
        if place is not None:
            return place
    return Place("alone", rank=0, world_size=1, local_rank=0, local_world_size=1, address=None)


def choose_device(device: Literal["auto", "cpu", "cuda"], place: Place) -> torch.device:
    """The device of a rank.

    Raises:
        ConfigError: `cuda` was asked for, and this node has no GPU for this rank.
    """
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if gpus >= place.local_world_size:
        return torch.device("cuda", place.local_rank)
    if device == "cuda":
        raise ConfigError(
            f"run.device: cuda needs a GPU for each of the {place.local_world_size} ranks of this node, which has "
            f"{gpus}: start fewer ranks, or set run.device to cpu"
        )
    return torch.device("cpu")


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _torchrun(environment: Mapping[str, str]) -> Place | None:
    """What torchrun exports; RANK or WORLD_SIZE alone is already a claim to have been launched."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    present = [name for name in _TORCHRUN if environment.get(name)]
    missing = [name for name in _TORCHRUN if name not in present]
    if missing:
        raise ConfigError(
            f"{' and '.join(present) or 'RANK'} set, but {' and '.join(missing)} not: start the ranks with torchrun, "
            "which sets all of them, or unset these to run one process"
        )
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE", least=1)
    local_rank = _number(environment, "LOCAL_RANK")
    local_world_size = _number(environment, "LOCAL_WORLD_SIZE", least=1)
    for small, relation, great, holds in (
        ("RANK", "less than", "WORLD_SIZE", rank < world_size),
        ("LOCAL_RANK", "less than", "LOCAL_WORLD_SIZE", local_rank < local_world_size),
        ("LOCAL_WORLD_SIZE", "at most", "WORLD_SIZE", local_world_size <= world_size),
        ("LOCAL_RANK", "at most", "RANK", local_rank <= rank),
    ):
        if not holds:
            raise ConfigError(
                f"{small}={environment[small]} contradicts {great}={environment[great]}: {small} must be {relation} "
                f"{great}; start the ranks with torchrun, which sets both"
            )
    port = _number(environment, "MASTER_PORT", least=1)
    if port > 65535:
        raise ConfigError(f"MASTER_PORT={port} is no port: expected 1 to 65535")
    return Place("torchrun", rank, world_size, local_rank, local_world_size, (environment["MASTER_ADDR"], port))


def _number(environment: Mapping[str, str], name: str, least: int = 0) -> int:
    text = environment[name]
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ConfigError(f"{name}={text!r} in the environment: expected a whole number of at least {least}")
    return number


def _join(place: Place, address: tuple[str, int], backend: str, timeout_seconds: float) -> None:
    timeout = timedelta(seconds=timeout_seconds)
    host, port = address
    try:
        store = _restart_store(place, host, port, timeout)
        if store is None:
            dist.init_process_group(backend, init_method="env://", timeout=timeout)
        else:
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)
    except RuntimeError as error:  # torch's store, socket and timeout errors all derive from it
        raise CollectiveError(
            f"rank {place.rank} of {place.world_size} did not meet the others at {host}:{port} "
            f"(MASTER_ADDR, MASTER_PORT) within {timeout_seconds:g} s: {error}"
        ) from error


def _restart_store(place: Place, host: str, port: int, timeout: timedelta) -> Store | None:
    """A store of its own for every restart of torchrun's workers; None where torch's own rendezvous is right.

    torchrun keeps one store over restarts, so that restarted workers would read the addresses of dead ones and fail to
    connect (torch 2.13, gloo). A prefix by the restart count parts them. Over several nodes it can't: each agent counts
    its own failures, and the counts differ. There TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 does it, which launchers set.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or place.local_world_size != place.world_size:
        return None
    store = TCPStore(host, port, world_size=place.world_size, is_master=False, timeout=timeout)
    return PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
