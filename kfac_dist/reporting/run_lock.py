"""`runs/<name>.lock`: whose a run's directory is, so that two starts never write into it at once.

    free ────link──▶ ours ──unlink──▶ free             the file appears complete, or not at all
                        │ ▲
        holder is dead  ▼ │ replaced, under `<name>.lock.takeover`
                      another's

It lies beside the directory, which a fresh start moves away. Links and exclusive files are all that it needs, so that
it holds on NFS as well; the age of a heartbeat is the difference of two times that the file system's server has set.

A holder is dead if its process is gone, which can be told where it ran: on this host, since the same boot, in the same
space of process numbers. Of others it is told by a heartbeat, every `BEAT_SECONDS`, that is `STALE_SECONDS` old. A job
that its launcher has started again takes over from itself, wherever it ran.
"""

from __future__ import annotations

import glob
import json
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from kfac_dist.errors import ConfigError, KFACError
from kfac_dist.processes import Process, place, process

SUFFIX = ".lock"
BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
# A holder that ends just now, as the ranks of a killed launcher do, is waited for so long.
PATIENCE_SECONDS = 4.0
_TAKEOVER_SECONDS = 30.0
_PAUSE_SECONDS = 0.1
_MOST_BYTES = 65536
# Files of one start's own, beside the lock, and how old they are if that start is gone.
_OWN_FILES = re.compile(r"\.lock\.[0-9a-f]{12}|(\.lock)?\.[0-9a-f]{12}\.now|\.lock\.takeover")
_LEFT_SECONDS = 600.0


class RunInUseError(ConfigError):
    """A run's directory belongs to a process that is alive: names it."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a run's directory.

    Attributes:
        host: Host of its process.
        marks: Identity of the host's boot and of its space of process numbers.
        pid: Its process.
        started: When that began, as the host tells it.
        job: The launcher's job, as far as launchers tell; "" otherwise.
        slurm_job: SLURM's number of the job; "" outside of SLURM.
        since: When it took the directory, in seconds since 1970.
        token: Of this one start.
    """

    host: str
    marks: str
    pid: int
    started: str
    job: str
    slurm_job: str
    since: float
    token: str

    @classmethod
    def read(cls, text: str) -> Self:
        """Return the holder that a lock names.

        Raises:
            ValueError: It names none.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object")
        return cls(**values)

    @property
    def is_here(self) -> bool:
        """Whether this process can tell if the holder's is alive."""
        return (self.host, self.marks) == place() and bool(self.marks)

    def describe(self) -> str:
        """Return a description of the holder, in one phrase."""
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job}, since {time.strftime('%F %T', time.localtime(self.since))}"


def this_process(job: str = "") -> Holder:
    """Return this process as a holder."""
    host, marks = place()
    own = process(os.getpid())
    slurm_job = os.environ.get("SLURM_JOB_ID", "")
    return Holder(host, marks, own.pid, own.started, job, slurm_job, time.time(), _mark())


def lock_path(directory: Path) -> Path:
    """Return where the lock of a run's directory is."""
    return directory.with_name(directory.name + SUFFIX)


def living_holder(directory: Path) -> Holder | None:
    """Return the holder of a run's directory, unless it is known to be dead; None if it is free."""
    found = _read(lock_path(directory))
    if found is None:
        return None
    holder, beat = found
    return holder if _is_alive(holder, _server_time(directory) - beat) else None


