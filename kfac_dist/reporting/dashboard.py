"""The text of the live view: a pure function of a run's log and the room on the screen.

    digits · kfac                      step 1,200 of 1,500   epoch 200
    ━━━━━━━━━━━━━━━━━━━━━━━━━━━──────   80 %   0:12 so far, 3 s left
    loss         15.66  ▇▆▅▄▃▃▂▂▁▁▁▁     ms a step   over the last 200 steps
    samples/s    7,552  ▃▅▆▇▇▇▇▆▇▇▇▇     inversion       0.76  ████████
    ...                                  other           2.31  ████████████████████████
    0 skipped steps · 0 restarts · checkpoint 12 s ago
    step 1,000: test loss 16.55, squared error 0.794

Wide terminals show curves beside phases, narrow ones beneath each other, low ones the more important of them. What
colour says, words or lengths say too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from kfac_dist.reporting.progress import LastSaved, Status, duration, evaluation_line

MOST_ROWS = 512
# Phases are shown over so many of the last logged steps: long enough for a few refreshes, short enough to be news.
RECENT_ROWS = 20
SHOWN_EVALUATIONS = 3
TWO_COLUMNS = 96
LABEL, FIGURE = 12, 10
# A run counts as standing still after so many times the seconds between logged steps, and at least so many.
STILL_FACTOR, STILL_SECONDS = 5.0, 10.0

_LEVELS = "▁▂▃▄▅▆▇█"
_ASCII_LEVELS = "_.-=+*%#"


@dataclass
class History:
    """One optimizer's run so far.

    Attributes:
        title: The run and its optimizer.
        total_steps: Its length.
        first_step: First step of this process.
        restarts: Number of restarts by a launcher.
        last_saved: When its newest checkpoint was complete.
        began: When this process took it up, in seconds of a monotonic clock.
        rows: Logged steps; every second is dropped when there are `MOST_ROWS`.
        recent: The newest of them, all.
        evaluations: Steps, and results on the test data there.
        skipped: Steps that were not taken.
        went_back: Number of returns to an earlier step.
        updated: When the newest row came, on the same clock.
    """

    title: str
    total_steps: int
    first_step: int
    restarts: int
    last_saved: LastSaved
    began: float
    rows: list[Status] = field(default_factory=list)
    recent: list[Status] = field(default_factory=list)
    evaluations: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    skipped: int = 0
    went_back: int = 0
    updated: float | None = None

    def add(self, status: Status, now: float) -> None:
        """Take a logged step."""
        self.rows.append(status)
        if len(self.rows) > MOST_ROWS:
            self.rows = [*self.rows[:-1:2], status]
        self.recent = [*self.recent[-RECENT_ROWS:], status]
        self.skipped += status.skipped
        self.updated = now

    def go_back(self, step: int) -> None:
        """Forget the entries after a step."""
        self.rows = [row for row in self.rows if row.step <= step]
        self.recent = []
        self.evaluations = [evaluation for evaluation in self.evaluations if evaluation[0] <= step]
        self.went_back += 1


@dataclass(frozen=True)
class Dashboard:
    """A `History` at a moment, as rich shows it.

    Args:
        history: The values to show.
        now: Seconds of the history's clock.
        wall: The same moment in seconds since 1970, which checkpoints go by.
    """

    history: History
    now: float
    wall: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines that fit."""
        # One line is left free: a terminal scrolls when its last one is full.
        yield from self.lines(options.max_width, options.size.height - 1, ascii_only=options.ascii_only)

    def lines(self, width: int, height: int, *, ascii_only: bool = False) -> list[Text]:
        """Return at most `height` lines of at most `width` cells."""
        h, levels = self.history, _ASCII_LEVELS if ascii_only else _LEVELS
        head = self._head(width, ascii_only)
        counts = _wrapped(self._counts(), width, " | " if ascii_only else " · ")
        evaluations = [Text(evaluation_line(*found)) for found in h.evaluations[-SHOWN_EVALUATIONS:]]
        beside = width >= TWO_COLUMNS
        half = width // 2 - 2 if beside else width
        curves, phases = self._curves(half, levels), self._phases(half, levels[-1])
        middle = _beside(curves, phases, half) if beside else [*curves, *phases]
        room = height - len(head)
        if len(middle) + len(counts) + len(evaluations) > room:
            evaluations = evaluations[-1:]
        if len(middle) + len(counts) + len(evaluations) > room:
            middle = curves
        if len(middle) + len(counts) + len(evaluations) > room:
            middle = curves[:1]
        shown = [*head, *middle, *counts, *evaluations][: max(height, 1)]
        for line in shown:
            line.truncate(width, overflow="crop" if ascii_only else "ellipsis")
            line.no_wrap = True
        return shown

    def _head(self, width: int, ascii_only: bool) -> list[Text]:
        h = self.history
        step, epoch = (h.rows[-1].step, h.rows[-1].epoch) if h.rows else (h.first_step, 0)
        place = f"step {step:,} of {h.total_steps:,}" + (f"   epoch {epoch}" if epoch else "")
        title = Text(h.title, style="bold")
        if len(h.title) + len(place) + 3 <= width:
            first = [title.append(" " * (width - len(h.title) - len(place)) + place, style="not bold")]
        else:
            first = [title, Text(place)]
        took, done = self.now - h.began, step - h.first_step
        if h.updated is None or not done:
            times = f"{duration(took)} so far"
        else:
            # From the newest row on, so that the time left doesn't grow while a step is under way.
            left = (h.total_steps - step) * (h.updated - h.began) / done - (self.now - h.updated)
            times = f"{duration(took)} so far, {duration(max(0.0, left))} left"
        share = step / h.total_steps if h.total_steps else 1.0
        said = f"  {math.floor(100 * share):3d} %  {times}"
        cells = max(4, width - len(said))
        full = round(share * cells)
        done_mark, open_mark = ("=", "-") if ascii_only else ("━", "─")
        bar = Text.assemble((done_mark * full, "cyan"), (open_mark * (cells - full), "dim"), said)
        return [*first, bar]

    def _curves(self, width: int, levels: str) -> list[Text]:
        rows = self.history.rows
        if not rows:
            return [Text("waiting for the first logged step", style="dim")]
        newest = rows[-1]
        shown: list[tuple[str, str, Sequence[float | None]]] = [
            ("loss", f"{newest.loss:.5g}", [row.loss for row in rows]),
            ("samples/s", f"{newest.samples_per_second:,.0f}", [row.samples_per_second for row in rows]),
        ]
        if newest.damping is not None:
            shown.append(("damping", f"{newest.damping:.3g}", [row.damping for row in rows]))
        for player, clip in newest.clips.items():
            name = f"KL clip {player[:3]}" if player else "KL clip"
            shown.append((name, f"{clip:.3g}", [row.clips.get(player) for row in rows]))
        if newest.learning_rate is not None:
            shown.append(("lr", f"{newest.learning_rate:.3g}", [row.learning_rate for row in rows]))
        cells = max(0, width - LABEL - FIGURE - 2)
        return [
            Text(f"{name:{LABEL}}{figure:>{FIGURE}}  ").append(sparkline(values, cells, levels), style="cyan")
            for name, figure, values in shown
        ]

    def _phases(self, width: int, mark: str) -> list[Text]:
        recent = self.history.recent
        if len(recent) < 2 or not recent[-1].phase_seconds:
            return []
        first, last = recent[0], recent[-1]
        steps = max(1, last.step - first.step)
        spent = {name: at - first.phase_seconds.get(name, 0.0) for name, at in last.phase_seconds.items()}
        spent["the rest"] = max(0.0, last.seconds - first.seconds - sum(spent.values()))
        milliseconds = {name: 1000 * max(0.0, seconds) / steps for name, seconds in spent.items()}
        longest = max(milliseconds.values()) or 1.0
        label = max(map(len, milliseconds)) + 1
        cells = max(0, width - label - FIGURE - 2)
        lines = [Text(f"ms a step, rank 0, over the last {steps:,} steps", style="bold")]
        for name, value in milliseconds.items():
            line = Text(f"{name:{label}}{value:>{FIGURE}.2f}  ")
            lines.append(
                line.append(mark * round(cells * value / longest), style="dim" if name == "the rest" else "cyan")
            )
        return lines

    def _counts(self) -> list[Text]:
        h = self.history
        failures = h.rows[-1].failed_inversions if h.rows else 0
        counts = [_count(h.skipped, "skipped step"), _count(h.restarts, "restart")]
        if h.went_back:
            counts.append(_count(h.went_back, "return to a checkpoint", "returns to a checkpoint"))
        if failures:
            counts.append(_count(failures, "failed inversion"))
        saved = h.last_saved()
        age = "no checkpoint yet" if saved is None else f"checkpoint {duration(max(0.0, self.wall - saved))} ago"
        counts.append(Text(age))
        still = self._still_seconds()
        if still is not None:
            counts.append(Text(f"nothing logged for {duration(still)}", style="bold yellow"))
        return counts

    def _still_seconds(self) -> float | None:
        """Return how long nothing has been logged if that is strange."""
        h = self.history
        if h.updated is None or len(h.recent) < 2 or h.recent[-1].step >= h.total_steps:
            return None
        age = self.now - h.updated
        usual = (h.recent[-1].seconds - h.recent[0].seconds) / (len(h.recent) - 1)
        return age if age > max(STILL_SECONDS, STILL_FACTOR * usual) else None


