"""The live view of `--live`: a `Dashboard` that stays at the bottom of the terminal while lines scroll away above it.

    training thread ── update at logged steps ──▶ History ◀── read twice a second ── a thread that draws

Training computes nothing for it and never waits for the terminal.

What another process writes to the terminal would be drawn over. Ranks that share it have something to say when they
fail, and say it in `others_lines`: see `_Terminal`.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import IO, Self, TextIO

from rich.console import Console, ConsoleDimensions
from rich.live import Live

from kfac_dist.reporting.dashboard import Dashboard, History
from kfac_dist.reporting.progress import (
    LastSaved,
    LineProgress,
    ProgressDisplay,
    SilentProgress,
    Status,
    TerminalProgress,
)
from kfac_dist.reporting.run_file import launcher_restarts

REFRESH_SECONDS = 0.5
# Above the view after the terminal's size has changed: the lines there are drawn again.
KEPT_NOTES = 50
PATIENCE_SECONDS = 3.0
_POLL_SECONDS = 0.02


class LiveProgress:
    """Draws a `Dashboard` of the run that is under way.

    Args:
        console: The terminal.
        run: The run's name.
        refresh_seconds: Time between two drawings.
    """

    def __init__(self, console: Console, run: str, refresh_seconds: float = REFRESH_SECONDS) -> None:
        self._console = console
        self._run = run
        self._refresh_seconds = refresh_seconds
        self._news: deque[Callable[[History], None]] = deque()  # from the training thread, which never waits
        self._notes: list[str] = []
        self._drawing: _Drawing | None = None

    def start(self, name: str, total_steps: int, first_step: int, last_saved: LastSaved) -> None:
        """Show an empty view, or that of a resumed run."""
        restarts = sum(launcher_restarts().values())
        title = f"{self._run}: {name}" if self._console.options.ascii_only else f"{self._run} · {name}"
        history = History(title, total_steps, first_step, restarts, last_saved, time.monotonic())
        self._drawing = _Drawing(self._console, history, self._news, self._notes, self._refresh_seconds)

    def update(self, status: Status) -> None:
        """Take a logged step into the view."""
        now = time.monotonic()
        self._news.append(lambda history: history.add(status, now))

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Take an evaluation into the view."""
        self._news.append(lambda history: history.evaluations.append((step, figures)))

    def went_back(self, step: int, why: str) -> None:
        """Forget later steps, and print a line above the view."""
        self._news.append(lambda history: history.go_back(step))
        self.note(why)

    def note(self, line: str) -> None:
        """Print a line above the view."""
        if self._drawing is None:
            self._notes.append(line)
            _print(self._console, line)
        else:
            self._drawing.note(line)

    def stop(self) -> None:
        """Leave the last view as it is, with the cursor below."""
        drawing, self._drawing = self._drawing, None
        if drawing is not None:
            drawing.stop()
            self._notes.clear()


