"""Steps and seconds of every method to one loss, on two autoencoders: the K-FAC family and its rivals.

The target of a task is the median loss of tuned SGD-Nesterov at the end of its budget, as
`benchmarks/results/steps_to_target.json` has it. Every method gets the same number of trials, drawn from its own grid
by a fixed seed, on a seed of its own; the setting that came to the target in the fewest CPU seconds then runs on other
seeds. No training may take more than SGD's budget of steps, nor one and a half times SGD's seconds. The loss is the
full training set's, evaluated between steps and not counted. Seconds are CPU seconds of one thread.

SOAP and Shampoo come from `pytorch-optimizer` and are left out where it isn't installed.

    python -m benchmarks.family [--tasks digits mnist5k] [--seeds 3] [--workers 2] [--out FILE] [--ledger FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.family_methods import METHODS, Setting
from benchmarks.reporting import RESULTS, spread, write
from benchmarks.trials import Ledger, Point, draws, until
from benchmarks.workloads import reconstruction
from kfac_dist.config.schema import Target
from kfac_dist.tasks import build_data
from kfac_dist.tasks.models.autoencoder import autoencoder

TUNING_SEED = 1000
MOST_SECONDS = 1.5
"""No training takes more than this many times SGD's seconds."""


@dataclass(frozen=True)
class Task:
    """Data, model, most steps, steps between checks, and trials of each method."""

    data: str
    dims: tuple[int, ...]
    batch: int
    budget: int
    check_every: int
    trials: int


TASKS = {
    "digits": Task("digits", (64, 100, 50, 25, 8), 256, 1500, 5, 8),
    "mnist5k": Task("mnist5k", (784, 1000, 500, 250, 30), 256, 1000, 10, 4),
}


