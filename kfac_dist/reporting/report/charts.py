"""The report's charts: plotly figures without colours of the page, which come from its style sheet.

Every curve and bar differs from its neighbours by dash, marker or pattern, too: the page is readable without colour.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from plotly import graph_objects as go

from kfac_dist.reporting.report.runs import RunData

# Okabe & Ito's colours, which the colour-blind tell apart, on light and on dark ground.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C8C8C")
DASHES = ("solid", "dash", "dashdot", "dot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")
PATTERNS = ("", "/", "x", "-", "|", "+", ".", "\\")
_MARKERS_PER_LINE = 60
_NAMED_FACTORS = 12


def style(index: int, points: int) -> dict[str, Any]:
    """Return how the index-th curve of a chart looks."""
    colour = COLOURS[index % len(COLOURS)]
    marked = points <= _MARKERS_PER_LINE
    return {
        "mode": "lines+markers" if marked else "lines",
        "line": {"color": colour, "dash": DASHES[index % len(DASHES)], "width": 2},
        "marker": {"color": colour, "symbol": MARKERS[index % len(MARKERS)], "size": 6},
    }


def losses(runs: Sequence[RunData], against: str, label: str) -> go.Figure:
    """Draw training and test loss of all runs against `step` or `seconds`."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        looks = style(index, len(run.records))
        x = [record[against] for record in run.records]
        figure.add_scatter(x=x, y=[record["loss"] for record in run.records], name=_plain(run.name), **looks)
        if against == "step" and run.evaluations and not run.game:
            figure.add_scatter(
                x=[record["step"] for record in run.evaluations],
                y=[record["test_loss"] for record in run.evaluations],
                name=f"{_plain(run.name)}, test",
                mode="markers",
                marker={"symbol": f"{MARKERS[index % len(MARKERS)]}-open", "size": 9, "color": looks["line"]["color"]},
            )
    positive = all(record["loss"] > 0 for run in runs for record in run.records)
    return _titled(figure, label, "training loss", log=positive)


def phases(runs: Sequence[RunData]) -> go.Figure:
    """Draw where a mean step's time goes, a bar a run."""
    figure = go.Figure()
    parts: dict[str, list[float]] = {}
    for place, run in enumerate(runs):
        for name, value in _parts(run).items():
            parts.setdefault(name, [0.0] * len(runs))[place] = value
    for index, (name, values) in enumerate(parts.items()):
        figure.add_bar(
            y=[_plain(run.name) for run in runs],
            x=values,
            name=name,
            orientation="h",
            marker={"color": COLOURS[index - 1], "pattern": {"shape": PATTERNS[index % len(PATTERNS)]}},
            hovertemplate="%{y}<br>" + name + ": %{x:.3f} ms a step<extra></extra>",
        )
    figure.update_layout(barmode="stack", yaxis={"autorange": "reversed"})
    return _titled(figure, "milliseconds a step, rank 0", "")


def _parts(run: RunData) -> dict[str, float]:
    """Return milliseconds of a mean step by what took them, in the order of a step."""
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


