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
    duration,
)

STATUS = Status(step=50, loss=1.23456789, samples_per_second=12345.6, seconds=2.0, damping=0.003)


def _never() -> None:
    """No checkpoint has been saved."""


def test_a_status_says_loss_damping_and_speed() -> None:
    assert STATUS.describe() == "loss 1.2346  damping 0.003  12,346 samples/s"
    assert "damping" not in Status(1, 1.0, 1.0, 1.0).describe()


def test_plain_lines_come_at_intervals_and_at_the_end() -> None:
    stream = io.StringIO()
    progress = LineProgress(stream, every_seconds=1000)
    progress.start("kfac", 100, 0, _never)
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
    progress.start("kfac", 100, 0, _never)
    progress.update(STATUS)
    progress.note("resumed [from] here")
    progress.evaluated(50, {"loss": 2.5, "accuracy": 0.5})
    progress.went_back(20, "back to 20")
    progress.stop()
    progress.stop()
    shown = stream.getvalue()
    assert "50/100" in shown
    assert "damping 0.003" in shown
    assert "left" in shown
    for line in ("resumed [from] here", "step 50: test loss 2.5, accuracy 0.5", "back to 20"):
        assert line in shown


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = SilentProgress()
    progress.start("a", 1, 0, _never)
    progress.update(STATUS)
    progress.evaluated(1, {"loss": 1.0})
    progress.went_back(1, "why")
    progress.note("line")
    progress.stop()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3:05"), (3753, "1:02:33")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
