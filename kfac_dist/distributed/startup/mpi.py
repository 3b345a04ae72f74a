"""MPI itself: how mpi4py is imported, how the job's ranks agree on where to meet, and how the job ends.

mpi4py starts MPI when it is imported and ends it when Python exits. An orderly end is collective: a rank that failed
would wait in it for ranks that still wait for its part of a collective. So a failed rank skips it, and the launcher,
which sees a rank leave without it, ends the others at once, as torchrun's agent does.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
from dataclasses import replace
from typing import Any

from kfac_dist.distributed.startup.rank_info import Launcher, RankInfo, master_port
from kfac_dist.errors import ConfigError

LOCALHOST = "127.0.0.1"

_ending: list[bool] = []  # holds one entry once this module is in charge of MPI's end: whether it shall be orderly


def import_mpi(wanted_by: str) -> Any:
    """Import mpi4py's MPI, which starts MPI.

    Args:
        wanted_by: The option that needs it, for the message: "distribution.backend: mpi", "mpirun".

    Raises:
        ConfigError: mpi4py is not installed, or finds no MPI library.
    """
    try:
        import mpi4py
    except ImportError as error:
        raise ConfigError(
            f"{wanted_by} needs mpi4py, which is not installed: pip install 'kfac_dist[mpi]', beside the MPI library "
            "of this cluster"
        ) from error
    fresh = "mpi4py.MPI" not in sys.modules
    if fresh:
        mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"{wanted_by} needs an MPI library that mpi4py can load ({error}): load the cluster's MPI module, or "
            "pip install mpich"
        ) from error
    if fresh:
        _ending.append(True)
        atexit.register(_finalize)
    return MPI


def leave_without_finalizing() -> None:
    """Say that this rank failed: at its end it doesn't wait, and mpirun ends the others."""
    _ending[:] = [False] * len(_ending)


def _finalize() -> None:
    # Python sets last_value when an exception ends the program.
    if _ending != [True] or hasattr(sys, "last_value"):
        return
    from mpi4py import MPI

    if not MPI.Is_finalized():
        MPI.Finalize()


def meet_over_mpi(info: RankInfo) -> RankInfo:
    """The place as MPI itself tells it, with the address and a free port that rank 0 broadcasts; collective.

    MASTER_ADDR and MASTER_PORT of rank 0's environment, where they are set, choose another interface or port.

    Raises:
        ConfigError: mpi4py is missing, or belongs to another MPI than the mpirun that started this process.
    """
    mpi = import_mpi("mpirun")
    world = mpi.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (info.rank, info.world_size):
        raise ConfigError(
            f"mpirun started this process as rank {info.rank} of {info.world_size}, but mpi4py sees rank "
            f"{world.Get_rank()} of {world.Get_size()}: it uses another MPI library than this mpirun; start with the "
            f"mpirun beside it, or rebuild it for this one: pip install --force-reinstall --no-binary mpi4py mpi4py"
        )
    node = world.Split_type(mpi.COMM_TYPE_SHARED)
    local_rank, local_size = node.Get_rank(), node.Get_size()
    node.Free()
    own = _own_address(alone_on_node=local_size == info.world_size) if info.rank == 0 else None
    address: tuple[str, int] = world.bcast(own)
    return replace(info, launcher=Launcher.MPI, local_rank=local_rank, local_world_size=local_size, address=address)


def _own_address(*, alone_on_node: bool) -> tuple[str, int]:
    host = os.environ.get("MASTER_ADDR") or (LOCALHOST if alone_on_node else socket.gethostname())
    if os.environ.get("MASTER_PORT"):
        return host, master_port(os.environ)
    with socket.socket() as free:
        free.bind(("", 0))
        return host, int(free.getsockname()[1])
