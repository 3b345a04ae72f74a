"""The identity of a process, also after its number has gone to another one: from /proc where there is one.

A number alone names no process: systems use them again. With the moment of its start it does, within one place:
a host since it was booted, and there one space of process numbers, of which each container has its own.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process of this place.

    Attributes:
        pid: Its number.
        started: When it began, in the system's ticks since boot; "" where the system doesn't tell.
    """

    pid: int
    started: str

    @property
    def alive(self) -> bool:
        """Whether it is still there; one that has ended and isn't waited for yet is not.

        Its first thread may have ended before the others: as long as one runs, files may be written.
        """
        found = _stat(self.pid)
        if found is not None:
            return (found.state not in "ZX" or found.threads > 1) and self.started in ("", found.started)
        return not _PROC.joinpath("self/stat").exists() and _answers(self.pid)


def process(pid: int) -> Process:
    """Return the process that has a number now."""
    found = _stat(pid)
    return Process(pid, "" if found is None else found.started)


def parent_of(pid: int) -> int:
    """Return the number of a process's parent; 0 if there is none, or the system doesn't tell."""
    found = _stat(pid)
    return 0 if found is None else found.parent


def variables_of(pid: int) -> frozenset[str] | None:
    """Return the names of the variables that a process was started with; None if that is not to be known."""
    with suppress(OSError):
        entries = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
        return frozenset(entry.partition(b"=")[0].decode(errors="replace") for entry in entries if entry)
    return None


@cache
def place() -> tuple[str, str]:
    """Return the name of this host, and identifiers of its boot and process namespace."""
    marks = []
    with suppress(OSError):
        marks.append((_PROC / "sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        marks.append(os.readlink(_PROC / "self/ns/pid"))
    return socket.gethostname(), " ".join(marks)


class _Stat(NamedTuple):
    state: str
    parent: int
    threads: int
    started: str


def _stat(pid: int) -> _Stat | None:
    """Return the status of a process from /proc; None if it is gone, or there is no /proc."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    # The name, in brackets, may hold spaces and brackets itself.
    state, parent, *rest = text.rpartition(")")[2].split()
    return _Stat(state, int(parent), int(rest[15]), rest[17])


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
