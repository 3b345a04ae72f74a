"""The live view on a terminal: one of the kernel's, with a size, a lock and a Ctrl-C."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from kfac_dist.config.yaml.load import dump_yaml
from kfac_dist.reporting import live
from kfac_dist.reporting.live import LiveProgress, build_progress, others_lines
from kfac_dist.reporting.progress import LineProgress, SilentProgress, Status, TerminalProgress
from kfac_dist.training import train
from tests.training.runs import small_config

HIDDEN, VISIBLE, CLEARED, UP = "\x1b[?25l", "\x1b[?25h", "\x1b[2J", "\x1b[1A"
STATUS = Status(step=50, loss=1.25, samples_per_second=10.0, seconds=2.0, damping=0.003)


class Terminal:
    """A pseudo-terminal; what is written to its `end` is collected."""

    def __init__(self, columns: int = 100, rows: int = 30) -> None:
        self._master, slave = pty.openpty()
        self.end = os.fdopen(slave, "w", encoding="utf-8")
        self._text = ""
        self._cursor_at = 0
        self.resize(columns, rows)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait_for(self, text: str, seconds: float = 30.0) -> str:
        """Return what came after the last call's text, up to this one."""
        until = time.monotonic() + seconds
        while (place := self._text.find(text, self._cursor_at)) < 0:
            assert time.monotonic() < until, f"{text!r} is not in …{self._text[self._cursor_at :][-500:]!r}"
            time.sleep(0.02)
        found, self._cursor_at = self._text[self._cursor_at : place], place + len(text)
        return found

    @property
    def text(self) -> str:
        time.sleep(0.1)
        return self._text

    def hang_up(self) -> None:
        """Go away, as a lost connection does."""
        self._over.set()
        self._thread.join()

    def _collect(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")()
        while not self._over.is_set():
            if select.select([self._master], [], [], 0.02)[0]:
                self._text += decoder.decode(os.read(self._master, 65536))
        os.close(self._master)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    made = Terminal()
    yield made
    made.hang_up()
    with contextlib.suppress(OSError):
        made.end.close()


def _shown(terminal: Terminal) -> LiveProgress:
    progress = LiveProgress(Console(file=terminal.end), "mine", refresh_seconds=0.02)
    progress.start("kfac", 100, 0, lambda: None)
    return progress


def test_a_view_is_drawn_over_itself_and_ends_with_the_cursor_below(terminal: Terminal) -> None:
    progress = _shown(terminal)
    terminal.wait_for(HIDDEN)
    terminal.wait_for("waiting for the first")
    progress.update(STATUS)
    progress.note("resumed [from] here")
    progress.evaluated(50, {"loss": 2.5})
    terminal.wait_for("resumed [from] here")
    terminal.wait_for("test loss 2.5")
    progress.went_back(20, "back to 20")
    terminal.wait_for("back to 20")
    terminal.wait_for("1 return to a checkpoint")
    progress.update(Status(step=99, loss=0.75, samples_per_second=10.0, seconds=2.0))
    progress.stop()
    terminal.wait_for("step 99 of 100")
    assert "\n" in terminal.wait_for(VISIBLE)
    progress.stop()
    assert HIDDEN not in terminal.text[terminal.text.rindex(VISIBLE) :]


def test_a_new_size_begins_with_an_empty_screen_and_the_same_notes(terminal: Terminal) -> None:
    progress = _shown(terminal)
    progress.note("kept")
    terminal.wait_for("kept")
    terminal.resize(40, 10)
    terminal.wait_for(CLEARED)
    terminal.wait_for("kept")
    frame = terminal.wait_for("no checkpoint yet")
    progress.stop()
    assert max(len(line) for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).splitlines()) <= 40


def test_other_ranks_words_stay(terminal: Terminal) -> None:
    progress = _shown(terminal)
    terminal.wait_for("no checkpoint yet")
    other = os.fork()
    if other == 0:
        with others_lines(terminal.end):
            os.write(terminal.end.fileno(), b"error [rank 1]: no memory\n")
        os._exit(0)
    before = terminal.wait_for("error [rank 1]: no memory")
    after = terminal.wait_for("no checkpoint yet")
    os.waitpid(other, 0)
    progress.stop()
    assert before.endswith(VISIBLE)  # that view was left behind whole, and
    assert UP not in after  # the next one begins below the words


def test_nobody_waits_for_ever_and_nobody_where_there_is_no_terminal(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "PATIENCE_SECONDS", 0.1)
    stuck = os.fork()
    if stuck == 0:
        _shown(terminal)._drawing._over.set()  # type: ignore[union-attr]
        time.sleep(60)
    terminal.wait_for("no checkpoint yet")
    with others_lines(terminal.end), others_lines(io.StringIO()):
        pass
    os.kill(stuck, signal.SIGKILL)
    os.waitpid(stuck, 0)


def test_a_terminal_that_goes_away_stops_no_run(terminal: Terminal) -> None:
    progress = _shown(terminal)
    terminal.hang_up()
    time.sleep(0.1)
    progress.update(STATUS)
    progress.stop()


def test_who_shows_what(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(build_progress(rank=0, quiet=False), LineProgress)
    assert isinstance(build_progress(rank=1, quiet=False, live=True), SilentProgress)
    assert isinstance(build_progress(rank=0, quiet=True), SilentProgress)
    assert capsys.readouterr().out == ""
    assert isinstance(build_progress(rank=0, quiet=False, live=True), LineProgress)
    assert capsys.readouterr().out == "--live needs a terminal, which standard output isn't: plain lines follow\n"
    monkeypatch.setattr(sys, "stdout", terminal.end)
    assert isinstance(build_progress(rank=0, quiet=False), TerminalProgress)
    assert isinstance(build_progress(rank=0, quiet=False, live=True), LiveProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(build_progress(rank=0, quiet=False, live=True), LineProgress)
    terminal.wait_for("unlike TERM=dumb: plain lines follow")


def test_a_run_with_a_view_ends_with_its_table(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal.end)
    train(small_config(tmp_path, kfac=True, train={"evaluate_every": 6}), live=True)
    terminal.wait_for("small · kfac")
    terminal.wait_for("step 12 of 12")
    terminal.wait_for("ms a step, rank 0")
    terminal.wait_for("step 6: test loss")
    terminal.wait_for(VISIBLE)
    terminal.wait_for("ms/step")


def test_ctrl_c_gives_the_cursor_back(tmp_path: Path, terminal: Terminal) -> None:
    config = small_config(
        tmp_path, data={"name": "tests.training.recovery.test_preemption:slow_pixels"}, train={"steps": 100_000}
    )
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    command = [sys.executable, "-m", "kfac_dist", "train", str(tmp_path / "run.yaml"), "--live"]
    environment = os.environ | {"SECONDS_PER_SAMPLE": "0.003"}
    with subprocess.Popen(
        command, stdin=terminal.end, stdout=terminal.end, stderr=terminal.end, env=environment
    ) as run:
        terminal.wait_for("waiting for the first")
        terminal.wait_for("loss  ")
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
    terminal.wait_for(VISIBLE)
    assert "Traceback" not in terminal.text
