"""The style of the report's charts: curves, bars and axes, without the page's colours, which its style sheet has.

Every curve and bar differs from its neighbours by dash, marker or pattern, too: the page is readable without colour.
"""

from __future__ import annotations

import html
from typing import Any

from plotly import graph_objects as go

# Okabe & Ito's colours, which the colour-blind tell apart, on light and on dark ground.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C8C8C")
DASHES = ("solid", "dash", "dashdot", "dot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x")
PATTERNS = ("", "/", "x", "-", "|", "+", ".", "\\")
GREY = "rgba(128,128,128,0.9)"
_MARKED_POINTS = 60
_MARKS = 15


def style(index: int, points: int) -> dict[str, Any]:
    """Return how the index-th curve of a chart looks."""
    colour = COLOURS[index % len(COLOURS)]
    # There are fewer dashes than curves of some charts: long curves keep a few of their markers.
    marks = 0 if points <= _MARKED_POINTS else _MARKS
    return {
        "mode": "lines+markers",
        "line": {"color": colour, "dash": DASHES[index % len(DASHES)], "width": 2},
        "marker": {"color": colour, "symbol": MARKERS[index % len(MARKERS)], "size": 6, "maxdisplayed": marks},
    }


def bar(index: int) -> dict[str, Any]:
    """Return how the index-th part of a bar looks."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        # Over the colour, not in place of it: text inside stays readable.
        "pattern": {"shape": PATTERNS[index % len(PATTERNS)], "fillmode": "overlay", "size": 7, "solidity": 0.25},
        "line": {"width": 1, "color": GREY},
    }


def plain(name: str) -> str:
    """Return a name as plotly shows it: its texts know some of HTML's tags."""
    return html.escape(name, quote=False)


def titled(figure: go.Figure, x: str, y: str, *, log: bool = False) -> go.Figure:
    """Return a figure with titles of its axes, and with the page's margins and legend."""
    figure.update_layout(
        xaxis_title=x,
        yaxis_title=y,
        margin={"l": 70, "r": 20, "t": 40, "b": 40},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "traceorder": "normal"},
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


def with_menu(figure: go.Figure, label: str, traces: list[int], choices: dict[str, dict[str, Any]]) -> go.Figure:
    """Return a figure above which the page puts a menu.

    Args:
        figure: The chart.
        label: Of the menu.
        traces: The traces that a choice changes.
        choices: Arguments of `Plotly.restyle` by name; the figure shows the first one.
    """
    named = [[plain(name), change] for name, change in choices.items()]  # a script's objects would sort numbers first
    figure.update_layout(meta={"label": label, "traces": traces, "choices": named})
    return figure
