"""Charts of the factors over a run: spectra, condition numbers of the damped factors, and the split of damping."""

from __future__ import annotations

import math
from collections.abc import Sequence

from plotly import graph_objects as go

from kfac_dist.reporting.report.chart_style import GREY, style, titled, with_menu
from kfac_dist.reporting.report.many_curves import Values, draw_many
from kfac_dist.reporting.report.runs import RunData, by_factor

_SHARES = {"smallest": 0.0, "a quarter": 0.25, "median": 0.5, "three quarters": 0.75, "largest": 1.0}


def spectra(run: RunData) -> go.Figure:
    """Draw a factor's eigenvalues over the run, as a band of quantiles; a menu chooses the factor."""
    figure = go.Figure()
    factors = {unit: found for unit, found in by_factor(run).items() if found[0]["spectrum"][0] is not None}
    choices = {}
    for unit, found in factors.items():
        curves = [[_drawn(_at(factor["spectrum"], share)) for factor in found] for share in _SHARES.values()]
        damping = [_drawn(factor["damping"]) for factor in found]
        choices[unit] = {"x": [[factor["step"] for factor in found]], "y": [*curves, damping]}
    if choices:
        first = next(iter(choices.values()))
        [x] = first["x"]
        for index, (name, y) in enumerate(zip(_SHARES, first["y"], strict=False)):
            figure.add_scatter(x=x, y=y, name=name, **style(index, len(x)))
        line = {"color": GREY, "width": 3, "dash": "dot"}
        figure.add_scatter(x=x, y=first["y"][-1], name="damping", mode="lines", line=line)
        with_menu(figure, "factor", list(range(len(figure.data))), choices)
    return titled(figure, "step", "eigenvalues", log=True)


def conditions(run: RunData) -> go.Figure:
    """Draw the damped condition numbers over the run: of the worst factors, and how those of all are spread."""
    curves = {
        unit: ([factor["step"] for factor in found], [factor["condition"] for factor in found])
        for unit, found in by_factor(run).items()
    }
    return titled(draw_many(curves, _worst, "factors"), "step", "(largest + damping) / (smallest + damping)", log=True)


def splits(run: RunData) -> go.Figure:
    """Draw π over the run, how damping is split over A and G: of the blocks that are farthest from 1, and of all."""
    dampings: dict[str, dict[int, dict[str, float]]] = {}
    for found in by_factor(run).values():
        for factor in found:
            at = dampings.setdefault(factor["block"], {}).setdefault(factor["step"], {})
            at[factor["side"]] = factor["damping"]
    curves = {}
    for block, by_step in dampings.items():
        points = [(step, math.sqrt(at["A"] / at["G"])) for step, at in by_step.items() if at.get("A") and at.get("G")]
        if points:
            curves[block] = ([step for step, _ in points], [split for _, split in points])
    return titled(draw_many(curves, _farthest, "blocks"), "step", "π", log=True)


def _worst(values: Values) -> float:
    return max(math.inf if value is None else value for value in values)


def _farthest(values: Values) -> float:
    return max(abs(math.log(value)) for value in values if value is not None)


def _at(spectrum: Sequence[float], share: float) -> float:
    return spectrum[round(share * (len(spectrum) - 1))]


def _drawn(value: float) -> float | None:
    """Return a value for a logarithmic axis, which can't show values that rounding made 0 or negative."""
    return float(f"{value:.4g}") if value > 0 else None
