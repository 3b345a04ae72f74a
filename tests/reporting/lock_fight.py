"""Processes that take one lock again and again, and are killed meanwhile: `python lock_fight.py RUN`, for tests.

Prints how often it was taken, how often while another process had it, and how many processes were killed.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import sys
import time
from pathlib import Path

from kfac_dist.reporting.run_lock import RunInUseError, RunLock

PROCESSES, ATTEMPTS, KILLS = 8, 200, 60


def fight(run: Path, told: int, seed: int) -> None:
    """Whoever has the lock takes another one, which the system itself gives up for a process once that has ended."""
    chance = random.Random(seed)
    held = os.open(run.parent / "held", os.O_RDWR | os.O_CREAT)
    for _ in range(ATTEMPTS):
        lock = RunLock(run, patience_seconds=0.2)
        try:
            lock.__enter__()
        except RunInUseError:
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.write(told, b"2")
        else:
            os.write(told, b"1")
            time.sleep(chance.random() * 0.003)
            if chance.random() < 0.1:
                os.kill(os.getpid(), signal.SIGKILL)
            fcntl.flock(held, fcntl.LOCK_UN)
        lock.release()


def start(run: Path, told: int, seed: int) -> int:
    if child := os.fork():
        return child
    try:
        fight(run, told, seed)
    finally:
        os._exit(0)


def main(run: Path) -> None:
    read, told = os.pipe()
    os.set_blocking(read, False)
    living = {start(run, told, seed) for seed in range(PROCESSES)}
    chance, killed, ended, marks = random.Random(1), 0, 0, b""
    deadline = time.monotonic() + 60
    while living and time.monotonic() < deadline:
        time.sleep(0.01)
        if chance.random() < 0.3 and killed < KILLS:
            os.kill(chance.choice(sorted(living)), signal.SIGKILL)  # wherever it is
        while living and (found := os.waitpid(-1, os.WNOHANG))[0]:
            living.remove(found[0])
            if os.WIFSIGNALED(found[1]):
                killed += 1
                if killed < KILLS:
                    living.add(start(run, told, PROCESSES + killed))
            else:
                ended += 1
        try:
            marks += os.read(read, 65536)
        except BlockingIOError:
            continue
    print(len(marks), marks.count(b"2"), killed, ended)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
