"""One picture of the training losses: per step and per second, all compared runs, readable without colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfac_dist.errors import KFACError

# Okabe & Ito's colours, which the colour-blind tell apart; beside them, every run has its own line style and marker.
STYLES: tuple[tuple[str, Any, str], ...] = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#56B4E9", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#E69F00", (0, (1, 1)), "P"),
)
MARKERS_PER_LINE = 9
SMOOTH_ABOVE = 150


@dataclass(frozen=True)
class Curve:
    """The training loss of one run.

    Attributes:
        name: Shown in the legend.
        steps: Logged optimizer steps.
        seconds: Training time at each.
        losses: Training loss at each.
    """

    name: str
    steps: Sequence[int]
    seconds: Sequence[float]
    losses: Sequence[float]


def draw_losses(curves: Sequence[Curve], path: Path, title: str) -> None:
    """Write the picture as PNG.

    Args:
        curves: The runs, the one of interest first.
        path: The file to write.
        title: Shown above both panels.

    Raises:
        KFACError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KFACError("the picture of the losses needs matplotlib: pip install 'kfac_dist[train]'") from error
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: no window system, no global state
    per_step, per_second = figure.subplots(1, 2, sharey=True)
    for index, curve in enumerate(curves):
        _draw(per_step, curve, curve.steps, index)
        _draw(per_second, curve, curve.seconds, index)
    for axes, unit, label in ((per_step, "step", "optimizer step"), (per_second, "second", "training time in seconds")):
        axes.set_title(f"Training loss per {unit}", fontsize=11)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        if any(loss > 0 for curve in curves for loss in curve.losses):
            axes.set_yscale("log")
            _plain_numbers(axes)
        axes.grid(visible=True, which="major", color="#cccccc", linewidth=0.7)
        axes.grid(visible=True, which="minor", color="#eeeeee", linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    per_step.set_ylabel("training loss (mean over terms, log scale)")
    per_second.legend(frameon=False)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and its up to `window − 1` predecessors."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        means.append(total / min(index + 1, window))
    return means


def _draw(axes: Any, curve: Curve, positions: Sequence[float], index: int) -> None:
    colour, line, marker = STYLES[index % len(STYLES)]
    window = max(1, len(curve.losses) // SMOOTH_ABOVE)
    if window > 1:  # batches are noisy: the raw losses stay visible, faintly
        axes.plot(positions, curve.losses, color=colour, linewidth=0.5, alpha=0.25)
    axes.plot(
        positions,
        smoothed(curve.losses, window),
        label=curve.name,
        color=colour,
        linestyle=line,
        linewidth=1.7,
        marker=marker,
        markersize=4.5,
        markevery=max(1, len(positions) // MARKERS_PER_LINE),
    )


def _plain_numbers(axes: Any) -> None:
    """Label 1, 2 and 5 of every decade, as `20` rather than `2 × 10¹`."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