def sparkline(values: Sequence[float | None], cells: int, levels: str = _LEVELS) -> str:
    """Return a curve as one line of characters, logarithmic where all values are positive.

    Args:
        values: The curve; None and non-finite values leave a gap.
        cells: Its greatest length; longer curves are averaged.
        levels: Characters from low to high.
    """
    scaled = _logarithms(values)
    count = min(cells, len(scaled))
    if count == 0:
        return ""
    means: list[float | None] = []
    for cell in range(count):
        part = scaled[cell * len(scaled) // count : (cell + 1) * len(scaled) // count]
        known = [value for value in part if value is not None]
        means.append(sum(known) / len(known) if known else None)
    found = [value for value in means if value is not None]
    low, high = min(found, default=0.0), max(found, default=0.0)
    span = high - low

    def character(value: float | None) -> str:
        if value is None:
            return " "
        # A constant must not look like noise: values that differ by rounding are one level.
        place = (value - low) / span if span > 1e-9 * max(abs(low), abs(high)) else 0.0
        return levels[min(len(levels) - 1, int(place * len(levels)))]

    return "".join(map(character, means))


def _logarithms(values: Sequence[float | None]) -> list[float | None]:
    finite = [value if value is not None and math.isfinite(value) else None for value in values]
    if all(value > 0 for value in finite if value is not None):
        return [None if value is None else math.log(value) for value in finite]
    return finite


def _count(number: int, one: str, many: str | None = None) -> Text:
    words = one if number == 1 else many or f"{one}s"
    return Text(f"{number:,} {words}", style="bold yellow" if number else "none")


def _wrapped(parts: Sequence[Text], width: int, separator: str) -> list[Text]:
    """Join parts to as few lines as hold them whole."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + len(separator) + part.cell_len <= width:
            lines[-1].append(separator).append_text(part)
        else:
            lines.append(part.copy())
    return lines


def _beside(left: Sequence[Text], right: Sequence[Text], width: int) -> list[Text]:
    """Put two columns beside each other, the left one `width` wide."""
    rows = []
    for index in range(max(len(left), len(right))):
        row = left[index].copy() if index < len(left) else Text()
        row.truncate(width, pad=True)
        rows.append(row.append("    ").append_text(right[index]) if index < len(right) else row)
    return rows
