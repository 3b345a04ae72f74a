"""Ranks end with the launcher's process that started them: torchrun's agent, SLURM's step, MPI's proxy.

    agent ── wrapper ── rank        a launcher that is killed leaves its ranks behind, which would train on, and fight
      ✗                  ✗          the same run once it is started again

Processes started by an agent have the variables of a rank, the agent hasn't: from rank to agent, no process may end.
A rank without a launcher has no agent to end it: `nohup`, `setsid` and the end of a shell leave it alone.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from kfac_dist.distributed.startup.rank_info import Launcher, RankInfo
from kfac_dist.processes import Process, parent_of, process, variables_of

TICK_SECONDS = 0.5
ORPHANED = 2
# Variables that a launcher sets for its ranks, and hasn't itself.
_MARKS: Mapping[Launcher, tuple[str, ...]] = {
    Launcher.TORCHRUN: ("TORCHELASTIC_RUN_ID",),
    Launcher.DEEPSPEED: ("LOCAL_RANK",),
    Launcher.MPI: ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"),
    Launcher.SLURM: ("SLURM_PROCID",),
}


def line_to_agent(info: RankInfo) -> list[Process]:
    """Return the processes from this one's parent up to its launcher's; none where there is no launcher."""
    marks = _MARKS.get(info.launcher)
    line: list[Process] = []
    pid = os.getppid()
    while marks is not None and pid > 1:
        line.append(process(pid))
        variables = variables_of(pid)
        if variables is None or variables.isdisjoint(marks):  # of another user: SLURM's own
            break
        pid = parent_of(pid)
    return line


class AgentWatch:
    """Ends this process once a process between it and its launcher's is gone; a context, in which its thread runs.

    Args:
        info: This process's rank and launcher.
        end: Called with a message, instead of ending the process.
        tick_seconds: Time between two looks.
    """

    def __init__(
        self, info: RankInfo, end: Callable[[str], object] | None = None, tick_seconds: float = TICK_SECONDS
    ) -> None:
        self._place = info
        self._end = end or (lambda line: _end(info, line))
        self._tick = tick_seconds
        self._over = threading.Event()

    def __enter__(self) -> Self:
        line = line_to_agent(self._place)
        if line:
            threading.Thread(target=self._watch, args=(line,), name="agent watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self, line: list[Process]) -> None:
        while not self._over.wait(self._tick):
            gone = next((process for process in line if not process.alive), None)
            if gone is not None:
                self._end(f"{self._place.launcher}'s process {gone.pid}, which started this rank, is gone: so it ends")
                return


def _end(info: RankInfo, line: str) -> None:
    """End at once: a supervisor may start the launcher again, and the other ranks notice."""
    try:
        sys.stderr.write(f"error [rank {info.rank}]: {line}\n")
        sys.stderr.flush()
    finally:
        os._exit(ORPHANED)
