"""Pictures of results that are tables of bars: for each file of benchmarks/results/ whose program draws none itself.

    python -m benchmarks.pictures [NAME …]

Bars differ by hatching as well as by colour.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.reporting import RESULTS
from kfac_dist.reporting.curves import STYLES

HATCHES = ("", "///", "...", "\\\\\\", "xx")
BAR_INCHES = 0.17


@dataclass(frozen=True)
class Panel:
    """Bars: of each row one for each series that it has."""

    title: str
    unit: str
    rows: dict[str, dict[str, float]]

    @property
    def series(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))

    @property
    def inches(self) -> float:
        return 1.0 + len(self.rows) * (0.12 + BAR_INCHES * len(self.series))


def prediction(results: Any) -> Iterator[Panel]:
    for ranks in sorted({case["ranks"] for case in results["cases"]}):
        own = [case for case in results["cases"] if case["ranks"] == ranks]
        yield Panel(
            f"{ranks} rank{'s' * (ranks > 1)}: added to an average step at 10/100",
            "ms",
            {
                f"{case['model']}: {case['strategy']} ({100 * case['error']:+.0f} %)": {
                    "predicted": case["predicted_ms"],
                    "measured": case["measured_ms"],
                }
                for case in own
            },
        )


def sharing(results: Any) -> Iterator[Panel]:
    ways = ("broadcasts", "scatter and all-gather")
    for link in dict.fromkeys(row["link"] for row in results):
        yield Panel(
            f"inverses of 8 owners to 8 ranks, link: {link}",
            "ms",
            {
                f"{row['ownership']} ownership, {row['bytes'] / 1e6:g} MB": {
                    way: 1000 * row[way]["seconds"]["median"] for way in ways
                }
                for row in results
                if row["link"] == link
            },
        )


def slow_link(results: Any) -> Iterator[Panel]:
    def name(row: dict[str, Any]) -> str:
        return f"{row['placement']}, {row['reduction']}, {row['dtype']}{', packed' * row['packed']}"

    variants = results["variants"]
    yield Panel("bytes on both ranks", "MB", {name(r): {k: v / 1e6 for k, v in r["bytes"].items()} for r in variants})
    seconds = {name(row): {"K-FAC, a step": row["seconds_a_step"]} for row in variants}
    yield Panel("waiting for the link, refreshes every 100 steps", "s a step", seconds)


def ekfac(results: Any) -> Iterator[Panel]:
    yield Panel(
        "distance from the exact Fisher block",
        "Frobenius, relative",
        {f"step {step}, {layer}": row for step, layers in results["errors"].items() for layer, row in layers.items()},
    )
    medians = {solver: {"loss": found["loss"]["median"]} for solver, found in results["losses"].items()}
    yield Panel("loss after as many steps", "training loss", medians)


def class_conditional(results: Any) -> Iterator[Panel]:
    yield Panel(
        "distance from the exact block",
        "Frobenius, relative",
        {
            f"{row['fisher']}, step {row['step']}, {row['layer']}": {
                "E[A] ⊗ E[G]": row["plain"],
                "combined from classes": row["by class"],
                "nearest Kronecker product": row["nearest"],
            }
            for row in results["frobenius"]
        },
    )


def chaos(results: Any) -> Iterator[Panel]:
    yield Panel(
        f"{results.get('equal', results['equal_bit_for_bit'])} of {results['rounds']} rounds equal the undisturbed run",
        "seconds of recovery",
        {
            fault: {"median": found["median"], "upper quartile": found["quartile_high"]}
            for fault, found in results["recovery_seconds"].items()
        },
    )


def sharded_exchange(results: Any) -> Iterator[Panel]:
    yield Panel(
        "one gradient to its owners and back",
        "ms",
        {
            f"{row['engine']}, {row['ranks']} ranks": {
                way: 1000 * found["median"] for way, found in row["seconds"].items()
            }
            for row in results
        },
    )


def gpu_small_on_cpu(results: Any) -> Iterator[Panel]:
    yield Panel(
        "toy sizes on a CPU: says nothing about a GPU",
        "ms a step",
        {
            model: {name: 1000 * found["seconds"]["mean"] for name, found in row["variants"].items()}
            for model, row in results["models"].items()
        },
    )


def turns(results: Any) -> Iterator[Panel]:
    for run in dict.fromkeys(row["run"] for row in results):
        own = [row for row in results if row["run"] == run]
        yield Panel(
            f"{run}: test loss over that of all in one step",
            "ratio",
            {row["variant"]: {f"step {step}": value for step, value in row["ratio"].items()} for row in own},
        )


PICTURES: dict[str, Callable[[Any], Iterator[Panel]]] = {
    draw.__name__: draw
    for draw in (
        prediction,
        sharing,
        slow_link,
        ekfac,
        class_conditional,
        chaos,
        sharded_exchange,
        gpu_small_on_cpu,
        turns,
    )
}


def draw(panels: list[Panel], path: Path) -> None:
    figure = Figure(figsize=(9, sum(panel.inches for panel in panels)), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[panel.inches for panel in panels])
    for (axes,), panel in zip(rows, panels, strict=True):
        width = 0.9 / len(panel.series)
        for index, name in enumerate(panel.series):
            places = [place + index * width for place, row in enumerate(panel.rows.values()) if name in row]
            values = [row[name] for row in panel.rows.values() if name in row]
            bars = axes.barh(
                places,
                values,
                0.9 * width,
                label=name,
                color=STYLES[index % len(STYLES)][0],
                hatch=HATCHES[index % len(HATCHES)],
                edgecolor="white",
            )
            axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
        axes.set_yticks([place + 0.45 - width / 2 for place in range(len(panel.rows))], list(panel.rows), fontsize=7)
        axes.set(title=panel.title, xlabel=panel.unit)
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel.series) > 1:
            axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *PICTURES], metavar="NAME", help=", ".join(PICTURES))
    arguments = parser.parse_args()
    for name in arguments.names or PICTURES:
        file = RESULTS / f"{name}.json"
        if not file.exists() and not arguments.names:
            continue
        draw(list(PICTURES[name](json.loads(file.read_text())["results"])), file.with_suffix(".png"))
        print(file.with_suffix(".png"))


if __name__ == "__main__":
    main()
