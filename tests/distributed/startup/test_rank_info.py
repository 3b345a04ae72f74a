from __future__ import annotations

import subprocess
import sys

import pytest

from kfac_dist.distributed.startup.rank_info import Launcher, RankInfo, find_rank_info
from kfac_dist.errors import ConfigError

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "GROUP_WORLD_SIZE": "2",
}
BY_HAND = {name: text for name, text in TORCHRUN.items() if name not in ("TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE")}
TORCHRUN_INFO = RankInfo(
    Launcher.TORCHRUN, rank=1, world_size=4, local_rank=1, local_world_size=2, address=("localhost", 29500)
)

# As `srun -n 3` sets them on two nodes of a job with room for four, in SLURM 22.05.
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[1-3]",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "3",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "node[2-3]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
SRUN_INFO = RankInfo(Launcher.SLURM, 1, 3, 1, 2, ("node2", 12_000 + 7 * 41 + 2 * 7))

HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPI_INFO = RankInfo(Launcher.MPI, 1, 4, 1, 2, None)
# As DeepSpeed's launcher sets them on its node 0 of two.
DEEPSPEED = {
    **{name: text for name, text in BY_HAND.items() if name != "LOCAL_WORLD_SIZE"},
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "2",
}


@pytest.mark.parametrize(
    ("environment", "info"),
    [
        (TORCHRUN, TORCHRUN_INFO),
        (BY_HAND, RankInfo(Launcher.ENVIRONMENT, 1, 4, 1, 2, ("localhost", 29500))),
        (DEEPSPEED, RankInfo(Launcher.DEEPSPEED, 1, 4, 1, 2, ("localhost", 29500))),
        (SRUN, SRUN_INFO),
        (HYDRA, MPI_INFO),
        (OPEN_MPI, MPI_INFO),
        ({"LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}, RankInfo(Launcher.NOBODY, 0, 1, 0, 1, None)),
    ],
    ids=["torchrun", "by hand", "deepspeed", "srun", "hydra", "open mpi", "nobody"],
)
def test_each_launcher_tells_the_rank_info(environment: dict[str, str], info: RankInfo) -> None:
    assert find_rank_info({**environment, "HOME": "/"}) == info


@pytest.mark.parametrize(
    ("environment", "info"),
    [
        # srun or mpirun starts one torchrun agent a node; an elastic one has lost a node of three.
        ({**TORCHRUN, **SRUN, "SLURM_PROCID": "2"}, TORCHRUN_INFO),
        ({**TORCHRUN, "PMI_RANK": "0", "PMI_SIZE": "2"}, TORCHRUN_INFO),
        # srun starts DeepSpeed's launcher once, which reaches its nodes by itself.
        ({**DEEPSPEED, **SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, find_rank_info(DEEPSPEED)),
        # srun that speaks PMI; mpirun that reached its two nodes by srun.
        ({**SRUN, "PMI_RANK": "1", "PMI_SIZE": "3"}, SRUN_INFO),
        ({**HYDRA, **SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, MPI_INFO),
        # What `bootstrap` exported under mpirun, and is read once more.
        ({**HYDRA, **BY_HAND}, RankInfo(Launcher.ENVIRONMENT, 1, 4, 1, 2, ("localhost", 29500))),
        # The batch script and a shell of salloc's are no tasks of srun's.
        (
            {name: text for name, text in SRUN.items() if "STEP" not in name},
            RankInfo(Launcher.NOBODY, 0, 1, 0, 1, None),
        ),
        ({**SRUN, "SLURM_STEP_ID": "4294967290"}, RankInfo(Launcher.NOBODY, 0, 1, 0, 1, None)),
    ],
)
def test_launchers_nest(environment: dict[str, str], info: RankInfo) -> None:
    assert find_rank_info(environment) == info


def test_scripts_may_choose_where_srun_s_tasks_meet() -> None:
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000", "WORLD_SIZE": "3"}
    assert find_rank_info(SRUN | chosen).address == ("10.0.0.1", 5000)


def test_jobs_steps_and_restarts_meet_at_different_ports() -> None:
    starts = [
        {**SRUN, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_RESTART_COUNT": restart}
        for job in ("9", "10", "4000000000")
        for step in ("0", "1")
        for restart in ("0", "1")
    ]
    ports = [info.address[1] for info in map(find_rank_info, starts) if info.address is not None]
    assert len(set(ports)) == 12
    assert all(12_000 <= port < 32_000 for port in ports)


def test_gpus_bound_by_slurm_are_counted_from_zero() -> None:
    assert find_rank_info({**SRUN, "SLURM_GPUS_PER_TASK": "1"}).own_gpus


@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        (TORCHRUN, {"WORLD_SIZE": None}, "RANK and LOCAL_RANK and .* set, but WORLD_SIZE not"),
        (TORCHRUN, {"RANK": None}, "WORLD_SIZE and LOCAL_RANK and .* set, but RANK not"),
        (TORCHRUN, {"LOCAL_RANK": None, "MASTER_ADDR": ""}, "set, but LOCAL_RANK and MASTER_ADDR not"),
        (TORCHRUN, {"RANK": "one"}, "RANK='one' in the environment: expected a whole number of at least 0"),
        (TORCHRUN, {"RANK": "-1"}, "RANK='-1' in the environment"),
        (TORCHRUN, {"WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the environment: expected a whole number of at least 1"),
        (TORCHRUN, {"RANK": "4"}, "RANK=4 contradicts WORLD_SIZE=4: RANK must be less than WORLD_SIZE"),
        (TORCHRUN, {"LOCAL_RANK": "2", "RANK": "2"}, "LOCAL_RANK=2 contradicts LOCAL_WORLD_SIZE=2"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5 contradicts WORLD_SIZE=4: .* must be at most"),
        (TORCHRUN, {"RANK": "0"}, "LOCAL_RANK=1 contradicts RANK=0: LOCAL_RANK must be at most RANK"),
        (TORCHRUN, {"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        (TORCHRUN, {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        (DEEPSPEED, {"LOCAL_SIZE": "1"}, "LOCAL_RANK=1 contradicts LOCAL_SIZE=1"),
        (
            TORCHRUN | HYDRA,
            {"WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"},
            r"PMI_RANK=1 and PMI_SIZE=4 \(mpirun\) contradict RANK=1 and WORLD_SIZE=2 \(torchrun\)",
        ),
        (HYDRA | BY_HAND, {"RANK": "2"}, r"PMI_RANK=1 and PMI_SIZE=4 \(mpirun\) contradict RANK=2 and WORLD_SIZE=4"),
        (BY_HAND | SRUN, {}, r"SLURM_PROCID=1 and SLURM_STEP_NUM_TASKS=3 \(srun\) contradict RANK=1 and WORLD_SIZE=4"),
        (HYDRA, {"PMI_RANK": "4"}, "PMI_RANK=4 contradicts PMI_SIZE=4"),
        (OPEN_MPI, {"WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK=1 and .*SIZE=4 .* contradict WORLD_SIZE=2"),
        (SRUN, {"SLURM_PROCID": "3"}, "SLURM_PROCID=3 contradicts SLURM_STEP_NUM_TASKS=3"),
        (SRUN, {"WORLD_SIZE": "4"}, r"SLURM_PROCID=1 and .*=3 \(srun\) contradict WORLD_SIZE=4"),
        (SRUN, {"SLURM_LOCALID": "2"}, "SLURM_LOCALID=2 contradict '2,1' tasks on each node"),
        (SRUN, {"SLURM_LOCALID": None}, "SLURM_LOCALID is not set"),
        (SRUN, {"SLURM_STEP_TASKS_PER_NODE": "many"}, "'many' is no list of tasks per node"),
        (SRUN, {"SLURM_STEP_NODELIST": "[1-2"}, r"'\[1-2' is no node list of SLURM's.*: set MASTER_ADDR"),
    ],
)
def test_contradictions_name_both_sides(
    environment: dict[str, str], changes: dict[str, str | None], message: str
) -> None:
    changed = {name: text for name, text in (environment | changes).items() if text is not None}
    with pytest.raises(ConfigError, match=message):
        find_rank_info(changed)


def test_exports_lead_back_to_the_same_place() -> None:
    again = find_rank_info(SRUN_INFO.exports() | SRUN)
    assert (again.rank, again.world_size, again.local_rank, again.local_world_size, again.address) == (
        SRUN_INFO.rank,
        SRUN_INFO.world_size,
        SRUN_INFO.local_rank,
        SRUN_INFO.local_world_size,
        SRUN_INFO.address,
    )


def test_the_place_is_found_without_torch() -> None:
    module = "kfac_dist.distributed.startup.rank_info"
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'mpi4py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
