"""The request for a run's job, checked before SLURM sees it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kfac_dist.errors import ConfigError

# Formats of sbatch: minutes, minutes:seconds, hours:minutes:seconds, days-hours, optionally with minutes and seconds.
_TIME = re.compile(r"\d+(:[0-5]\d){0,2}|\d+-\d{1,2}(:[0-5]\d){0,2}")
_MEMORY = re.compile(r"\d+[KMGT]?")


class StartedBy(StrEnum):
    """The launcher in the job: torchrun's agents, which restart the ranks, or srun itself."""

    TORCHRUN = "torchrun"
    SRUN = "srun"


@dataclass(frozen=True)
class Container:
    """The image that the ranks run in.

    Attributes:
        image: For `srun --container-image` (pyxis and enroot); empty for none.
        mounts: `SOURCE:TARGET,…` of the image; by default the directory of the submission.
        apptainer: An apptainer image instead; empty for none.
    """

    image: str = ""
    mounts: str = ""
    apptainer: str = ""


@dataclass(frozen=True)
class SlurmJob:
    """The resources of a job, and how its ranks are started.

    Attributes:
        nodes: Number of nodes.
        time: Its limit, as SLURM writes it.
        gpus_per_node: GPUs of each node; 0 asks for none.
        ranks_per_node: Ranks on each node; None for one a GPU, or one.
        cpus_per_task: Cores of each of srun's tasks (torchrun: a node's); None leaves it to SLURM.
        memory: Of each node, such as `64G`; None leaves it to SLURM.
        partition: The partition; None leaves it to SLURM.
        account: Account that is charged; None leaves it to SLURM.
        started_by: Launcher of the ranks.
        max_restarts: Number of restarts by torchrun.
        stop_seconds: Seconds before the limit at which the run is signalled to save its state.
        container: The image, if any.
        setup: A shell command to begin with.
        options: Further options of sbatch, word for word.
    """

    nodes: int = 1
    time: str = "1:00:00"
    gpus_per_node: int = 0
    ranks_per_node: int | None = None
    cpus_per_task: int | None = None
    memory: str | None = None
    partition: str | None = None
    account: str | None = None
    started_by: StartedBy = StartedBy.TORCHRUN
    max_restarts: int = 3
    stop_seconds: int = 120
    container: Container = Container()
    setup: str = ""
    options: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Ranks of one node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    def check(self) -> None:
        """Refuse values that sbatch would refuse or misread.

        Raises:
            ConfigError: One line for each mistake.
        """
        problems = []
        if not _TIME.fullmatch(self.time):
            problems.append(
                f"--time: found {self.time!r}, expected minutes, minutes:seconds, hours:minutes:seconds or "
                "days-hours:minutes:seconds, such as 4:00:00 or 2-12"
            )
        elif (limit := seconds_of(self.time)) <= self.stop_seconds:
            problems.append(
                f"--time {self.time} is {limit} s, but the run is signalled to stop {self.stop_seconds} s before that: "
                "raise --time, or lower --stop-seconds"
            )
        if self.memory is not None and not _MEMORY.fullmatch(self.memory):
            problems.append(f"--mem: found {self.memory!r}, expected a number and K, M, G or T, such as 64G")
        if self.container.image and self.container.apptainer:
            problems.append("--container-image and --apptainer: give one of the two")
        if self.gpus_per_node and self.ranks > self.gpus_per_node:
            problems.append(f"--ranks-per-node {self.ranks} has no GPU for each on {self.gpus_per_node} GPUs a node")
        problems += [
            f"--option: found {option!r}, expected an option of sbatch such as --qos=high"
            for option in self.options
            if not option.startswith("--")
        ]
        if problems:
            raise ConfigError("\n".join(problems))

    def directives(self, name: str, output: Path, tasks: int | None) -> list[str]:
        """Return the options of sbatch.

        Args:
            name: Of the job.
            output: File of its output.
            tasks: Tasks of an array; None for a job that is none.
        """
        options = [f"--job-name={name}", f"--nodes={self.nodes}", f"--time={self.time}"]
        optional = {
            "partition": self.partition,
            "account": self.account,
            "gpus-per-node": self.gpus_per_node or None,
            "ntasks-per-node": 1 if self.started_by is StartedBy.TORCHRUN else self.ranks,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.memory,
            "array": None if tasks is None else f"0-{tasks - 1}",
        }
        options += [f"--{option}={value}" for option, value in optional.items() if value is not None]
        return [
            *options,
            f"--signal=B:USR1@{self.stop_seconds}",
            "--requeue",
            "--open-mode=append",
            f"--output={shlex.quote(str(output))}",  # sbatch takes quotes as a shell does
            *self.options,
        ]


def seconds_of(time: str) -> int:
    """Return the seconds of a time as SLURM writes it."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
