"""Ends of commands: one line a mistake and an exit code, on one rank or on many.

Every rank of a launcher runs the command line by itself. A user's mistake ends it with code 2 and without a traceback;
errors found by the doctor with code 1; Ctrl-C with code 130, or 0 under a launcher, whose own code reports Ctrl-C; a
bug keeps its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from kfac_dist.distributed.startup.rank_info import Launcher, RankInfo, find_rank_info
from kfac_dist.errors import ConfigError, KFACError

NOT_READY = 1
USER_ERROR = 2
INTERRUPTED = 130
GRACE_SECONDS = 1.0
LAST_SECONDS = 10.0

_said = threading.Event()


@contextmanager
def exit_codes() -> Iterator[None]:
    """Return a context that turns a user's mistakes into one line each and an exit code."""
    try:
        yield
    except KFACError as error:
        _report(error)
        raise typer.Exit(USER_ERROR) from None
    except KeyboardInterrupt:
        raise typer.Exit(interrupted_code()) from None


def interrupted_code() -> int:
    """Return the code that Ctrl-C ends a command with: a launcher would take another than 0 for a rank's failure."""
    info = _rank_info()
    own = info is None or info.launcher in (Launcher.NOBODY, Launcher.ENVIRONMENT, Launcher.SLURM)
    return INTERRUPTED if own else 0


def end_at_once() -> None:
    """End this process by a second Ctrl-C, also while it waits."""
    os._exit(INTERRUPTED)


def insist(error: KFACError) -> None:
    """End this process by an error soon, even if closing its resources waits for ranks that are gone."""
    timer = threading.Timer(LAST_SECONDS, _end, [error])
    timer.daemon = True
    timer.start()


def _end(error: KFACError) -> None:
    if not _said.is_set():
        _say(error)
    os._exit(USER_ERROR)


def _report(error: KFACError) -> None:
    """Print an error; among ranks, let the others do so, too."""
    info = _say(error)
    if info is not None and info.world_size > 1:
        # A launcher ends all ranks once one has exited: each gets time to say why, and to exit with its own code.
        # Ignored rather than handled, because Python drops its handlers before a process is really over.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(GRACE_SECONDS)


def _say(error: KFACError) -> RankInfo | None:
    """Print an error: once a host where its ranks must have the same one, else on each rank with its number."""
    _said.set()
    info = _rank_info()
    distributed = info is not None and info.world_size > 1
    same_everywhere = isinstance(error, ConfigError)
    if info is None or not (distributed and same_everywhere and info.local_rank != 0):
        label = f"error [rank {info.rank}]" if info and distributed and not same_everywhere else "error"
        from kfac_dist.reporting.live import others_lines

        with others_lines(sys.stderr):
            # One write, so that ranks that share a terminal don't cut each other's lines.
            sys.stderr.write("".join(f"{label}: {line}\n" for line in str(error).splitlines()))
            sys.stderr.flush()
    return info


def leads() -> bool:
    """Whether this process speaks for all ranks."""
    info = _rank_info()
    return info is None or info.rank == 0


def launched() -> bool:
    """Whether a launcher started this process."""
    info = _rank_info()
    return info is not None and info.launcher is not Launcher.NOBODY


def _rank_info() -> RankInfo | None:
    """Rank and number of ranks of this process; None where the launcher contradicts itself, which is then the error."""
    try:
        return find_rank_info(os.environ)
    except ConfigError:
        return None
