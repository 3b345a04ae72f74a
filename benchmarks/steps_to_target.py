"""Steps and seconds to the loss that tuned SGD-Nesterov reaches at the end of its budget, for K-FAC and AdamW.

Every method gets the same number of tuning trials, drawn from its own grid by a fixed seed, on a seed of its own; then
the chosen setting runs on five other seeds. For each of these, the target is what SGD-Nesterov reached with that seed.
The loss is the full training set's, evaluated between steps and not counted. Seconds are CPU seconds of one thread, so
that a busy machine distorts them little; they include all that a step does, measuring and inverting too.

A long measurement can be cut into pieces: with `--ledger FILE`, trainings that have ended are not repeated when the
program is started again. Tasks that are not measured keep their place in the output.

    python -m benchmarks.steps_to_target [--tasks digits mnist5k] [--seeds 5] [--workers 2] [--out FILE] [--ledger FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reporting import RESULTS, spread, write
from benchmarks.trials import Grid, Ledger, Point, draws, until
from benchmarks.workloads import reconstruction
from kfac_dist import KFAC
from kfac_dist.config.schema import Target
from kfac_dist.tasks import build_data
from kfac_dist.tasks.models.autoencoder import autoencoder

TUNING_SEED = 1000
METHODS = ("sgd", "adamw", "kfac")


@dataclass(frozen=True)
class Task:
    """Data, model, SGD's budget, trials of each method, and the precision in which K-FAC multiplies by its inverses."""

    data: str
    dims: tuple[int, ...]
    batch: int
    budget: int
    check_every: int
    trials: int
    inverse_dtype: str


TASKS = {
    "digits": Task("digits", (64, 100, 50, 25, 8), 256, 1500, 5, 12, "float32"),
    "mnist5k": Task("mnist5k", (784, 1000, 500, 250, 30), 256, 1000, 10, 8, "bfloat16"),
}

GRIDS: dict[str, dict[str, Grid]] = {
    "digits": {
        "sgd": {"lr": [0.003, 0.01, 0.03, 0.1], "momentum": [0.9, 0.95, 0.99], "final": [0.01, 0.1]},
        "adamw": {"lr": [0.001, 0.002, 0.004, 0.008], "beta2": [0.95, 0.99, 0.999], "final": [0.01, 0.1]},
        "kfac": {
            "lr": [0.05, 0.1, 0.2],
            "momentum": [0.8, 0.9],
            "damping": [0.003, 0.01, 0.03],
            "kl_clip": [0.03, 0.1],
            "decay": [0.8, 0.95],
            "intervals": [(5, 20), (5, 50), (10, 50)],
            "early_refresh": [0, 10],
            "final": [0.1],
        },
    },
    "mnist5k": {
        "sgd": {"lr": [0.002, 0.003, 0.004, 0.006], "momentum": [0.9, 0.8, 0.95], "final": [0.01, 0.1]},
        "adamw": {"lr": [0.0005, 0.001, 0.002, 0.004], "beta2": [0.95, 0.99, 0.999], "final": [0.01, 0.1]},
        "kfac": {
            "lr": [0.1, 0.2],
            "momentum": [0.8, 0.9],
            "damping": [0.03, 0.1],
            "kl_clip": [0.03, 0.1, 0.3],
            "decay": [0.8],
            "intervals": [(10, 50), (10, 100)],
            "early_refresh": [1],
            "final": [0.1],
        },
    },
}