def inversions(run: RunData) -> go.Figure:
    """Draw who inverted what when spectra were last read: a bar a rank, a segment a factor."""
    figure = go.Figure()
    last = _last_of_each_factor(run)
    ranks = sorted({factor["rank"] for factor, _ in last})
    for index, (factor, milliseconds) in enumerate(sorted(last, key=lambda found: -found[0]["cost"])):
        figure.add_bar(
            y=[f"rank {factor['rank']}"],
            x=[milliseconds],
            orientation="h",
            marker={
                "color": COLOURS[index % len(COLOURS)],
                "pattern": {"shape": PATTERNS[(index // len(COLOURS)) % len(PATTERNS)]},
                "line": {"width": 1, "color": "rgba(128,128,128,0.6)"},
            },
            name=_plain(factor["unit"]),
            showlegend=False,
            text=_plain(factor["unit"]) if index < _NAMED_FACTORS else None,
            textposition="inside",
            hovertemplate=f"{_plain(factor['unit'])}: {factor['dim']}×{factor['dim']}<br>rank {factor['rank']}, "
            f"{milliseconds:.2f} ms of its refresh, by n³<extra></extra>",
        )
    order = [f"rank {rank}" for rank in reversed(ranks)]
    figure.update_layout(barmode="stack", yaxis={"categoryorder": "array", "categoryarray": order})
    return _titled(figure, "milliseconds of one refresh", "")


def refreshes(run: RunData) -> go.Figure:
    """Draw each rank's seconds of inverting over the run."""
    figure = go.Figure()
    for index, rank in enumerate(sorted({reading["rank"] for reading in run.readings})):
        own: dict[int, float] = {}  # a game's players are read one after the other
        for reading in run.readings:
            if reading["rank"] == rank:
                own[reading["step"]] = own.get(reading["step"], 0.0) + 1000 * reading["seconds"]
        figure.add_scatter(x=list(own), y=list(own.values()), name=f"rank {rank}", **style(index, len(own)))
    return _titled(figure, "step", "milliseconds of inverting")


def conditions(run: RunData) -> go.Figure:
    """Draw the damped condition number of every factor over the run."""
    figure = go.Figure()
    for index, (unit, found) in enumerate(_by_factor(run).items()):
        figure.add_scatter(
            x=[factor["step"] for factor in found],
            y=[factor["condition"] for factor in found],
            name=_plain(unit),
            **style(index, len(found)),
        )
    return _titled(figure, "step", "(largest + damping) / (smallest + damping)", log=True)


def spectra(run: RunData) -> go.Figure:
    """Draw a factor's eigenvalues over the run, as a band of quantiles; a menu chooses the factor."""
    figure = go.Figure()
    factors = {unit: found for unit, found in _by_factor(run).items() if found[0]["spectrum"][0] is not None}
    shares = ((0.0, "smallest"), (0.25, "a quarter"), (0.5, "median"), (0.75, "three quarters"), (1.0, "largest"))
    for place, found in enumerate(factors.values()):
        for index, (share, name) in enumerate(shares):
            values = [_at(factor["spectrum"], share) for factor in found]
            figure.add_scatter(
                x=[factor["step"] for factor in found],
                # A logarithmic axis has no place for what rounding took to 0 or below.
                y=[value if value > 0 else None for value in values],
                name=name,
                visible=place == 0,
                **style(index, len(found)),
            )
        figure.add_scatter(
            x=[factor["step"] for factor in found],
            y=[factor["damping"] or None for factor in found],
            name="damping",
            mode="lines",
            line={"color": "rgba(128,128,128,0.9)", "width": 3, "dash": "dot"},
            visible=place == 0,
        )
    count = len(shares) + 1
    buttons = [
        {
            "label": _plain(unit),
            "method": "restyle",
            "args": [{"visible": [index // count == place for index in range(count * len(factors))]}],
        }
        for place, unit in enumerate(factors)
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.22, "yanchor": "top", "showactive": True}
    figure.update_layout(updatemenus=[menu] if buttons else [])
    return _titled(figure, "step", "eigenvalues", log=True)


def splits(run: RunData) -> go.Figure:
    """Draw π of every block over the run: how damping is split over A and G."""
    figure = go.Figure()
    dampings: dict[str, dict[int, dict[str, float]]] = {}
    for reading in run.readings:
        for factor in reading["factors"]:
            at = dampings.setdefault(factor["block"], {}).setdefault(factor["step"], {})
            at[factor["side"]] = factor["damping"]
    index = 0
    for block, by_step in dampings.items():
        points = [(step, math.sqrt(at["A"] / at["G"])) for step, at in by_step.items() if at.get("A") and at.get("G")]
        if points:
            x, y = zip(*points, strict=True)
            figure.add_scatter(x=x, y=y, name=_plain(block), **style(index, len(points)))
            index += 1
    return _titled(figure, "step", "π", log=True)


def over_steps(runs: Sequence[RunData], key: str, label: str, *, scale: float = 1.0, log: bool = False) -> go.Figure:
    """Draw one logged number of all runs that have it."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        found = [(record["step"], record[key] * scale) for record in run.records if key in record]
        if found:
            x, y = zip(*found, strict=True)
            figure.add_scatter(x=x, y=y, name=_plain(run.name), **style(index, len(found)))
    return _titled(figure, "step", label, log=log)


def samples(runs: Sequence[RunData], key: str, label: str, *, log: bool = False) -> go.Figure:
    """Draw a number of the evaluations of games."""
    figure = go.Figure()
    for index, run in enumerate(runs):
        if run.game and run.evaluations:
            x, y = [record["step"] for record in run.evaluations], [record[key] for record in run.evaluations]
            figure.add_scatter(x=x, y=y, name=_plain(run.name), **style(index, len(x)))
    return _titled(figure, "step", label, log=log)


def has(runs: Iterable[RunData], key: str) -> bool:
    """Whether any of the runs has logged a number."""
    return any(key in record for run in runs for record in run.records)


def _plain(name: str) -> str:
    """Return a name as plotly shows it: its texts know some of HTML's tags."""
    return html.escape(name, quote=False)


def _at(spectrum: Sequence[float], share: float) -> float:
    return spectrum[round(share * (len(spectrum) - 1))]


def _by_factor(run: RunData) -> dict[str, list[dict[str, Any]]]:
    factors: dict[str, list[dict[str, Any]]] = {}
    for reading in run.readings:
        for factor in reading["factors"]:
            factors.setdefault(factor["unit"], []).append(factor)
    return dict(sorted(factors.items()))


def _last_of_each_factor(run: RunData) -> list[tuple[dict[str, Any], float]]:
    """Return the last reading of every factor, and its milliseconds: its share by n³ of what was solved with it."""
    last = {}
    for reading in run.readings:
        total = sum(factor["cost"] for factor in reading["factors"]) or 1.0
        for factor in reading["factors"]:
            last[factor["unit"]] = factor, 1000 * reading["seconds"] * factor["cost"] / total
    return [last[unit] for unit in sorted(last)]


def _titled(figure: go.Figure, x: str, y: str, *, log: bool = False) -> go.Figure:
    figure.update_layout(
        xaxis_title=x,
        yaxis_title=y,
        margin={"l": 70, "r": 20, "t": 40, "b": 40},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        hovermode="closest",
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(automargin=True, title_standoff=8)
    figure.update_yaxes(automargin=True)
    if log:
        figure.update_yaxes(type="log", exponentformat="power")
    return figure