class RunLock:
    """A run's directory, for this process alone; a context, in which a thread shows that it lives.

    Args:
        directory: The run's directory, which need not exist.
        job: The launcher's job; "" if it doesn't tell.
        restarted: Whether the launcher has started that job before: its earlier locks are its own.
        note: Shown a line when it takes over from a holder that is dead.
        beat_seconds: Time between two signs of life.
        stale_seconds: A holder on another host that has given none for so long is dead.
        patience_seconds: Seconds to wait for a living holder's end.
    """

    def __init__(
        self,
        directory: Path,
        job: str = "",
        *,
        restarted: bool = False,
        note: Callable[[str], None] = lambda line: None,
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._directory = directory
        self._path = lock_path(directory)
        self._own = this_process(job)
        self._restarted = restarted
        self._note = note
        self._beat = beat_seconds
        self._stale = stale_seconds
        self._patience = patience_seconds
        self._over = threading.Event()
        self.failure: KFACError | None = None

    def __enter__(self) -> Self:
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        self._acquire()
        self._clear_away()
        threading.Thread(target=self._show_life, name="run lock", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the directory up, if it is still ours."""
        self._over.set()
        if self._is_ours():
            self._path.unlink(missing_ok=True)

    def _acquire(self) -> None:
        began = time.monotonic()
        with _complete_file(self._path, self._own) as written:
            while True:
                if _create(self._path, written, self._own):
                    return
                waited = time.monotonic() - began  # before the look: one begun in time doesn't count as the last
                found = _read(self._path)
                if found is None:
                    continue  # it has just been given up
                holder, beat = found
                age = _server_time(self._directory) - beat
                why = self._why_dead(holder, age)
                if why and _take_over(self._path, holder, written):
                    self._note(f"{self._directory}: taken over from {holder.describe()}: {why}")
                    return
                patience = self._patience + (self._stale if self._is_own_past(holder) else 0.0)
                if waited > patience:
                    raise RunInUseError(self._refusal(holder, age))
                time.sleep(_PAUSE_SECONDS)

    def _clear_away(self) -> None:
        """Remove the files of waiting starts that were killed; living ones touch theirs."""
        now = _server_time(self._directory)
        for path in self._path.parent.glob(f"{glob.escape(self._directory.name)}.*"):
            if _OWN_FILES.fullmatch(path.name.removeprefix(self._directory.name)):
                with suppress(OSError):  # another start may do the same
                    if now - path.stat().st_mtime > _LEFT_SECONDS:
                        path.unlink()

    def _why_dead(self, holder: Holder, age: float) -> str:
        """Return why a holder no longer counts; "" if it does."""
        if self._restarted and self._is_own_past(holder):
            return "this job's last start"
        if _is_alive(holder, age, self._stale):
            return ""
        return "that process is gone" if holder.is_here else f"it gave no sign of life for {age:.0f} s"

    def _is_own_past(self, holder: Holder) -> bool:
        """Whether a holder is an earlier start of this job on another host: if it lives, it is about to end."""
        return bool(self._own.job) and holder.job == self._own.job and not holder.is_here

    def _refusal(self, holder: Holder, age: float) -> str:
        words = f"{self._directory} is in use by {holder.describe()}: wait for it or end it, or give another --name"
        if holder.is_here:
            return words
        left = max(1.0, self._stale - age)
        return f"{words} (if it is gone: its last sign of life is {max(age, 0):.0f} s old, in {left:.0f} s it is free)"

    def _is_ours(self) -> bool:
        found = _read(self._path)
        return found is not None and found[0].token == self._own.token

    def _show_life(self) -> None:
        while not self._over.wait(self._beat):
            try:
                found = _read(self._path)
                if self._over.is_set():
                    return
                if found is None or found[0].token != self._own.token:
                    by = "removed" if found is None else f"taken over by {found[0].describe()}"
                    self.failure = KFACError(
                        f"{self._path} was {by}: this run no longer owns {self._directory}, and stops writing"
                    )
                    return
                os.utime(self._path)
            except OSError:  # a file system that is away for a moment: the next beat tells
                continue


def _mark() -> str:
    """Return a token that no other start has; short, because it is part of limited file names."""
    return uuid.uuid4().hex[:12]


def _runs(holder: Holder) -> bool:
    return Process(holder.pid, holder.started).alive


def _is_alive(holder: Holder, age: float, stale_seconds: float = STALE_SECONDS) -> bool:
    return _runs(holder) if holder.is_here else age < stale_seconds


def _read(path: Path) -> tuple[Holder, float] | None:
    """Return the holder that a lock names, and its last sign of life by the server's clock; None without a lock."""
    for attempt in range(20):
        try:
            text, beat = _contents(path)
            return Holder.read(text), beat
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, RecursionError) as error:
            # Where there are no links, it is written after it has appeared.
            if attempt == 19:
                raise ConfigError(
                    f"{path}: can't be read: {error}; if no run holds {path.with_suffix('')}, remove it"
                ) from error
        time.sleep(_PAUSE_SECONDS)
    raise AssertionError("the last attempt returns or raises")


def _contents(path: Path) -> tuple[str, float]:
    """Return a lock's contents and modification time; anything else under its name is not read."""
    try:
        # Opening it makes NFS ask the server.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        if path.is_symlink():
            raise ConfigError(f"{path}: is a link, expected a run's lock: move it away") from error
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path}: is no regular file, expected a run's lock: move it away")
        return os.read(descriptor, _MOST_BYTES).decode(), found.st_mtime
    finally:
        os.close(descriptor)


@contextmanager
def _complete_file(path: Path, holder: Holder) -> Iterator[Path]:
    """Yield a file of this process's own that holds all of a lock; taking the lock is giving it that name."""
    written = path.with_name(f"{path.name}.{holder.token}")
    with written.open("x") as stream:
        json.dump(asdict(holder), stream)
        stream.flush()
        os.fsync(stream.fileno())
    try:
        yield written
    finally:
        written.unlink(missing_ok=True)


def _create(path: Path, written: Path, holder: Holder) -> bool:
    """Take a free lock; return whether it was free."""
    os.utime(written)
    try:
        os.link(written, path)
    except FileExistsError:
        # An answer that got lost makes NFS's client ask twice: the number of names tells.
        return written.stat().st_nlink == 2
    except OSError:  # no links on this file system
        with suppress(FileExistsError), path.open("x") as stream:
            json.dump(asdict(holder), stream)
            return True
        return False
    return True


def _take_over(path: Path, dead: Holder, written: Path) -> bool:
    """Put one's own lock in the place of a dead holder's; return whether this process was the one to do so."""
    turn = path.with_name(f"{path.name}.takeover")
    try:
        turn.open("x").close()
    except FileExistsError:
        with suppress(FileNotFoundError):
            if _server_time(path) - turn.stat().st_mtime > _TAKEOVER_SECONDS:  # died in the midst of it
                turn.unlink()
        return False
    try:
        found = _read(path)
        if found is None or found[0].token != dead.token:
            return False
        os.utime(written)
        os.replace(written, path)
        return True
    finally:
        turn.unlink(missing_ok=True)


def _server_time(beside: Path) -> float:
    """Return the time by the clock that dates files beside a path."""
    probe = beside.with_name(f"{beside.name}.{_mark()}.now")
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # a place that only may be read
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
