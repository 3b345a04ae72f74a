"""Progress of a run: a bar or a live view on a terminal, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 5.0
_PHASE = "kfac/seconds/"
_CLIP = "kl_scale"

LastSaved = Callable[[], float | None]
"""Tells when the newest checkpoint was complete, in seconds since 1970; None while there is none."""


@dataclass(frozen=True)
class Status:
    """A run at one of its logged steps.

    Attributes:
        step: Optimizer steps done.
        loss: Mean training loss since the last logged step.
        samples_per_second: Over all ranks.
        seconds: Training time so far.
        damping: K-FAC's λ; None without K-FAC.
        learning_rate: Of the last step; None where a solver finds its length.
        epoch: Passes over the data that are complete.
        skipped: Steps since the last logged one that were not taken.
        clips: Factor of the KL clip in the last step, by player; a run that is no game has the player "".
        failed_inversions: Units that rank 0 could not solve so far.
        phase_seconds: Seconds that rank 0 has spent in each phase of K-FAC's steps so far.
    """

    step: int
    loss: float
    samples_per_second: float
    seconds: float
    damping: float | None = None
    learning_rate: float | None = None
    epoch: int = 0
    skipped: int = 0
    clips: Mapping[str, float] = field(default_factory=dict)
    failed_inversions: int = 0
    phase_seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Return the status that a record of `metrics.jsonl` tells of; a loss that it leaves out is NaN."""
        clips = {name.removeprefix("kfac/"): value for name, value in record.items() if name.endswith(f"/{_CLIP}")}
        return cls(
            step=record["step"],
            loss=record.get("loss", math.nan),
            samples_per_second=record["samples_per_second"],
            seconds=record["seconds"],
            damping=record.get("kfac/damping"),
            learning_rate=record.get("lr"),
            epoch=record["epoch"],
            skipped=record["skipped"],
            clips={name.removesuffix(_CLIP).rstrip("/"): value for name, value in clips.items()},
            failed_inversions=record.get("kfac/failed_inversions", 0),
            phase_seconds={n.removeprefix(_PHASE): value for n, value in record.items() if n.startswith(_PHASE)},
        )

    def describe(self) -> str:
        """Return loss, damping and speed in one phrase."""
        damping = "" if self.damping is None else f"  damping {self.damping:.3g}"
        return f"loss {self.loss:.5g}{damping}  {self.samples_per_second:,.0f} samples/s"


class ProgressDisplay(Protocol):
    """Shows where a run stands; called on logged steps only."""

    def start(self, name: str, total_steps: int, first_step: int, last_saved: LastSaved) -> None:
        """Begin a run that has done `first_step` of `total_steps` steps."""

    def update(self, status: Status) -> None:
        """Show a new status."""

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Show figures of the test data, by name."""

    def went_back(self, step: int, why: str) -> None:
        """Show that the run continues from an earlier step."""

    def note(self, line: str) -> None:
        """Show one line of text that stays."""

    def stop(self) -> None:
        """End the run's display, also after an error."""


class SilentProgress:
    """Shows nothing: ranks other than 0, and quiet runs."""

    def start(self, name: str, total_steps: int, first_step: int, last_saved: LastSaved) -> None:
        """Show nothing."""

    def update(self, status: Status) -> None:
        """Show nothing."""

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Show nothing."""

    def went_back(self, step: int, why: str) -> None:
        """Show nothing."""

    def note(self, line: str) -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Show nothing."""


class LineProgress:
    """One plain line every few seconds, and at the first and the last step: for files and CI logs.

    Args:
        stream: Stream to print to; standard output by default.
        every_seconds: Least time between two lines.
    """

    def __init__(self, stream: TextIO | None = None, every_seconds: float = LINE_SECONDS) -> None:
        self._stream = stream or sys.stdout
        self._every = every_seconds
        self._next = 0.0
        self._name, self._total, self._first, self._started = "", 0, 0, 0.0

    def start(self, name: str, total_steps: int, first_step: int, last_saved: LastSaved) -> None:
        """Remember the run's length."""
        self._name, self._total, self._first = name, total_steps, first_step
        self._started = time.monotonic()
        self._next = 0.0

    def update(self, status: Status) -> None:
        """Print a line if the last one is old enough."""
        now = time.monotonic()
        if now < self._next and status.step < self._total:
            return
        self._next = now + self._every
        done = status.step - self._first
        left = (self._total - status.step) * (now - self._started) / done if done else 0.0
        self.note(f"{self._name}  step {status.step}/{self._total}  {status.describe()}  {duration(left)} left")

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Print a line."""
        self.note(evaluation_line(step, figures))

    def went_back(self, step: int, why: str) -> None:
        """Print a line."""
        self.note(why)

    def note(self, line: str) -> None:
        """Print a line."""
        print(line, file=self._stream, flush=True)

    def stop(self) -> None:
        """Nothing to put away."""


class TerminalProgress:
    """A bar with loss, damping, speed and time left.

    Args:
        console: The terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def start(self, name: str, total_steps: int, first_step: int, last_saved: LastSaved) -> None:
        """Show an empty bar, or that of a resumed run."""
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            refresh_per_second=4,  # its thread takes the interpreter from training at each refresh
        )
        self._task = self._progress.add_task(name, total=total_steps, completed=first_step, status="")
        self._progress.start()

    def update(self, status: Status) -> None:
        """Move the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=status.step, status=status.describe())

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Print a line above the bar."""
        self.note(evaluation_line(step, figures))

    def went_back(self, step: int, why: str) -> None:
        """Print a line above the bar."""
        self.note(why)

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, highlight=False, markup=False)

    def stop(self) -> None:
        """Leave the bar as it is."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None


def evaluation_line(step: int, figures: Mapping[str, float]) -> str:
    """Return an evaluation's results as `step 20: test loss 1.5, accuracy 0.97`."""
    return f"step {step}: test " + ", ".join(f"{name} {value:.5g}" for name, value in figures.items())


def duration(seconds: float) -> str:
    """Return a time as `12 s`, `3:05` or `1:02:33`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
