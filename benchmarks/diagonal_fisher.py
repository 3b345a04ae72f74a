"""The variance of both estimators of the diagonal Fisher, layer by layer, at first and along training with K-FAC.

The measurements of `kfac-dist doctor --fisher`, on the shipped runs with smooth models, for several seeds. Variances
only: they don't depend on the machine, and seconds would want a quiet one.

    python -m benchmarks.diagonal_fisher [--seeds 3] [--steps 100] [--moments 9] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.reporting import write
from kfac_dist.config.yaml.load import load_config, resolve
from kfac_dist.doctor import FisherRequest, examine

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = ("digits_classifier", "digits_autoencoder")


def measure(name: str, seed: int, wish: FisherRequest) -> dict[str, Any]:
    """Return the doctor's report on one run."""
    report = examine(resolve(load_config(CONFIGS / f"{name}.yaml", [f"run.seed={seed}"])), fisher=wish)
    assert report.fisher is not None, report.findings
    return asdict(report.fisher)


def summary(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the medians over seeds, a row a layer and step."""
    rows = []
    for together in zip(*(report["trend"] for report in reports), strict=True):
        row = {"step": together[0]["step"], "layer": together[0]["layer"]}
        for key in ("trace", "first", "second", "first_deviation", "second_deviation", "empirical"):
            row[key] = statistics.median(one[key] for one in together)
        rows.append(row)
    return rows


def draw(medians: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the variances over the steps: Î1 in full, Î2 dashed, a colour a layer."""
    figure, axes = pyplot.subplots(len(medians), 2, figsize=(11, 4 * len(medians)), squeeze=False)
    for (name, rows), (left, right) in zip(medians.items(), axes, strict=True):
        _draw_layers(left, rows, "first", "second")
        left.set_title(f"{name}: Σ N·Var")
        _draw_layers(right, rows, "first_deviation", "second_deviation")
        right.set_title(f"{name}: relative standard deviation, one label")
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("Estimators of the diagonal Fisher: Î1 in full, Î2 dashed (none in the last layer: it is zero)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_layers(axes: Axes, rows: list[dict[str, Any]], first: str, second: str) -> None:
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    for index, layer in enumerate(layers):
        own = [row for row in rows if row["layer"] == layer]
        steps, colour = [row["step"] for row in own], pyplot.get_cmap("viridis")(index / max(len(layers) - 1, 1))
        axes.plot(steps, [row[first] for row in own], color=colour, label=layer)
        if any(row[second] for row in own):
            axes.plot(steps, [row[second] for row in own], color=colour, linestyle="--")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yscale("log")
    axes.set_xlabel("steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--moments", type=int, default=9)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    wish = FisherRequest(arguments.steps, moments=arguments.moments)
    results, medians = {}, {}
    for name in RUNS:
        reports = [measure(name, seed, wish) for seed in range(arguments.seeds)]
        medians[name] = summary(reports)
        results[name] = {"medians": medians[name], "at_first": [report["layers"] for report in reports]}
    settings = {"seeds": arguments.seeds, "steps": arguments.steps, "moments": arguments.moments}
    path = write("diagonal_fisher", arguments.out, settings, results)
    draw(medians, path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()