class _Drawing:
    """One run's view, from its first drawing to its last; a thread draws all but these."""

    def __init__(
        self, console: Console, history: History, news: deque[Callable[[History], None]], notes: list[str], every: float
    ) -> None:
        self._console = console
        self._history = history
        self._news = news
        self._notes = notes
        self._every = every
        self._terminal = _Terminal.of(console.file)
        if self._terminal is not None:
            self._terminal.lock(_Lock.VIEW)
        self._show()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="live view", daemon=True)
        self._thread.start()

    def note(self, line: str) -> None:
        """Print a line above the view at the next drawing."""
        self._news.append(lambda _: self._print(line))

    def stop(self) -> None:
        """Draw for the last time."""
        try:
            self._over.set()
            self._thread.join()
            self._take_news()
            self._live.update(self._dashboard())
        finally:
            with suppress(OSError):  # a terminal that is gone is no reason for the run to fail
                self._live.stop()
            if self._terminal is not None:
                self._terminal.close()

    def _draw(self) -> None:
        while not self._over.wait(self._every):
            try:
                self._draw_once()
            except OSError:  # the terminal is gone: the run continues without it
                return

    def _draw_once(self) -> None:
        if self._terminal_size() != self._size:
            # Where the lines of the last view are now, only the terminal knows: begin with an empty one.
            self._live.stop()
            self._console.clear()
            for line in self._notes:
                _print(self._console, line)
            self._show()
        if self._terminal is not None and self._terminal.is_wanted():
            self._live.stop()
            self._terminal.lend()
            self._show()
        self._take_news()
        self._live.update(self._dashboard(), refresh=True)

    def _show(self) -> None:
        self._size = self._terminal_size()
        if self._size is not None:
            self._console.size = ConsoleDimensions(*self._size)
        self._live = Live(self._dashboard(), console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._live.start(refresh=True)

    def _terminal_size(self) -> os.terminal_size | None:
        """Return columns and lines of the console's own terminal; None where it is none that tells."""
        try:
            size = os.get_terminal_size(self._console.file.fileno())
        except (OSError, ValueError):
            return None
        return size if min(size) > 0 else None

    def _take_news(self) -> None:
        while self._news:
            self._news.popleft()(self._history)

    def _print(self, line: str) -> None:
        self._notes[:] = [*self._notes[-KEPT_NOTES:], line]
        _print(self._console, line)

    def _dashboard(self) -> Dashboard:
        return Dashboard(self._history, time.monotonic(), time.time())


def build_progress(*, rank: int, quiet: bool, live: bool = False, run: str = "") -> ProgressDisplay:
    """Choose the display of a process: rank 0's, unless it is to be quiet.

    Args:
        rank: Of this process.
        quiet: Whether nothing is shown.
        live: Whether the live view is wanted; where output isn't a terminal, plain lines say so and take its place.
        run: The run's name, the live view's title.
    """
    if rank != 0 or quiet:
        return SilentProgress()
    console = Console()
    if not console.is_terminal:
        progress = LineProgress()
        if live:
            progress.note("--live needs a terminal, which standard output isn't: plain lines follow")
        return progress
    if live and console.is_dumb_terminal:
        progress = LineProgress()
        progress.note("--live needs a terminal that can move its cursor, unlike TERM=dumb: plain lines follow")
        return progress
    return LiveProgress(console, run) if live else TerminalProgress(console)


@contextmanager
def others_lines(stream: TextIO) -> Iterator[None]:
    """Wait until no other process shows a live view on this terminal, or `PATIENCE_SECONDS`; a context to print in."""
    terminal = _Terminal.of(stream)
    if terminal is not None:
        terminal.lock(_Lock.WORD, PATIENCE_SECONDS)
        terminal.lock(_Lock.VIEW, PATIENCE_SECONDS)
    try:
        yield
    finally:
        if terminal is not None:
            terminal.close()


def say(line: str) -> None:
    """Print a line on standard error, beside other processes' live views."""
    with others_lines(sys.stderr):
        print(line, file=sys.stderr, flush=True)


def tell(line: str, progress: ProgressDisplay) -> None:
    """Print what happened to a run, even with quiet output."""
    if isinstance(progress, SilentProgress):
        say(line)
    else:
        progress.note(line)


class _Lock(IntEnum):
    """The lock of a terminal: a byte of a file that has none."""

    VIEW = 0
    WORD = 1


class _Terminal:
    """The locks of a terminal, by which processes that know nothing of each other take turns.

        view     holds VIEW ── sees WORD held: stops, frees VIEW ── waits for WORD ── holds VIEW, draws on below
        other    holds WORD ── waits for VIEW ──────────────────── prints ── frees both

    The kernel frees the locks of a process when it ends, however it ends; a forked one has none of them.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def of(cls, stream: TextIO | IO[str]) -> Self | None:
        """Return a stream's terminal; None where there is none, or none that may be opened."""
        try:
            return cls(os.open(os.ttyname(stream.fileno()), os.O_RDWR | os.O_NOCTTY))
        except (OSError, ValueError):
            return None

    def lock(self, what: _Lock, patience: float = 0.0) -> bool:
        """Take a lock, and return whether it could be had within so many seconds."""
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, what)
                return True
            except OSError:
                if time.monotonic() >= until:
                    return False
                time.sleep(_POLL_SECONDS)

    def is_wanted(self) -> bool:
        """Return whether another process waits for its turn."""
        if not self.lock(_Lock.WORD):
            return True
        self._free(_Lock.WORD)
        return False

    def lend(self) -> None:
        """Let waiting processes print."""
        self._free(_Lock.VIEW)
        if self.lock(_Lock.WORD, PATIENCE_SECONDS):
            self._free(_Lock.WORD)
        self.lock(_Lock.VIEW, PATIENCE_SECONDS)

    def close(self) -> None:
        """Release the locks."""
        os.close(self._descriptor)

    def _free(self, what: _Lock) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, what)


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False)
