"""Steps and seconds to the loss that tuned SGD-Nesterov reaches at the end of its budget, for K-FAC and AdamW.

Every method gets the same number of tuning trials, drawn from its own grid by a fixed seed, on a seed of its own; then
the chosen setting runs on five other seeds. For each of these, the target is what SGD-Nesterov reached with that seed.
The loss is the full training set's, evaluated between steps and not counted. Seconds are CPU seconds of one thread, so
that a busy machine distorts them little; they include all that a step does, measuring and inverting too.

    python -m benchmarks.steps_to_target [--tasks digits mnist5k] [--trials 12] [--seeds 5] [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reporting import RESULTS, spread, write
from benchmarks.workloads import reconstruction
from kfac_dist import KFAC
from kfac_dist.config.schema import Target
from kfac_dist.tasks import build_data
from kfac_dist.tasks.autoencoder import autoencoder

TUNING_SEED = 1000
METHODS = ("sgd", "adamw", "kfac")


@dataclass(frozen=True)
class Task:
    """Data, model, SGD's budget, and the precision in which K-FAC multiplies by its inverses."""

    data: str
    dims: tuple[int, ...]
    batch: int
    budget: int
    check_every: int
    inverse_dtype: str


TASKS = {
    "digits": Task("digits", (64, 100, 50, 25, 8), 256, 1500, 5, "float32"),
    "mnist5k": Task("mnist5k", (784, 1000, 500, 250, 30), 256, 400, 5, "bfloat16"),
}

GRIDS: dict[str, dict[str, list[Any]]] = {
    "sgd": {"lr": [0.003, 0.01, 0.03, 0.1], "momentum": [0.9, 0.95, 0.99], "final": [0.01, 0.1]},
    "adamw": {"lr": [0.001, 0.002, 0.004, 0.008], "beta2": [0.95, 0.99, 0.999], "final": [0.01, 0.1]},
    "kfac": {
        "lr": [0.05, 0.1, 0.2],
        "momentum": [0.8, 0.9],
        "damping": [0.003, 0.01, 0.03],
        "kl_clip": [0.03, 0.1],
        "decay": [0.8, 0.95],
        "intervals": [(5, 20), (5, 50), (10, 50)],
        "final": [0.1],
    },
}


@dataclass(frozen=True)
class Point:
    """Where a run stands: optimizer steps, CPU seconds, loss of the whole training set."""

    step: int
    seconds: float
    loss: float


def build(
    task: Task, method: str, setting: dict[str, Any], model: nn.Module
) -> tuple[torch.optim.Optimizer, KFAC | None]:
    parameters, lr = model.parameters(), setting["lr"]
    if method == "adamw":
        betas = (0.9, setting["beta2"])
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0, foreach=True), None
    momentum = setting.get("momentum", 0.9)
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=method == "sgd", foreach=True)
    if method == "sgd":
        return optimizer, None
    factor_every, inverse_every = setting["intervals"]
    config = {
        "curvature": {
            "fisher": "mc",
            "likelihood": "bernoulli",
            "factor_every": factor_every,
            "decay": setting["decay"],
        },
        "inversion": {
            "inverse_every": inverse_every,
            "damping": setting["damping"],
            "inverse_dtype": task.inverse_dtype,
        },
        "update": {"kl_clip": setting["kl_clip"], "kl_clip_lr": lr},
    }
    return optimizer, KFAC(model, config, optimizer=optimizer)


def train(task: Task, data: Tensor, method: str, setting: dict[str, Any], seed: int) -> Iterator[Point]:
    """Yield a point at every check, until the budget ends or the loss is no number."""
    torch.manual_seed(seed)
    model = autoencoder(dims=list(task.dims))
    optimizer, kfac = build(task, method, setting, model)
    generator = torch.Generator().manual_seed(seed)
    seconds, started = 0.0, time.process_time()
    for step in range(task.budget):
        # A cosine from lr to final·lr over the whole budget, for every method alike.
        share = setting["final"] + (1 - setting["final"]) * (1 + math.cos(math.pi * step / task.budget)) / 2
        for group in optimizer.param_groups:
            group["lr"] = setting["lr"] * share
        batch = data[torch.randint(len(data), (task.batch,), generator=generator)]
        optimizer.zero_grad()
        outputs = model(batch)
        if kfac is not None:
            kfac.fisher_backward(outputs)
        reconstruction(outputs, batch).backward()
        if kfac is not None:
            kfac.step()
        optimizer.step()
        if (step + 1) % task.check_every == 0:
            seconds += time.process_time() - started
            with torch.no_grad():
                loss = reconstruction(model(data), data).item()
            yield Point(step + 1, seconds, loss)
            if not math.isfinite(loss):
                return
            started = time.process_time()


def until(points: Iterator[Point], target: float, most_seconds: float = math.inf) -> list[Point]:
    """Return a run's points up to the one that reaches the target (or has taken too long)."""
    taken = []
    for point in points:
        taken.append(point)
        if point.loss <= target or point.seconds > most_seconds:
            break
    return taken


