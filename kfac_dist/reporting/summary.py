"""The result of a run as plain values, and the table that ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table

from kfac_dist.reporting.progress import duration


@dataclass(frozen=True)
class RunSummary:
    """The result of one optimizer.

    Attributes:
        name: The optimizer: `kfac`, or the entry of `compare`.
        steps: Optimizer steps done.
        seconds: Training time, without evaluation and checkpoints.
        train_loss: Final loss on as many training samples as there are test samples; None if the run diverged.
        test_loss: Final loss on the test data.
        metric: Name of the task's figure.
        metric_value: Its final value on the test data.
        note: Reason why there are no final values.
        scores: Further figures of the test data, by name; empty where its data brings none, or the run diverged.
        evaluated: Name of the figure that stands for the loss.
        references: Figures of the test data alone, such as the score of real samples.
    """

    name: str
    steps: int
    seconds: float
    train_loss: float | None
    test_loss: float | None
    metric: str
    metric_value: float | None
    note: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    evaluated: str = "loss"
    references: dict[str, float] = field(default_factory=dict)

    @property
    def milliseconds_per_step(self) -> float:
        """Mean training time of a step."""
        return 1000 * self.seconds / self.steps if self.steps else 0.0


def result_table(title: str, rows: Sequence[RunSummary]) -> Table:
    """Return one row for each run; the best loss of each column is bold.

    Args:
        title: Shown above.
        rows: Runs of one configuration, so of one metric.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("optimizer")
    scores = next(([next(iter(row.scores))] for row in rows if row.scores), [])  # the main one; all are in result.json
    evaluated = rows[0].evaluated
    losses = (f"train {evaluated}", f"test {evaluated}")
    headings = (*losses, f"test {rows[0].metric}", *scores, "steps", "time", "ms/step")
    for heading in headings:
        table.add_column(heading, justify="right")
    best_train = min((row.train_loss for row in rows if row.train_loss is not None), default=None)
    best_test = min((row.test_loss for row in rows if row.test_loss is not None), default=None)
    for row in rows:
        table.add_row(
            row.name,
            _loss(row.train_loss, best_train, len(rows)) if row.train_loss is not None else row.note,
            _loss(row.test_loss, best_test, len(rows)),
            "–" if row.metric_value is None else f"{row.metric_value:.4g}",
            *(f"{row.scores[name]:.4g}" if name in row.scores else "–" for name in scores),
            f"{row.steps:,}",
            duration(row.seconds) if row.seconds >= 10 else f"{row.seconds:.1f} s",
            f"{row.milliseconds_per_step:.2f}",
        )
    return table


def _loss(value: float | None, best: float | None, rows: int) -> str:
    if value is None:
        return "–"
    return f"[bold]{value:.5g}[/bold]" if rows > 1 and value == best else f"{value:.5g}"
