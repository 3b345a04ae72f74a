"""Ranks end with the launcher's process that started them, and without a launcher with none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

import pytest

from kfac_dist.distributed.startup.agents import line_to_agent
from kfac_dist.distributed.startup.rank_info import Launcher, RankInfo
from kfac_dist.processes import process

RANK = (
    "import os, sys, time\n"
    "from kfac_dist.distributed.startup.agents import AgentWatch\n"
    "from kfac_dist.distributed.startup.rank_info import find_rank_info\n"
    "with AgentWatch(find_rank_info(os.environ), tick_seconds=0.05):\n"
    "    print(os.getpid(), flush=True)\n"
    "    time.sleep(float(sys.argv[1]))\n"
    "print('trained on', flush=True)\n"
)
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "7",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}
MPI = {"PMI_RANK": "0", "PMI_SIZE": "2"}
SRUN = {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "7",
    "SLURM_NODEID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "here",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}


def _agent(variables: Mapping[str, str], seconds: float, wrapper: bool = False) -> subprocess.Popen[str]:
    """Start a process that starts a rank, perhaps by a shell that stays between them."""
    rank = [sys.executable, "-c", RANK, str(seconds)]
    if wrapper:
        rank = ["bash", "-c", '"$@"; exit', "wrapper", *rank]
    program = (
        "import json, os, subprocess, sys\n"
        "subprocess.Popen(json.loads(sys.argv[1]), env={**os.environ, **json.loads(sys.argv[2])}, "
        "start_new_session=True).wait()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-S", "-c", program, json.dumps(rank), json.dumps(dict(variables))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("variables", "wrapper", "words"),
    [
        (TORCHRUN, False, "error [rank 1]: torchrun's process"),
        (TORCHRUN, True, "error [rank 1]: torchrun's process"),
        (MPI, False, "error [rank 0]: mpirun's process"),
        (SRUN, False, "error [rank 0]: srun's process"),
    ],
)
def test_a_rank_ends_with_its_agent(variables: dict[str, str], wrapper: bool, words: str) -> None:
    agent = _agent(variables, 30, wrapper)
    assert agent.stdout is not None
    rank = process(int(agent.stdout.readline()))
    began = time.monotonic()
    agent.send_signal(signal.SIGKILL)
    said = agent.stdout.read()  # ends with the last that could write
    assert said.startswith(words), said
    assert f" {agent.pid}, which started this rank, is gone" in said
    while rank.alive and time.monotonic() - began < 10:
        time.sleep(0.01)
    assert not rank.alive
    agent.wait()


@pytest.mark.usefixtures("unmeasured")
def test_a_process_without_a_launcher_outlives_whoever_started_it() -> None:
    agent = _agent({}, 0.5)
    assert agent.stdout is not None
    agent.stdout.readline()
    agent.send_signal(signal.SIGKILL)
    assert agent.stdout.read() == "trained on\n"
    agent.wait()


def test_the_line_ends_at_the_process_that_has_no_variables_of_a_rank() -> None:
    info = RankInfo(Launcher.TORCHRUN, 0, 1, 0, 1, ("localhost", 1))
    assert [found.pid for found in line_to_agent(info)] == [os.getppid()]
    assert line_to_agent(RankInfo(Launcher.NOBODY, 0, 1, 0, 1, None)) == []
    assert line_to_agent(RankInfo(Launcher.ENVIRONMENT, 0, 1, 0, 1, ("localhost", 1))) == []
