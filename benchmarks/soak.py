"""A long run with many checkpoints: the resources of its processes must not grow.

    warm-up ── early ───────────────────────────────── late        a look at every process each few seconds
               the first quarter after it              the last

A run under torchrun saves about a hundred checkpoints, evaluates, logs, and loads its samples in processes of its own;
after `--minutes` it is told to stop. For every rank the program reads from /proc: memory (what of it is no
file's), threads, open file descriptors, and processes that it has started; and it counts the files in the run's
directory. The late median of each may be no greater than the early one, memory by no more than a few per cent.

    python -m benchmarks.soak [--minutes 60] [--checkpoints 100] [--ranks 2] [--engine ddp] [--out FILE]
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.chaos_job import Failed, Job, last_checkpoint, wait_for
from benchmarks.reporting import write

# A share of the time that is not judged: allocators, caches and threads settle.
WARM_UP = 0.2
# Tolerated growth of memory, over the whole time.
MEMORY_GROWTH = 0.03
STEP_SECONDS = 0.05


@dataclass(frozen=True)
class Look:
    """One rank's resources at one moment.

    Attributes:
        seconds: Since the first step.
        step: Last logged step.
        rank: The rank.
        memory_bytes: Resident memory that is no file's.
        threads: Number of threads.
        descriptors: Open file descriptors.
        children: Processes that it has started.
        files: Files and directories of the run, without those of a checkpoint that is being written.
    """

    seconds: float
    step: int
    rank: int
    memory_bytes: int
    threads: int
    descriptors: int
    children: int
    files: int


QUANTITIES = {"memory_bytes": MEMORY_GROWTH, "threads": 0.0, "descriptors": 0.0, "children": 0.0, "files": 0.0}


def look(pid: int, rank: int, seconds: float, step: int, files: int) -> Look:
    """Read a process's resources."""
    place = Path("/proc") / str(pid)
    parts = [line.split() for line in (place / "smaps_rollup").read_text().splitlines()]
    own = sum(int(part[1]) * 1024 for part in parts if part[0] == "Anonymous:")
    threads, children = 0, 0
    for task in (place / "task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            children += len((task / "children").read_text().split())
            threads += 1
    return Look(seconds, step, rank, own, threads, len(list((place / "fd").iterdir())), children, files)


def files_of(run: Path) -> int:
    """Count the files in a run's directory, without unfinished ones."""
    found = 0
    with suppress(FileNotFoundError):
        found = sum(".writing" not in str(path) and ".aside" not in str(path) for path in run.rglob("*"))
    return found


def verdict(looks: Sequence[Look], minutes: float) -> dict[str, dict[str, float | bool]]:
    """Compare the first quarter after the warm-up with the last, rank by rank; returns the worst rank of each."""
    begin, end = WARM_UP * 60 * minutes, max((each.seconds for each in looks), default=0.0)
    quarter = (end - begin) / 4
    found: dict[str, dict[str, float | bool]] = {}
    for name, allowed in QUANTITIES.items():
        worst: dict[str, float | bool] = {}
        for rank in sorted({each.rank for each in looks}):
            own = [each for each in looks if each.rank == rank]
            early = [getattr(each, name) for each in own if begin <= each.seconds < begin + quarter]
            late = [getattr(each, name) for each in own if each.seconds >= end - quarter]
            if not early or not late:
                raise Failed("the run was too short to compare")
            before, after = statistics.median(early), statistics.median(late)
            growth = after / before - 1 if before else float(after > 0)
            if not worst or growth > worst["growth"]:
                worst = {
                    "rank": rank,
                    "early": before,
                    "late": after,
                    "growth": growth,
                    "allowed": allowed,
                    "fine": growth <= allowed,
                }
        found[name] = worst
    return found


def soak(
    directory: Path, minutes: float, checkpoints: int, ranks: int, engine: str, every_seconds: float
) -> tuple[list[Look], int]:
    """Run for the given time, and return the samples and the number of checkpoints; the run's directory stays."""
    sections: dict[str, dict[str, object]] = {
        "run": {"timeout_seconds": 300.0},
        "model": {"name": "benchmarks.chaos_workload:Net", "args": {"seconds": STEP_SECONDS}},
        "data": {"name": "benchmarks.chaos_workload:listed_pixels"},
        "kfac": {"distribution": {"timeout_seconds": 300.0}},
        "engine": {"name": engine},
        "train": {"steps": 10**7, "log_every": 10, "evaluate_every": 500, "loader_workers": 1},
        "checkpoint": {"every": 0, "every_minutes": minutes / checkpoints, "keep": 3},
        "metrics": {"spectra": 50},
    }
    job = Job(directory, directory / "output.txt", ranks, restarts=0, environment={}, sections=sections)
    looks: list[Look] = []
    saved: set[str] = set()
    job.start()
    try:
        wait_for(lambda: job.step() >= 10, job, "the first steps")
        began = time.monotonic()
        while (seconds := time.monotonic() - began) < 60 * minutes:
            files, step = files_of(job.run), job.step()
            saved |= {path.name for path in (job.run / "checkpoints").glob("step-*[0-9]")}
            for rank in job.ranks:
                pid = job.pid(rank)
                if pid is None:
                    raise Failed(f"rank {rank} is gone: {job.output()[-2000:]}")
                looks.append(look(pid, rank, seconds, step, files))
            time.sleep(every_seconds)
        job.strike(0, signal.SIGTERM)
        if job.wait() != 0:
            raise Failed(f"the run did not stop when signalled: {job.output()[-2000:]}")
    finally:
        job.end()
    return looks, len(saved)


def main() -> None:
    """Soak; exit with 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--checkpoints", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engine", default="ddp")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    every = max(0.5, min(10.0, 60 * arguments.minutes / 200))
    with tempfile.TemporaryDirectory(prefix="soak-") as parent:
        directory = Path(parent)
        looks, written = soak(
            directory, arguments.minutes, arguments.checkpoints, arguments.ranks, arguments.engine, every
        )
        newest = last_checkpoint(directory / "run")
        if newest is None:
            raise Failed("no checkpoint is left")
    found = verdict(looks, arguments.minutes)
    results = {
        "seconds": looks[-1].seconds,
        "steps": newest.step,
        "checkpoints_seen": written,
        "looks": len(looks),
        "fine": all(each["fine"] for each in found.values()),
        "verdict": found,
        "each": [asdict(each) for each in looks[:: max(1, len(looks) // 400)]],
    }
    path = write("soak", arguments.out, vars(arguments) | {"out": None}, results)
    for name, each in found.items():
        print(f"{name:14s} {each['early']:14.1f} → {each['late']:14.1f}  {'fine' if each['fine'] else 'GREW'}")
    print(f"{newest.step} steps, {path}")
    sys.exit(0 if results["fine"] else 1)


if __name__ == "__main__":
    main()
