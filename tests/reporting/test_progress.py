"""What the user sees while a run trains, on a terminal and in a file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kfac_dist.reporting.progress import (
    LineProgress,
    SilentProgress,
    Status,
    TerminalProgress,
    build_progress,
    duration,
)

STATUS = Status(step=50, loss=1.23456789, samples_per_second=12345.6, seconds=2.0, damping=0.003)


def test_a_status_says_loss_damping_and_speed() -> None:
    assert STATUS.describe() == "loss 1.2346  damping 0.003  12,346 samples/s"
    assert "damping" not in Status(1, 1.0, 1.0, 1.0).describe()


def test_plain_lines_come_at_intervals_and_at_the_end() -> None:
    stream = io.StringIO()
    progress = LineProgress(stream, every_seconds=1000)
    progress.start("kfac", 100, 0)
    for step in (50, 60, 100):
        progress.update(Status(step, 2.0, 10.0, 1.0))
    progress.stop()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("kfac  step 50/100  loss 2  10 samples/s")
    assert lines[1].endswith("0 s left")


def test_a_terminal_shows_a_bar_with_the_time_left() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(Console(file=stream, force_terminal=True, width=120))
    progress.start("kfac", 100, 0)
    progress.update(STATUS)
    progress.note("resumed [from] here")
    progress.stop()
    progress.stop()
    shown = stream.getvalue()
    assert "50/100" in shown
    assert "damping 0.003" in shown
    assert "left" in shown
    assert "resumed [from] here" in shown


def test_only_rank_zero_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(build_progress(rank=0, quiet=False), LineProgress)
    for progress in (build_progress(rank=1, quiet=False), build_progress(rank=0, quiet=True)):
        assert isinstance(progress, SilentProgress)
        progress.start("a", 1, 0)
        progress.update(STATUS)
        progress.note("line")
        progress.stop()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3:05"), (3753, "1:02:33")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