def draws(method: str, trials: int) -> list[dict[str, Any]]:
    """Return a method's trials: distinct settings of its grid, drawn by a fixed seed."""
    grid = GRIDS[method]
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return random.Random(0).sample(settings, min(trials, len(settings)))


def tune(task: Task, data: Tensor, trials: int) -> tuple[dict[str, dict[str, Any]], dict[str, list[Any]]]:
    """Choose each method's setting: SGD's by its final loss, the others' by seconds to that loss."""
    log: dict[str, list[Any]] = {}
    finals = [
        (list(train(task, data, "sgd", setting, TUNING_SEED))[-1].loss, setting) for setting in draws("sgd", trials)
    ]
    log["sgd"] = finals
    target, chosen = min(((loss, setting) for loss, setting in finals if math.isfinite(loss)), key=lambda pair: pair[0])
    best: dict[str, dict[str, Any]] = {"sgd": chosen}
    print(f"  sgd: loss {target:.4f} with {chosen}", flush=True)
    for method in METHODS[1:]:
        quickest, log[method] = math.inf, []
        for setting in draws(method, trials):
            last = until(train(task, data, method, setting, TUNING_SEED), target, quickest)[-1]
            reached = last.loss <= target
            log[method].append((last.seconds if reached else None, last.step, setting))
            if reached and last.seconds < quickest:
                quickest, best[method] = last.seconds, setting
        if method not in best:
            raise SystemExit(f"no trial of {method} reached SGD's loss {target}: widen its grid")
        print(f"  {method}: {quickest:.2f} s with {best[method]}", flush=True)
    return best, log


def compare(name: str, trials: int, seeds: int) -> tuple[dict[str, Any], dict[str, list[Point]]]:
    """Tune and run one task; returns its results and the curves of the first seed."""
    task = TASKS[name]
    print(f"{name}: tuning", flush=True)
    data = build_data(Target(name=task.data, args={"target": "input"})).train.tensors[0]
    best, log = tune(task, data, trials)
    runs: dict[str, list[Point]] = {method: [] for method in METHODS}
    curves: dict[str, list[Point]] = {}
    targets = []
    for seed in range(seeds):
        for method in METHODS:
            points = train(task, data, method, best[method], seed)
            curve = list(points) if method == "sgd" else until(points, targets[-1])
            if method == "sgd":
                targets.append(curve[-1].loss)
            runs[method].append(curve[-1])
            if seed == 0:
                curves[method] = curve
        print(f"  seed {seed}: " + ", ".join(f"{m} {r[-1].step} steps {r[-1].seconds:.2f} s" for m, r in runs.items()))
    ratio = {
        f"{quantity} of {other}": statistics.median(
            getattr(mine, quantity) / getattr(theirs, quantity)
            for mine, theirs in zip(runs["kfac"], runs[other], strict=True)
        )
        for other in METHODS[:-1]
        for quantity in ("step", "seconds")
    }
    result = {
        "task": name,
        "settings": best,
        "targets": targets,
        "reached": {m: [r.loss <= t for r, t in zip(runs[m], targets, strict=True)] for m in METHODS},
        "steps": {m: spread([r.step for r in runs[m]]) for m in METHODS},
        "seconds": {m: spread([r.seconds for r in runs[m]]) for m in METHODS},
        "kfac_ratios": ratio,
        "tuning": log,
    }
    print("  " + ", ".join(f"{key}: {value:.3f}" for key, value in ratio.items()), flush=True)
    return result, curves


def draw(curves: dict[str, dict[str, list[Point]]], targets: dict[str, float], path: Path) -> None:
    """Draw the first seed's losses against steps and seconds, a row a task."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(len(curves), 2, figsize=(11, 4 * len(curves)), squeeze=False, layout="constrained")
    looks = {"sgd": ("SGD-Nesterov", ":"), "adamw": ("AdamW", "--"), "kfac": ("K-FAC", "-")}
    for (name, by_method), axes in zip(curves.items(), rows, strict=True):
        for axis, quantity, label in zip(axes, ("step", "seconds"), ("optimizer steps", "CPU seconds"), strict=True):
            for method, points in by_method.items():
                title, style = looks[method]
                x = [getattr(point, quantity) for point in points]
                axis.plot(x, [point.loss for point in points], style, label=title)
                axis.plot(x[-1], points[-1].loss, "o", color=axis.lines[-1].get_color())
            axis.axhline(targets[name], color="gray", linewidth=0.8)
            axis.set(xlabel=label, ylabel="training loss", title=f"{name} autoencoder", yscale="log", xscale="log")
            axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "steps_to_target.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results, curves = [], {}
    for name in arguments.tasks:
        result, curves[name] = compare(name, arguments.trials, arguments.seeds)
        results.append(result)
    settings = {"trials": arguments.trials, "seeds": arguments.seeds, "tuning_seed": TUNING_SEED, "threads": 1}
    print(write("steps_to_target", arguments.out, settings, results))
    draw(curves, {r["task"]: r["targets"][0] for r in results}, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
