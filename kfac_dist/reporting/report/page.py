"""The page: one file of HTML with everything inside, which follows the reader's light or dark setting."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from kfac_dist.errors import KFACError
from kfac_dist.reporting.progress import duration
from kfac_dist.reporting.report.runs import RunData

_PAGES = (".html", ".htm")


@dataclass(frozen=True)
class Section:
    """A heading, a text, and charts side by side, with a scroll bar below `min_width` pixels."""

    title: str
    text: str
    charts: Sequence[Any]
    height: int = 380
    min_width: int = 0


def write_report(runs: Sequence[RunData], path: Path) -> None:
    """Write the page.

    Args:
        runs: The runs, the one of interest first.
        path: The file to write.

    Raises:
        KFACError: plotly is missing, or the file can't be written, or may be one of a run's own.
    """
    _refuse_files_of_runs(runs, path)
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise KFACError("the report's charts need plotly: pip install 'kfac_dist[report]'") from error
    sections = list(_sections(runs))
    title = html.escape(", ".join(run.name for run in runs if ": " not in run.name))
    links = "".join(f'<a href="#s{index}">{html.escape(s.title)}</a>' for index, s in enumerate(sections))
    body = "\n".join(_section(index, section) for index, section in enumerate(sections))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · kfac_dist</title><link rel="icon" href="data:,">
<style>{_part("page.css")}</style><script>{get_plotlyjs()}</script></head>
<body><h1>{title}</h1>
{_table(runs)}
<nav>{links}<a href="#configuration">Configuration</a></nav>
{body}
<h2 id="configuration">Configuration</h2>
{"".join(_configuration(run) for run in runs)}
<script>{_part("page.js")}</script></body></html>
"""
    try:
        _write(page, path)
    except OSError as error:
        raise KFACError(f"can't write {path}: {error.strerror}") from error


def _write(page: str, path: Path) -> None:
    """Write a file that appears complete, or not at all; of a pipe or a device, write to it."""
    if path.exists() and not path.is_file():
        path.write_text(page, encoding="utf-8")
        return
    target = path.resolve()  # of a link, where it points
    partial = target.with_name(f".{os.getpid()}.part.html")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _refuse_files_of_runs(runs: Sequence[RunData], path: Path) -> None:
    """Refuse to write a page over a run's file, which the run may need to resume."""
    inside = next((run.directory for run in runs if run.directory.resolve() in path.resolve().parents), None)
    if inside is not None and path.suffix not in _PAGES:
        raise KFACError(f"--out: {path} may be a file of the run {inside}: give a name that ends in .html")


def _sections(runs: Sequence[RunData]) -> Iterator[Section]:
    from kfac_dist.reporting.report import charts

    yield Section(
        "Loss",
        "Training loss, averaged over the batches since the last point; open markers: test data.",
        [charts.losses(runs, "step", "step"), charts.losses(runs, "seconds", "seconds of training")],
    )
    if any(run.game and run.evaluations for run in runs):
        figures = [("test_loss", "Fréchet distance to held-out data"), ("test_metric", "classifier score")]
        drawn = [charts.samples(runs, key, label, log=key == "test_loss") for key, label in figures]
        yield Section("Samples", "Scores of generated samples by a classifier of the data.", drawn, 300)
    yield Section("Time of a step by phase", "Rank 0's mean over its run.", [charts.phases(runs)], 140 + 60 * len(runs))
    for run in runs:
        if run.readings:
            yield from _of_curvature(run)
    numbers: list[tuple[str, str, dict[str, Any]]] = [
        ("kfac/damping", "damping λ", {"log": True}),
        ("kfac/kl_scale", "scale of the step by the KL clip", {}),
        ("lr", "learning rate", {}),
        ("skipped", "steps skipped since the last point", {}),
        ("kfac/failed_inversions", "inversions that failed, so far", {}),
        ("kfac/raised_dampings", "factors inverted with more damping, so far", {}),
        ("kfac/dropped_statistics", "statistics dropped, so far", {}),
        ("memory_bytes", "peak memory of rank 0, GB", {"scale": 1e-9}),
    ]
    shown = [charts.over_steps(runs, key, label, **how) for key, label, how in numbers if charts.has(runs, key)]
    if shown:
        yield Section("Damping, clip, skipped steps and memory", "As logged.", shown, 300)