# Variants of the chosen K-FAC setting, to show the effect of each option on steps and seconds.
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32 inverses": {"inverse_dtype": "float32"},
    "bf16 inverses": {"inverse_dtype": "bfloat16"},
    "1 row in 4": {"sample_fraction": 0.25},
    "early refreshes from 1": {"early_refresh": 1},
    "early refreshes from 10": {"early_refresh": 10},
    "no early refreshes": {"early_refresh": 0},
}


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
            "sample_fraction": setting.get("sample_fraction", 1.0),
        },
        "inversion": {
            "inverse_every": inverse_every,
            "damping": setting["damping"],
            "inverse_dtype": setting.get("inverse_dtype", task.inverse_dtype),
            "early_refresh": setting["early_refresh"],
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


# ---- work of a worker: each function returns JSON values


def data_of(task: Task) -> Tensor:
    torch.set_num_threads(1)
    return build_data(Target(name=task.data, args={"target": "input"})).train.tensors[0]


def final_loss(task: Task, setting: dict[str, Any]) -> float:
    """Return SGD's loss at the end of its budget."""
    seldom = replace(task, check_every=task.budget)
    return list(train(seldom, data_of(task), "sgd", setting, TUNING_SEED))[-1].loss


def trial(task: Task, method: str, setting: dict[str, Any], target: float, most_seconds: float) -> list[Any]:
    """Return the seconds to the target (None if that takes longer than it may), the steps, and the setting."""
    last = until(train(task, data_of(task), method, setting, TUNING_SEED), target, most_seconds)[-1]
    return [last.seconds if last.loss <= target else None, last.step, setting]


def run_seed(task: Task, best: dict[str, dict[str, Any]], seed: int) -> dict[str, list[tuple[int, float, float]]]:
    """Return every method's points of one seed: SGD's whole budget, the others' until they reach its last loss."""
    data, found = data_of(task), dict[str, list[Point]]()
    for method in METHODS:
        if method == "sgd":  # only its end counts; the points between are for the picture
            seldom = replace(task, check_every=task.budget // 20)
            found[method] = list(train(seldom, data, method, best[method], seed))
        else:
            found[method] = until(train(task, data, method, best[method], seed), found["sgd"][-1].loss)
    return {method: [(p.step, p.seconds, p.loss) for p in points] for method, points in found.items()}


def run_variant(task: Task, setting: dict[str, Any], seed: int, target: float) -> list[Any]:
    """Return the steps and seconds of K-FAC to a target, and whether it came there."""
    last = until(train(task, data_of(task), "kfac", setting, seed), target)[-1]
    return [last.step, last.seconds, last.loss <= target]


def choose(name: str, ledger: Ledger) -> tuple[dict[str, dict[str, Any]], dict[str, list[Any]]]:
    """Choose each method's setting: SGD's by its final loss, the others' by seconds to that loss."""
    task = TASKS[name]
    settings = {method: draws(GRIDS[name][method], task.trials) for method in METHODS}
    losses = ledger.all(final_loss, [(task, setting) for setting in settings["sgd"]])
    log: dict[str, list[Any]] = {"sgd": [list(pair) for pair in zip(losses, settings["sgd"], strict=True)]}
    target, best_sgd = min((pair for pair in log["sgd"] if math.isfinite(pair[0])), key=lambda pair: float(pair[0]))
    best = {"sgd": best_sgd}
    others = METHODS[1:]
    # The first trial's time bounds the others': a slower one can't be chosen.
    firsts = ledger.all(trial, [(task, method, settings[method][0], target, math.inf) for method in others])
    most = {method: math.inf if first[0] is None else first[0] for method, first in zip(others, firsts, strict=True)}
    rest = ledger.all(trial, [(task, m, setting, target, most[m]) for m in others for setting in settings[m][1:]])
    for index, (method, first) in enumerate(zip(others, firsts, strict=True)):
        count = task.trials - 1
        log[method] = [first, *rest[index * count : (index + 1) * count]]
        reached = [found for found in log[method] if found[0] is not None]
        if not reached:
            raise SystemExit(f"no trial of {method} reached SGD's loss {target}: widen its grid")
        best[method] = min(reached, key=lambda found: float(found[0]))[2]
    for method, setting in best.items():
        print(f"  {method}: {setting}", flush=True)
    return best, log


def compare(name: str, seeds: int, ledger: Ledger) -> dict[str, Any]:
    """Tune and run one task."""
    print(name, flush=True)
    best, log = choose(name, ledger)
    by_seed = ledger.all(run_seed, [(TASKS[name], best, seed) for seed in range(seeds)])
    curves = [{method: [Point(*point) for point in points] for method, points in run.items()} for run in by_seed]
    runs = {method: [curve[method][-1] for curve in curves] for method in METHODS}
    targets = [last.loss for last in runs["sgd"]]
    usual = {"inverse_dtype": TASKS[name].inverse_dtype, "sample_fraction": 1.0} | best["kfac"]
    variants = {
        variant: ledger.all(
            run_variant, [(TASKS[name], best["kfac"] | changes, seed, target) for seed, target in enumerate(targets)]
        )
        for variant, changes in VARIANTS.items()
        if usual | changes != usual  # the others are the runs above
    }
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
        "task_settings": asdict(TASKS[name]),
        "settings": best,
        "targets": targets,
        "reached": {m: [r.loss <= t for r, t in zip(runs[m], targets, strict=True)] for m in METHODS},
        "steps": {m: spread([r.step for r in runs[m]]) for m in METHODS},
        "seconds": {m: spread([r.seconds for r in runs[m]]) for m in METHODS},
        "kfac_ratios": ratio,
        "kfac_variants": {
            variant: {
                "steps": spread([steps for steps, _, _ in found]),
                "seconds": spread([seconds for _, seconds, _ in found]),
                "reached": [reached for _, _, reached in found],
            }
            for variant, found in variants.items()
        },
        "tuning": log,
        "first_seed": {method: by_seed[0][method] for method in METHODS},
    }
    print("  " + ", ".join(f"{key}: {value:.3f}" for key, value in ratio.items()), flush=True)
    return result


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
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time, each of one thread")
    parser.add_argument("--out", type=Path, default=RESULTS / "steps_to_target.json")
    parser.add_argument("--ledger", type=Path, default=None)
    arguments = parser.parse_args()
    results = {}
    if arguments.out.exists() and set(arguments.tasks) != set(TASKS):
        results = {result["task"]: result for result in json.loads(arguments.out.read_text())["results"]}
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        ledger = Ledger(arguments.ledger, pool)
        for name in arguments.tasks:
            results[name] = compare(name, arguments.seeds, ledger)
    ordered = [results[name] for name in TASKS if name in results]
    settings = {
        "seeds": arguments.seeds,
        "tuning_seed": TUNING_SEED,
        "threads": 1,
        "trainings_at_a_time": arguments.workers,
    }
    print(write("steps_to_target", arguments.out, settings, ordered))
    curves = {
        result["task"]: {m: [Point(*point) for point in result["first_seed"][m]] for m in METHODS} for result in ordered
    }
    draw(curves, {result["task"]: result["targets"][0] for result in ordered}, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
