"""Rank discovery: one function for each launcher turns its environment variables into a `RankInfo`.

    torchrun, deepspeed   RANK, WORLD_SIZE, LOCAL_RANK, …, MASTER_ADDR, MASTER_PORT: complete, and believed
    mpirun                the rank's numbers; where to meet is agreed on over MPI itself (`mpi.meet_over_mpi`)
    srun                  SLURM's variables of the step; the first node is where to meet
    none                  alone

The innermost launcher wins, because launchers nest: srun or mpirun may start one torchrun agent a node, and mpirun may
use srun to reach its nodes. What the outer one says must then fit: as many tasks as ranks, or as nodes, or one.
Nothing here imports torch, so that a command line can find its place in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from kfac_dist.distributed.startup.slurm_notation import first_host, tasks_per_node
from kfac_dist.errors import ConfigError

Environment = Mapping[str, str]


class Launcher(StrEnum):
    """The launcher that started a process and set its rank."""

    TORCHRUN = "torchrun"
    DEEPSPEED = "deepspeed"
    ENVIRONMENT = "environment"
    MPI = "mpirun"
    SLURM = "srun"
    NOBODY = "alone"


@dataclass(frozen=True)
class RankInfo:
    """Rank, number of ranks and addresses of this process, as its launcher tells them.

    Attributes:
        launcher: Launcher that set it.
        rank: Global rank.
        world_size: Number of ranks.
        local_rank: Rank within the node.
        local_world_size: Ranks on this node.
        address: Host and port where the ranks meet; None when alone, or not agreed on yet (mpirun).
        own_gpus: Whether the launcher shows this rank its own GPUs only, counted from 0.
    """

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: tuple[str, int] | None
    own_gpus: bool = False

    def exports(self) -> dict[str, str]:
        """Itself in torchrun's variables, for DeepSpeed and for users' code."""
        variables: dict[str, int | str] = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_world_size,
        }
        if self.address is not None:
            variables |= {"MASTER_ADDR": self.address[0], "MASTER_PORT": self.address[1]}
        return {name: str(value) for name, value in variables.items()}


@dataclass(frozen=True)
class LauncherClaim:
    """A launcher's word about a process: which of how many tasks it is, and the variables that say so."""

    launcher: Launcher
    task: int
    tasks: int
    names: tuple[str, str]

    def __str__(self) -> str:
        return f"{self.names[0]}={self.task} and {self.names[1]}={self.tasks} ({self.launcher})"


def find_rank_info(environment: Environment) -> RankInfo:
    """The rank info that the environment's variables tell.

    Raises:
        ConfigError: The variables are incomplete, malformed, or contradict each other.
    """
    mpi, slurm = _mpi_claim(environment), _slurm_claim(environment)
    outer = [claim for claim in (mpi, slurm) if claim is not None]
    # srun that speaks PMI to MPI programs sets MPI's variables too, to the same numbers.
    only_slurm = slurm is not None and (mpi is None or (mpi.task, mpi.tasks) == (slurm.task, slurm.tasks))
    if "RANK" in environment or ("WORLD_SIZE" in environment and not outer):
        info = _exported(environment)
        for claim in outer:
            _check_nesting(environment, info, claim)
        return info
    if slurm is not None and only_slurm:
        _check_same_size(environment, slurm)
        return _slurm_place(environment, slurm)
    if mpi is not None:
        _check_same_size(environment, mpi)
        return _mpi_place(environment, mpi)
    return RankInfo(Launcher.NOBODY, rank=0, world_size=1, local_rank=0, local_world_size=1, address=None)


# ------------------------------------------------------------------- torchrun, DeepSpeed's launcher, or by hand