def aim(task: str) -> tuple[float, float]:
    """Return the target loss of a task, and the CPU seconds that SGD took to it."""
    results = json.loads((RESULTS / "steps_to_target.json").read_text())["results"]
    result = next(result for result in results if result["task"] == task)
    return sorted(result["targets"])[len(result["targets"]) // 2], result["seconds"]["sgd"]["median"]


def train(task: Task, method: str, setting: Setting, seed: int) -> Iterator[Point]:
    """Yield a point at every check, until the budget ends or the loss is no number."""
    torch.set_num_threads(1)
    data = build_data(Target(name=task.data, args={"target": "input"})).train.tensors[0]
    torch.manual_seed(seed)
    model = autoencoder(dims=list(task.dims))
    stepper = METHODS[method].build(model, setting)
    generator = torch.Generator().manual_seed(seed)
    size = setting.get("batch", task.batch)
    seconds, started = 0.0, time.process_time()
    for step in range(task.budget):
        # A cosine from lr to final·lr over the whole budget, for every method that has a learning rate.
        final = setting.get("final", 0.1)
        stepper.scale_lr(final + (1 - final) * (1 + math.cos(math.pi * step / task.budget)) / 2)
        stepper.step(data[torch.randint(len(data), (size,), generator=generator)])
        if (step + 1) % task.check_every == 0:
            seconds += time.process_time() - started
            with torch.no_grad():
                loss = reconstruction(model(data), data).item()
            yield Point(step + 1, seconds, loss)
            if not math.isfinite(loss):
                return
            started = time.process_time()


# ---- work of a worker: each function returns JSON values


def trial(task: Task, method: str, setting: Setting, target: float, most_seconds: float) -> list[Any]:
    """Return the seconds to the target (None if it wasn't reached), the steps, the last loss, and the setting."""
    last = until(train(task, method, setting, TUNING_SEED), target, most_seconds)[-1]
    return [last.seconds if last.loss <= target else None, last.step, last.loss, setting]


def run_seed(
    task: Task, method: str, setting: Setting, target: float, most: float, seed: int
) -> list[tuple[int, float, float]]:
    """Return the points of one seed up to the target."""
    return [(p.step, p.seconds, p.loss) for p in until(train(task, method, setting, seed), target, most)]


def choose(name: str, methods: list[str], ledger: Ledger) -> dict[str, list[list[Any]]]:
    """Run every method's trials; the best of each comes first: by seconds to the target, else by the last loss."""
    task, (target, sgd_seconds) = TASKS[name], aim(name)
    calls = [
        (task, method, setting, target, MOST_SECONDS * sgd_seconds)
        for method in methods
        for setting in draws(METHODS[method].grids[name], task.trials)
    ]
    tried: dict[str, list[list[Any]]] = {method: [] for method in methods}
    for call, result in zip(calls, ledger.all(trial, calls), strict=True):
        tried[call[1]].append(result)
    for method, results in tried.items():
        results.sort(key=lambda found: (found[0] is None, found[0] or 0.0, _number(found[2])))
        print(f"  {method}: {results[0]}", flush=True)
    return tried


def _number(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def compare(name: str, methods: list[str], seeds: int, ledger: Ledger) -> dict[str, Any]:
    """Tune and run one task."""
    print(name, flush=True)
    task, (target, sgd_seconds) = TASKS[name], aim(name)
    tried = choose(name, methods, ledger)
    calls = [
        (task, method, tried[method][0][3], target, MOST_SECONDS * sgd_seconds, seed)
        for method in methods
        for seed in range(seeds)
    ]
    runs: dict[str, list[list[Point]]] = {method: [] for method in methods}
    for call, points in zip(calls, ledger.all(run_seed, calls), strict=True):
        runs[call[1]].append([Point(*point) for point in points])
    lasts = {method: [points[-1] for points in runs[method]] for method in methods}
    return {
        "task": name,
        "task_settings": asdict(task),
        "target": target,
        "methods": {
            method: {
                "title": METHODS[method].title,
                "setting": tried[method][0][3],
                "reached": [last.loss <= target for last in lasts[method]],
                "steps": spread([last.step for last in lasts[method]]),
                "seconds": spread([last.seconds for last in lasts[method]]),
                "trials": tried[method],
                "first_seed": [(p.step, p.seconds, p.loss) for p in runs[method][0]],
            }
            for method in methods
        },
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table: steps and CPU seconds to each task's target, medians."""
    heads = [f"{result['task']}: {quantity}" for result in results for quantity in ("steps", "seconds")]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for method in METHODS:
        cells = [cell for result in results for cell in _cells(result["methods"].get(method))]
        if any(cells):
            lines.append(f"| {METHODS[method].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(found: dict[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    reached, runs = sum(found["reached"]), len(found["reached"])
    if not reached:
        return f"not within {found['steps']['median']:.0f}", f"not within {found['seconds']['median']:.2g}"
    part = "" if reached == runs else f" ({reached} of {runs})"
    return f"{found['steps']['median']:.0f}{part}", f"{found['seconds']['median']:.2g}"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw steps against seconds, a panel a task: the nearer to the lower left, the better."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6.5 * len(results), 5.5), squeeze=False, layout="constrained")
    for result, axis in zip(results, axes[0], strict=True):
        for method, found in result["methods"].items():
            x, y, reached = found["seconds"]["median"], found["steps"]["median"], all(found["reached"])
            own = METHODS[method].own
            axis.plot(
                x, y, "o" if own else "s", color="C0" if own else "C7", fillstyle="full" if reached else "none", ms=8
            )
            axis.annotate(found["title"], (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
        axis.set(
            xlabel="CPU seconds of one thread to the target",
            ylabel="optimizer steps to the target",
            title=f"{result['task']} autoencoder, training loss {result['target']:.4g}",
            xscale="log",
            yscale="log",
        )
        axis.margins(x=0.2)
    figure.suptitle("circles: this package; squares: others; hollow: target not reached on every seed", fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time, each of one thread")
    parser.add_argument("--out", type=Path, default=RESULTS / "family.json")
    parser.add_argument("--ledger", type=Path, default=None, help="trainings that have ended are not repeated")
    arguments = parser.parse_args()
    methods = [method for method in arguments.methods if METHODS[method].installed()]
    for method in set(arguments.methods) - set(methods):
        print(f"{METHODS[method].title} is left out: {METHODS[method].package} is not installed")
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        ledger = Ledger(arguments.ledger, pool)
        results = [compare(name, methods, arguments.seeds, ledger) for name in arguments.tasks]
    settings = {
        "seeds": arguments.seeds,
        "tuning_seed": TUNING_SEED,
        "threads": 1,
        "trainings_at_a_time": arguments.workers,
    }
    print(write("family", arguments.out, settings, results))
    draw(results, arguments.out.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
