"""The results of runs: summaries, and the files and the table that compare them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from kfac_dist.reporting.curves import Curve, draw_losses
from kfac_dist.reporting.run_file import write_whole
from kfac_dist.reporting.summary import RunSummary, result_table
from kfac_dist.training.loop import Trainer
from kfac_dist.training.records.metrics import read_metrics

# Of a result table that no terminal shows: a file has room for all of its columns.
PIPE_WIDTH = 160


def summarize(name: str, trainer: Trainer) -> RunSummary:
    """Evaluate a run that has ended; collective."""
    test = trainer.evaluate(trainer.parts.test)
    trainer.show(test)
    train_loss = trainer.evaluate(trainer.parts.train, samples=len(trainer.parts.test)).loss
    return RunSummary(
        name=name,
        steps=trainer.step,
        seconds=trainer.stopwatch.seconds,
        train_loss=train_loss,
        test_loss=test.loss,
        metric=trainer.parts.loss.metric,
        metric_value=test.metric,
        scores=test.scores,
        references=test.references,
        evaluated=trainer.parts.loss.evaluated,
    )


def diverged(name: str, directory: Path) -> RunSummary:
    """Return the summary of a run that diverged, from what it has logged."""
    records = _losses(directory)
    step, seconds = (records[-1]["step"], records[-1]["seconds"]) if records else (0, 0.0)
    return RunSummary(name, step, seconds, None, None, "metric", None, note="diverged")


def write_result(summary: RunSummary, directory: Path) -> None:
    """Write a run's own `result.json`."""
    write_whole(directory / "result.json", json.dumps(_plain(summary), indent=2) + "\n")


def write_comparison(runs: Sequence[RunSummary], run: str, directory: Path) -> None:
    """Write and print the results of a run and of those that it was compared with.

    Args:
        runs: The run itself first.
        run: Its name.
        directory: Its files, those of the others below.
    """
    folders = [directory, *(directory / f"compare-{other.name}" for other in runs[1:])]
    write_whole(directory / "result.json", json.dumps([_plain(summary) for summary in runs], indent=2) + "\n")
    curves = [_curve(summary.name, folder) for summary, folder in zip(runs, folders, strict=True)]
    draw_losses(curves, directory / "loss.png", run)
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    console.print(result_table(f"{run}: {directory}", runs))


def _curve(name: str, directory: Path) -> Curve:
    records = _losses(directory)
    return Curve(
        name,
        [record["step"] for record in records],
        [record["seconds"] for record in records],
        [record["loss"] for record in records],
    )


def _losses(directory: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]


def _plain(summary: RunSummary) -> dict[str, Any]:
    return {**asdict(summary), "milliseconds_per_step": summary.milliseconds_per_step}