def _exported(environment: Environment) -> RankInfo:
    """Read torchrun's variables; RANK or WORLD_SIZE alone is already a claim to have been launched."""
    launcher, local_size = Launcher.ENVIRONMENT, "LOCAL_WORLD_SIZE"
    if "TORCHELASTIC_RUN_ID" in environment:
        launcher = Launcher.TORCHRUN
    elif not environment.get(local_size) and environment.get("CROSS_SIZE"):
        launcher, local_size = Launcher.DEEPSPEED, "LOCAL_SIZE"
    required = ("RANK", "WORLD_SIZE", "LOCAL_RANK", local_size, "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in required if environment.get(name)]
    missing = [name for name in required if name not in present]
    if missing:
        raise ConfigError(
            f"{' and '.join(present) or 'RANK'} set, but {' and '.join(missing)} not: start the ranks with torchrun, "
            "which sets all of them, or unset these to run one process"
        )
    rank, world_size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE", least=1)
    local_rank = _number(environment, "LOCAL_RANK")
    local_world_size = _number(environment, local_size, least=1)
    for small, relation, great, holds in (
        ("RANK", "less than", "WORLD_SIZE", rank < world_size),
        ("LOCAL_RANK", "less than", local_size, local_rank < local_world_size),
        (local_size, "at most", "WORLD_SIZE", local_world_size <= world_size),
        ("LOCAL_RANK", "at most", "RANK", local_rank <= rank),
    ):
        if not holds:
            raise ConfigError(
                f"{small}={environment[small]} contradicts {great}={environment[great]}: {small} must be {relation} "
                f"{great}; start the ranks with torchrun, which sets both"
            )
    return RankInfo(
        launcher, rank, world_size, local_rank, local_world_size, (environment["MASTER_ADDR"], master_port(environment))
    )


def _check_nesting(environment: Environment, info: RankInfo, outer: LauncherClaim) -> None:
    """An outer launcher's tasks are these ranks, or their nodes' agents, or the one process that reached for them."""
    if info.launcher is Launcher.TORCHRUN:
        if outer.launcher is Launcher.SLURM:  # an elastic job may have lost or gained nodes since
            return
        nodes = environment.get("GROUP_WORLD_SIZE", "")
    else:
        nodes = str(-(-info.world_size // info.local_world_size))
    same_ranks = (info.rank, info.world_size) == (outer.task, outer.tasks)
    if not same_ranks and outer.tasks != 1 and str(outer.tasks) != nodes:
        raise ConfigError(
            f"{outer} contradict RANK={info.rank} and WORLD_SIZE={info.world_size} ({info.launcher}): one launcher "
            f"has to number the ranks; unset the variables that are left over, or let {outer.launcher} start one "
            f"agent on each node"
        )


def _check_same_size(environment: Environment, claim: LauncherClaim) -> None:
    """Scripts often export WORLD_SIZE themselves, for srun's tasks to read."""
    if environment.get("WORLD_SIZE") and _number(environment, "WORLD_SIZE") != claim.tasks:
        raise ConfigError(
            f"{claim} contradict WORLD_SIZE={environment['WORLD_SIZE']}: {claim.launcher} has started {claim.tasks} "
            "ranks; unset WORLD_SIZE, or start as many ranks as it says"
        )


# --------------------------------------------------------------------------------------------------- mpirun

# Open MPI; MPICH, Intel MPI and all that start through Hydra; MVAPICH.
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)


def _mpi_claim(environment: Environment) -> LauncherClaim | None:
    for rank, size, *_ in _MPI:
        if rank in environment and size in environment:
            return _claim(environment, Launcher.MPI, rank, size)
    return None


def _mpi_place(environment: Environment, claim: LauncherClaim) -> RankInfo:
    local_rank, local_size = next((local, size) for rank, _, local, size in _MPI if rank == claim.names[0])
    return RankInfo(
        Launcher.MPI,
        claim.task,
        claim.tasks,
        _number(environment, local_rank) if local_rank in environment else 0,
        _number(environment, local_size, least=1) if local_size in environment else 1,
        address=None,
    )


# ----------------------------------------------------------------------------------------------------- srun

# Ids from here on are no steps of srun's, but SLURM's own: the batch script, an interactive shell, an ssh session.
_SPECIAL_STEPS = 0xFFFFFFF0
# Below the ports from which systems number outgoing connections, so that none of these takes ours.
_FIRST_PORT, _PORTS = 12_000, 20_000


def _slurm_claim(environment: Environment) -> LauncherClaim | None:
    """Read srun's variables of a task; a batch script, which is not srun's task, has some of the same."""
    if "SLURM_PROCID" not in environment or _number(environment, "SLURM_STEP_ID", default=_SPECIAL_STEPS) >= (
        _SPECIAL_STEPS
    ):
        return None
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    if size not in environment:
        raise ConfigError(f"SLURM_PROCID and SLURM_STEP_ID set, but {size} not: start the ranks with srun")
    return _claim(environment, Launcher.SLURM, "SLURM_PROCID", size)


def _slurm_place(environment: Environment, claim: LauncherClaim) -> RankInfo:
    host = environment.get("MASTER_ADDR") or first_host(_step_or_job(environment, "NODELIST"))
    return RankInfo(
        Launcher.SLURM,
        claim.task,
        claim.tasks,
        _number(environment, "SLURM_LOCALID"),
        _tasks_here(environment, claim),
        (host, master_port(environment) if environment.get("MASTER_PORT") else _port_of_step(environment)),
        own_gpus="SLURM_GPUS_PER_TASK" in environment,
    )


def _tasks_here(environment: Environment, claim: LauncherClaim) -> int:
    counts = tasks_per_node(_step_or_job(environment, "TASKS_PER_NODE"))
    node = _number(environment, "SLURM_NODEID")
    local = _number(environment, "SLURM_LOCALID")
    if sum(counts) != claim.tasks or node >= len(counts) or local >= counts[node]:
        raise ConfigError(
            f"SLURM_NODEID={node} and SLURM_LOCALID={local} contradict {_step_or_job(environment, 'TASKS_PER_NODE')!r} "
            f"tasks on each node (SLURM_STEP_TASKS_PER_NODE) and {claim}: start the ranks with srun, which sets all"
        )
    return counts[node]


def _port_of_step(environment: Environment) -> int:
    """The same port on every node, and another one for every job, step and restart that may share a node."""
    job = _number(environment, "SLURM_JOB_ID")
    step = _number(environment, "SLURM_STEP_ID")
    restart = _number(environment, "SLURM_RESTART_COUNT", default=0)
    return _FIRST_PORT + (job * 41 + step * 7 + restart) % _PORTS


def _step_or_job(environment: Environment, name: str) -> str:
    candidates = (f"SLURM_STEP_{name}", f"SLURM_JOB_{name}", f"SLURM_{name}")
    for candidate in candidates:
        if environment.get(candidate):
            return environment[candidate]
    raise ConfigError(f"SLURM_PROCID set, but {candidates[0]} not: start the ranks with srun")


# -------------------------------------------------------------------------------------------------- numbers


def _claim(environment: Environment, launcher: Launcher, rank: str, size: str) -> LauncherClaim:
    claim = LauncherClaim(launcher, _number(environment, rank), _number(environment, size, least=1), (rank, size))
    if claim.task >= claim.tasks:
        raise ConfigError(
            f"{rank}={claim.task} contradicts {size}={claim.tasks}: {rank} must be less than {size}; start the ranks "
            f"with {launcher}, which sets both"
        )
    return claim


def master_port(environment: Environment) -> int:
    """The port where the ranks meet.

    Raises:
        ConfigError: MASTER_PORT is no port.
    """
    port = _number(environment, "MASTER_PORT", least=1)
    if port > 65535:
        raise ConfigError(f"MASTER_PORT={port} is no port: expected 1 to 65535")
    return port


def _number(environment: Environment, name: str, least: int = 0, default: int | None = None) -> int:
    if name not in environment:
        if default is not None:
            return default
        raise ConfigError(f"{name} is not set, which the launcher should have done: start the ranks with it again")
    text = environment[name]
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ConfigError(f"{name}={text!r} in the environment: expected a whole number of at least {least}")
    return number