def _of_curvature(run: RunData) -> Iterator[Section]:
    from kfac_dist.reporting.report import factors, inversions

    timeline = inversions.timeline(run)
    [cells] = timeline.data
    yield Section(
        f"Owners of inverses: {run.name}",
        "A row is a layer's A or G, a column a recorded refresh, and the number in a cell the rank that inverted it "
        "there; the stronger the shade, the longer it took, divided in proportion to n³.",
        [timeline],
        120 + 22 * len(cells.y),
        min_width=160 + 7 * max(map(len, cells.y), default=0) + 30 * len(cells.x),
    )
    yield Section(
        f"Work of each rank: {run.name}",
        "Left: the last recorded inversions, one segment per factor, divided in proportion to n³. Right: a rank's time "
        "for its inversions at each recorded refresh.",
        [inversions.bars(run), inversions.times(run)],
        min(1600, max(380, 100 + 24 * len({reading["rank"] for reading in run.readings}))),
    )
    yield Section(
        f"Factors: {run.name}",
        "Eigenvalues of the factor selected in the menu, with the damping added to them; the condition number of the "
        "damped factor; and π, which splits the damping between A and G. Of many factors the worst conditioned, and of "
        "many blocks those with π farthest from 1, are drawn over a band of all.",
        [factors.spectra(run), factors.conditions(run), factors.splits(run)],
        440,
    )


def _section(index: int, section: Section) -> str:
    how = {"full_html": False, "include_plotlyjs": False, "default_height": section.height}
    drawn = [chart.to_html(config={"responsive": True}, **how) for chart in section.charts]
    charts = "".join(
        f'<div class="card"><div class="wide"><div style="min-width:{section.min_width}px">{chart}</div></div></div>'
        for chart in drawn
    )
    return (
        f'<h2 id="s{index}">{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>'
        f'<div class="{"pair" if len(section.charts) > 1 else ""}">{charts}</div>'
    )


def _table(runs: Sequence[RunData]) -> str:
    heads = ("run", "state", "steps", "ranks", "restarts", "train loss", "test loss", "figure", "time", "ms/step")
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _row(run)) + "</tr>" for run in runs)
    heading = "".join(f"<th>{head}</th>" for head in heads)
    return f'<div class="wide"><table><tr>{heading}</tr>{rows}</table></div>'


def _row(run: RunData) -> tuple[str, ...]:
    state = run.state
    step = run.records[-1]["step"] if run.records else 0
    seconds = run.records[-1]["seconds"] if run.records else 0.0
    result = run.result or {}
    figure = "–"
    if result.get("metric_value") is not None:
        figure = f"{result['metric']} {result['metric_value']:.4g}"
    return (
        run.name,
        "–" if state is None else f"{state.state}{f' ({state.reason})' if state.reason else ''}",
        f"{step:,}",
        "–" if state is None else str(state.ranks),
        "–" if state is None else str(state.restarts),
        _evaluated(result, "train_loss"),
        _evaluated(result, "test_loss"),
        figure,
        duration(seconds) if seconds >= 10 else f"{seconds:.1f} s",
        f"{1000 * seconds / step:.2f}" if step else "–",
    )


def _part(name: str) -> str:
    return (files("kfac_dist.reporting.report") / name).read_text()


def _evaluated(result: dict[str, Any], key: str) -> str:
    """Return a run's final loss with its name; in a game, the name of its substitute."""
    value, name = _number(result.get(key)), result.get("evaluated", "loss")
    return value if name == "loss" or value == "–" else f"{name} {value}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.5g}"


def _configuration(run: RunData) -> str:
    return f"<details><summary>{html.escape(run.name)}</summary><pre>{html.escape(run.configuration)}</pre></details>"
