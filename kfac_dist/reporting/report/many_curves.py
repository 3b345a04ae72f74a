"""Many curves on one chart: the few that stand out, a band of all, and one more that a menu chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from plotly import graph_objects as go

from kfac_dist.reporting.report.chart_style import GREY, plain, style, with_menu

DRAWN = 10
Values = Sequence[float | None]
Curves = Mapping[str, tuple[Sequence[int], Values]]


def draw_many(curves: Curves, excess: Callable[[Values], float], what: str) -> go.Figure:
    """Draw curves by name, all of them if they are few.

    Args:
        curves: Steps and values of each; a value is None where it is infinite.
        excess: A curve's distance from the others; those with the largest are drawn, the largest first.
        what: Their name, in the plural.
    """
    figure = go.Figure()
    if len(curves) <= DRAWN + 2:
        for index, name in enumerate(curves):
            _add(figure, curves, name, index)
        return figure
    _add_band(figure, curves, what)
    drawn = sorted(curves, key=lambda name: -excess(curves[name][1]))[:DRAWN]
    for index, name in enumerate(drawn):
        _add(figure, curves, name, index)
    figure.add_scatter(x=[], y=[], visible=False, **style(DRAWN, 0))
    choices = {"none": {"visible": [False]}} | {
        name: {"x": [x], "y": [y], "name": [plain(name)], "visible": [True]}
        for name, (x, y) in curves.items()
        if name not in drawn
    }
    return with_menu(figure, f"one more of {len(curves)} {what}", [len(figure.data) - 1], choices)


def _add(figure: go.Figure, curves: Curves, name: str, index: int) -> None:
    x, y = curves[name]
    figure.add_scatter(x=x, y=y, name=plain(name), **style(index, len(x)))


def _add_band(figure: go.Figure, curves: Curves, what: str) -> None:
    at = _known_at(curves)
    steps = list(at)
    edge = {"x": steps, "mode": "lines", "line": {"color": GREY, "width": 1}}
    figure.add_scatter(y=[min(at[step]) for step in steps], name="smallest", showlegend=False, **edge)
    figure.add_scatter(
        y=[max(at[step]) for step in steps],
        name=f"all {len(curves)} {what}",
        fill="tonexty",
        fillcolor="rgba(128,128,128,0.2)",
        **edge,
    )
    middle = {"color": GREY, "width": 4, "dash": "dot"}
    figure.add_scatter(x=steps, y=[median(at[step]) for step in steps], name="their median", mode="lines", line=middle)


def _known_at(curves: Curves) -> dict[int, list[float]]:
    """Return every curve's last value by step; where refreshes take turns, few are read in one step."""
    at: dict[int, list[float]] = {step: [] for step in sorted({step for x, _ in curves.values() for step in x})}
    for x, y in curves.values():
        read, last = dict(zip(x, y, strict=True)), None
        for step, values in at.items():
            last = read.get(step, last)
            if last is not None:
                values.append(last)
    return {step: values for step, values in at.items() if values}
