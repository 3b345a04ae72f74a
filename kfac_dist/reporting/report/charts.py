"""The report's charts of whole runs: losses, time of a step by phase, and logged numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from plotly import graph_objects as go

from kfac_dist.reporting.report.chart_style import COLOURS, MARKERS, bar, plain, style, titled
from kfac_dist.reporting.report.runs import RunData


def losses(runs: Sequence[RunData], against: str, label: str) -> go.Figure:
    """Draw training and test loss of all runs against `step` or `seconds`."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        found = _with_loss(run)
        looks = style(index, len(found))
        x, y = [record[against] for record in found], [record["loss"] for record in found]
        figure.add_scatter(x=x, y=y, name=plain(run.name), **looks)
        if against == "step" and run.evaluations and not run.game:
            figure.add_scatter(
                x=[record["step"] for record in run.evaluations],
                y=[record["test_loss"] for record in run.evaluations],
                name=f"{plain(run.name)}, test",
                mode="markers",
                marker={"symbol": f"{MARKERS[index % len(MARKERS)]}-open", "size": 9, "color": looks["line"]["color"]},
            )
    positive = all(record["loss"] > 0 for run in runs for record in _with_loss(run))
    return titled(figure, label, "training loss", log=positive)


def phases(runs: Sequence[RunData]) -> go.Figure:
    """Draw where a mean step's time goes, a bar a run."""
    figure = go.Figure()
    parts: dict[str, list[float]] = {}
    for place, run in enumerate(runs):
        for name, value in _parts(run).items():
            parts.setdefault(name, [0.0] * len(runs))[place] = value
    for index, (name, values) in enumerate(parts.items()):
        figure.add_bar(
            y=[plain(run.name) for run in runs],
            x=values,
            name=name,
            orientation="h",
            marker=bar(index) | {"color": COLOURS[index - 1]},
            hovertemplate="%{y}<br>" + name + ": %{x:.3f} ms a step<extra></extra>",
        )
    figure.update_layout(barmode="stack", yaxis={"autorange": "reversed", "type": "category"})
    return titled(figure, "milliseconds a step, rank 0", "")


def _with_loss(run: RunData) -> list[dict[str, Any]]:
    return [record for record in run.records if "loss" in record]


def _parts(run: RunData) -> dict[str, float]:
    """Return milliseconds of a mean step by phase, in the order of a step."""
    if not run.records:
        return {}
    last = run.records[-1]
    steps = max(1, last["step"] - _began(run))
    own = {
        f"K-FAC {name.removeprefix('kfac/seconds/')}": 1000 * value / steps
        for name, value in last.items()
        if name.startswith("kfac/seconds/")
    }
    whole = 1000 * last["seconds"] / max(1, last["step"])
    return {"model and optimizer": max(0.0, whole - sum(own.values()))} | own


def _began(run: RunData) -> int:
    """Return the step at which the process that logged last began: K-FAC's seconds are its own."""
    key = next((name for name in run.records[-1] if name.startswith("kfac/seconds/")), None)
    if key is None:
        return 0
    began, before = 0, 0.0
    for previous, record in zip([None, *run.records], run.records, strict=False):
        if record.get(key, 0.0) < before and previous is not None:
            began = previous["step"]
        before = record.get(key, 0.0)
    return int(began)


def over_steps(runs: Sequence[RunData], key: str, label: str, *, scale: float = 1.0, log: bool = False) -> go.Figure:
    """Draw one logged number of all runs that have it."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        found = [(record["step"], record[key] * scale) for record in run.records if key in record]
        if found:
            x, y = zip(*found, strict=True)
            figure.add_scatter(x=x, y=y, name=plain(run.name), **style(index, len(found)))
    return titled(figure, "step", label, log=log)


def samples(runs: Sequence[RunData], key: str, label: str, *, log: bool = False) -> go.Figure:
    """Draw a number of the evaluations of games."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        if run.game and run.evaluations:
            x, y = [record["step"] for record in run.evaluations], [record[key] for record in run.evaluations]
            figure.add_scatter(x=x, y=y, name=plain(run.name), **style(index, len(x)))
    return titled(figure, "step", label, log=log)


def has(runs: Iterable[RunData], key: str) -> bool:
    """Whether any of the runs has logged a number."""
    return any(key in record for run in runs for record in run.records)
