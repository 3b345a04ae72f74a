"""A run under torchrun that can be watched, struck, started again, and compared with another one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.training.checkpoints.checkpoint import Checkpoint, Checkpoints
from kfac_dist.training.records.metrics import read_metrics

ROOT = Path(__file__).parents[1]
STEPS, EVERY, TIMEOUT_SECONDS = 64, 6, 5.0
# Timeouts that a job may take until an awaited event.
DEADLINE_TIMEOUTS = 24


Outcome = tuple[dict[int, float], dict[str, Tensor]]


class Failed(Exception):
    """A round that did not end in the undisturbed run."""


class Job:
    """A run under torchrun, in a directory of its own, that can be started again.

    Args:
        directory: For the run.
        log: Takes the output of all processes.
        ranks: Number of ranks.
        restarts: Number of torchrun's own restarts.
        environment: For the ranks.
        sections: Differences of the configuration from `_config`.
        timeout_seconds: Seconds that ranks wait for each other.

    Attributes:
        ranks: Number of ranks of the next start, as a range.
    """

    def __init__(
        self,
        directory: Path,
        log: Path,
        ranks: int,
        restarts: int,
        environment: dict[str, str],
        sections: Mapping[str, Mapping[str, object]] | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self.directory = directory
        self.run = directory / "run"
        self.ranks = range(ranks)
        self.starts = 0
        self._restarts = restarts
        self._environment = environment
        self._config = directory / "chaos.yaml"
        self._config.write_text(yaml.safe_dump(_config(directory, sections or {}, timeout_seconds)))
        self.deadline_seconds = DEADLINE_TIMEOUTS * timeout_seconds
        self._log = log

    def start(self) -> None:
        command = ["launch/torchrun.sh", str(self._config), "--nproc-per-node", str(len(self.ranks))]
        common = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--max-restarts", str(self._restarts), "--resume", "auto"],
                cwd=ROOT,
                env={**os.environ, **common, **self._environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.starts += 1

    def output(self) -> str:
        return self._log.read_text()

    def step(self) -> int:
        with suppress(FileNotFoundError):  # being rewritten
            return max((record["step"] for record in read_metrics(self.run / "metrics.jsonl")), default=0)
        return 0

    def pid(self, rank: int) -> int | None:
        """Return the process of a rank."""
        agent = self._agent()
        return child_pid(agent, rank) if agent is not None else None

    def _agent(self) -> int | None:
        """Return torchrun's process: the first that the script has started."""
        children = _read(f"/proc/{self.process.pid}/task/{self.process.pid}/children").split()
        return int(children[0]) if children else None

    def strike(self, rank: int, number: signal.Signals) -> int:
        pid = self.pid(rank)
        if pid is None:
            raise Failed(f"rank {rank} is not there")
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            raise Failed(f"rank {rank} ended before it was struck") from None
        return pid

    def wait(self) -> int:
        try:
            return self.process.wait(self.deadline_seconds)
        except subprocess.TimeoutExpired:
            raise Failed("the job did not end") from None

    def end(self) -> None:
        """Kill the script, the agent and all ranks; ranks lead sessions of their own."""
        found = [self._agent(), *(self.pid(rank) for rank in self.ranks)]
        for pid in [self.process.pid, *(pid for pid in found if pid is not None)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _config(directory: Path, sections: Mapping[str, Mapping[str, object]], timeout_seconds: float) -> dict[str, object]:
    config: dict[str, Any] = {
        "run": {"name": "run", "directory": str(directory), "device": "cpu", "timeout_seconds": timeout_seconds},
        "model": "benchmarks.chaos_workload:Net",
        "data": "benchmarks.chaos_workload:pixels",
        "loss": {"name": "sigmoid_cross_entropy"},
        "optimizer": {"lr": 0.05},
        "kfac": {
            "curvature": {"factor_every": 2},
            "inversion": {"inverse_every": 4, "damping": 0.1},
            "distribution": {"timeout_seconds": timeout_seconds},
        },
        "train": {"batch_size": 12, "steps": STEPS, "log_every": 1},
        "checkpoint": {"every": EVERY, "keep": 3},
    }
    for name, section in sections.items():
        before = config.get(name, {})
        config[name] = {**({"name": before} if isinstance(before, str) else before), **section}
    return config


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:  # a process that has just ended
        return ""


def child_pid(agent: int, rank: int | None = None) -> int | None:
    """Return the process of a rank, or of any: the agent's child that says so in its environment."""
    for child in _read(f"/proc/{agent}/task/{agent}/children").split():
        ranks = [text for text in _read(f"/proc/{child}/environ").split("\0") if text.startswith("RANK=")]
        if ranks and rank in (None, int(ranks[0].removeprefix("RANK="))):
            return int(child)
    return None


def alive(pid: int) -> bool:
    """Whether a process still runs: one that has ended has no environment any more."""
    return bool(_read(f"/proc/{pid}/environ"))


def wait_for(condition: Callable[[], bool], job: Job, what: str) -> None:
    """Wait until `condition()`; a job that ends before is a failure."""
    deadline = time.monotonic() + job.deadline_seconds
    while not condition():
        if job.process.poll() is not None and not condition():
            raise Failed(f"the job ended ({job.process.returncode}) before {what}")
        if time.monotonic() > deadline:
            raise Failed(f"waited in vain for {what}")
        time.sleep(0.001)


def last_checkpoint(run: Path) -> Checkpoint | None:
    return Checkpoints(run / "checkpoints", 1, SoloCommunicator()).newest()


def outcome(run: Path) -> Outcome:
    """Return the logged losses and every tensor of the last checkpoint."""
    checkpoints = Checkpoints(run / "checkpoints", 1, SoloCommunicator())
    newest = checkpoints.newest()
    if newest is None or newest.step != STEPS:
        raise Failed(f"the last checkpoint is {newest and newest.path.name}")
    tensors = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in checkpoints.contents(newest).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoints.load(newest, tensors)
    losses = {record["step"]: record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record}
    return losses, tensors


def compare(run: Path, reference: Outcome) -> None:
    losses, tensors = outcome(run)
    if losses != reference[0]:
        differing = [step for step in range(1, STEPS + 1) if losses.get(step) != reference[0].get(step)]
        raise Failed(f"losses differ from step {differing[0]} on")
    differing_names = [name for name, value in reference[1].items() if not torch.equal(value, tensors[name])]
    if differing_names or tensors.keys() != reference[1].keys():
        raise Failed(f"the last checkpoint differs: {differing_names[:3]}")


def compare_losses(run: Path, reference: Outcome, allowed: float) -> float:
    """Return the greatest relative difference of a logged loss: other numbers of ranks round otherwise."""
    losses, _ = outcome(run)
    if losses.keys() != reference[0].keys():
        raise Failed(f"steps are missing: {sorted(reference[0].keys() ^ losses.keys())[:5]}")
    difference = max(abs(losses[step] / loss - 1) for step, loss in reference[0].items())
    if difference > allowed:
        raise Failed(f"losses differ by {difference:.1e}")
    return difference
