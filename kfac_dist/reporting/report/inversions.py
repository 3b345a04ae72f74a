"""Charts of inversions by owner: factors over refreshes, the work of each rank by factor, its time over the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from plotly import graph_objects as go

from kfac_dist.reporting.report.chart_style import GREY, bar, plain, titled
from kfac_dist.reporting.report.many_curves import Values, draw_many
from kfac_dist.reporting.report.runs import RunData, numbered, readings_of_factors

ROWS = 40
REFRESHES = 120
SEGMENTS = 30
_PARTS = 8

Found = list[tuple[dict[str, Any], float]]


def timeline(run: RunData) -> go.Figure:
    """Draw the owner of each layer's A and G at each refresh that was read, and the milliseconds that it took.

    Of many the costliest are drawn, of many refreshes the last.
    """
    cells: dict[tuple[str, int], Found] = {}
    costs: Counter[str] = Counter()
    for factor, milliseconds in readings_of_factors(run):
        row = f"{factor['block']} {factor['side']}"
        cells.setdefault((row, factor["step"]), []).append((factor, milliseconds))
        costs[row] += factor["cost"]
    rows = sorted([row for row, _ in costs.most_common(ROWS)], key=numbered)
    steps = sorted({step for _, step in cells})
    shown = steps[-REFRESHES:]
    grid = [[cells.get((row, step), []) for step in shown] for row in rows]
    times = [[sum(milliseconds for _, milliseconds in cell) if cell else None for cell in cells] for cells in grid]
    figure = go.Figure()
    figure.add_heatmap(
        x=[str(step) for step in shown],
        y=[plain(row) for row in rows],
        z=times,
        zmin=0,
        zmax=max((time for row in times for time in row if time is not None), default=1),
        text=[[_ranks(cell) for cell in cells] for cells in grid],
        texttemplate="%{text}",
        hovertext=[[_told(cell) for cell in cells] for cells in grid],
        hovertemplate="%{hovertext}<extra></extra>",
        hoverongaps=False,
        xgap=2,
        ygap=2,
        # Stands until the page dresses it in shades on which its ink is readable.
        colorscale="Blues",
        colorbar={"title": {"text": "ms"}, "thickness": 12},
    )
    left_out = [
        *([f"the {ROWS} costliest of {len(costs)} rows"] if len(rows) < len(costs) else []),
        *([f"the last {REFRESHES} of {len(steps)} refreshes"] if len(shown) < len(steps) else []),
    ]
    titled(figure, "; ".join(["step of the refresh", *left_out]), "")
    figure.update_xaxes(type="category", showgrid=False)  # refreshes aren't evenly far apart
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, dtick=1)
    return figure


def bars(run: RunData) -> go.Figure:
    """Draw each rank's inversions: one bar per rank, one segment per factor, as last read."""
    last = {factor["unit"]: (factor, milliseconds) for factor, milliseconds in readings_of_factors(run)}
    by_rank: dict[int, Found] = {}
    for factor, milliseconds in sorted(last.values(), key=lambda reading: -reading[0]["cost"]):
        by_rank.setdefault(factor["rank"], []).append((factor, milliseconds))
    figure = go.Figure()
    for place in range(min(SEGMENTS, max(map(len, by_rank.values()), default=0))):
        # The segments that are this far from their bars' beginnings look alike, and unlike their neighbours.
        found = [own[place] for own in by_rank.values() if place < len(own)]
        figure.add_bar(
            y=[f"rank {factor['rank']}" for factor, _ in found],
            x=[milliseconds for _, milliseconds in found],
            marker=bar(place),
            text=[plain(factor["unit"]) for factor, _ in found],
            hovertext=[_told([reading]) for reading in found],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    _add_rest(figure, {rank: own[SEGMENTS:] for rank, own in by_rank.items() if len(own) > SEGMENTS})
    figure.update_traces(
        orientation="h", showlegend=False, textposition="inside", insidetextanchor="middle", textangle=0
    )
    order = [f"rank {rank}" for rank in sorted(by_rank, reverse=True)]
    figure.update_layout(
        barmode="stack",
        yaxis={"categoryorder": "array", "categoryarray": order},
        uniformtext={"minsize": 9, "mode": "hide"},  # names only where there is room
    )
    return titled(figure, f"milliseconds, {_when([factor['step'] for factor, _ in last.values()])}", "")


def times(run: RunData) -> go.Figure:
    """Draw the seconds of inverting over the run: of the slowest ranks, and how those of all are spread."""
    by_rank: dict[int, dict[int, float]] = {}
    for reading in run.readings:
        own = by_rank.setdefault(reading["rank"], {})  # a game's players are read one after the other
        own[reading["step"]] = own.get(reading["step"], 0.0) + 1000 * reading["seconds"]
    curves = {f"rank {rank}": (list(own), list(own.values())) for rank, own in sorted(by_rank.items())}
    return titled(draw_many(curves, _mean, "ranks"), "step", "milliseconds of inverting")


def _add_rest(figure: go.Figure, by_rank: dict[int, Found]) -> None:
    """Add to each bar one segment for all factors that are too small to be distinguished."""
    if by_rank:
        sums = [sum(milliseconds for _, milliseconds in own) for own in by_rank.values()]
        texts = [f"{len(own)} smaller" for own in by_rank.values()]
        figure.add_bar(
            y=[f"rank {rank}" for rank in by_rank],
            x=sums,
            marker={"color": "rgba(128,128,128,0.25)", "line": {"width": 1, "color": GREY}},
            text=texts,
            hovertemplate="%{text}: %{x:.2f} ms, by n³<extra></extra>",
        )


def _when(steps: Sequence[int]) -> str:
    """Return when the factors of a bar were last read; where refreshes take turns, not all at one step."""
    first, last = min(steps, default=0), max(steps, default=0)
    return f"refresh at step {last}" if first == last else f"each factor's last refresh, steps {first} to {last}"


def _ranks(cell: Found) -> str:
    ranks = sorted({factor["rank"] for factor, _ in cell})
    return ",".join(map(str, ranks)) if len(ranks) <= 2 else f"{ranks[0]},{ranks[1]},…"


def _told(cell: Found) -> str:
    """Return the hover text: each factor, its rank, time and step."""
    parts = sorted(cell, key=lambda reading: -reading[1])
    lines = [
        f"{plain(factor['unit'])}, {factor['dim']}×{factor['dim']}: rank {factor['rank']}, "
        f"{milliseconds:.2f} ms of its refresh at step {factor['step']}, by n³"
        for factor, milliseconds in parts[:_PARTS]
    ]
    more = [f"and {len(parts) - _PARTS} more"] if len(parts) > _PARTS else []
    return "<br>".join([*lines, *more])


def _mean(values: Values) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)
