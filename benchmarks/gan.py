"""Quality of a GAN's samples by step: K-FAC and Adam, each with and without symplectic adjustment.

Every method draws the same number of settings from its grid, by a fixed seed, and is tuned by the Fréchet distance that
a short run ends with; the best setting is then run longer on other seeds. All runs are those of
configs/digits_gan.yaml with other values, judged by the same classifier.

    python -m benchmarks.gan --ledger /tmp/gan.json        # resumes where it was interrupted
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting import RESULTS, spread, write
from benchmarks.trials import Grid, Ledger, draws
from kfac_dist.config.schema import Target
from kfac_dist.config.yaml.load import load_config, resolve
from kfac_dist.tasks import build_data
from kfac_dist.tasks.judge import frechet, score, train_judge
from kfac_dist.training import train
from kfac_dist.training.records.metrics import read_metrics

CONFIG = Path(__file__).parents[1] / "configs" / "digits_gan.yaml"
TUNING_SEED, TUNING_STEPS, TRIALS = 100, 300, 8
STEPS, EVERY = 600, 50

KFAC: Grid = {
    "kfac.update.kl_clip": [0.003, 0.01, 0.03],
    "kfac.inversion.damping": [0.01, 0.03, 0.1],
    "optimizer.momentum": [0.0, 0.5],
    "game.discriminator.lr_factor": [0.5, 1.0, 2.0],
}
ADAM: Grid = {
    "optimizer.lr": [0.0005, 0.001, 0.002, 0.004],
    "optimizer.betas": [[0.0, 0.999], [0.5, 0.999]],
    "game.discriminator.lr_factor": [0.5, 1.0, 2.0],
}
PLAIN: Grid = {"game.adjustment": [0.0]}
ADJUSTED: Grid = {"game.adjustment": [0.1, 0.3, 1.0]}
GRIDS: dict[str, Grid] = {
    "kfac": KFAC | PLAIN,
    "kfac_adjusted": KFAC | ADJUSTED,
    "adam": ADAM | PLAIN,
    "adam_adjusted": ADAM | ADJUSTED,
}
LOOKS = {
    "kfac": ("K-FAC", "#0072B2", "--"),
    "kfac_adjusted": ("K-FAC, adjusted", "#0072B2", "-"),
    "adam": ("Adam", "#D55E00", "--"),
    "adam_adjusted": ("Adam, adjusted", "#D55E00", "-"),
}

# Steps of one length, where those of the file shrink.
CONSTANT: dict[str, Any] = {"optimizer.lr": 0.02, "kfac.update.kl_clip_lr": "current"}

Curve = list[tuple[int, float, float]]  # step, Fréchet distance, score


def run(method: str, setting: dict[str, Any], seed: int, steps: int) -> tuple[Curve, float]:
    """Return a run's evaluations and its milliseconds a step; one that diverges has the curve up to there."""
    torch.set_num_threads(1)
    values = {
        **CONSTANT,
        **setting,
        "run.seed": seed,
        "train.steps": steps,
        "train.evaluate_every": EVERY,
        "checkpoint.every": 0,
    }
    if method.startswith("adam"):
        # The file's optimizer is SGD with its own options.
        values |= {"kfac.enabled": False, "optimizer.name": "adamw", "optimizer.momentum": 0.9}
    with tempfile.TemporaryDirectory() as directory:
        values["run.directory"] = directory
        config = resolve(load_config(CONFIG, [f"{key}={json.dumps(value)}" for key, value in values.items()]))
        ended = train(config, quiet=True)
        records = [record for record in read_metrics(ended.directory / "metrics.jsonl") if "test_loss" in record]
    summary = ended.runs[0]
    curve = [(record["step"], record["test_loss"], record["test_metric"]) for record in records]
    assert summary.test_loss is not None
    assert summary.metric_value is not None
    return [*curve, (summary.steps, summary.test_loss, summary.metric_value)], summary.milliseconds_per_step


def trial(method: str, setting: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Return a short run's result, the mean of its last three distances; infinity if it is not a number."""
    curve, _ = run(method, setting, TUNING_SEED, TUNING_STEPS)
    last = statistics.mean(distance for _, distance, _ in curve[-3:])
    return last if math.isfinite(last) else math.inf, setting


def floor() -> dict[str, float]:
    """Return the figures of real samples: as many of the training data as are held out, against these."""
    splits = build_data(Target(name="digits_tile"))
    samples, labels = splits.train.tensors
    held_out = splits.test.tensors[0]
    judge = train_judge(samples, labels, 0)
    sums = judge.sums(samples[: len(held_out)])
    return {
        "distance": frechet(sums, judge.sums(held_out), judge.classes),
        "score": score(sums, judge.classes),
        "judge_accuracy": judge.accuracy(*splits.test.tensors),
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the median distance against steps, between its least and greatest over the seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for method, (label, colour, line) in LOOKS.items():
        curves = [{step: distance for step, distance, _ in curve} for curve in results["curves"][method]]
        steps = sorted(curves[0])
        values = [[curve[step] for curve in curves] for step in steps]
        axes.plot(steps, [statistics.median(v) for v in values], line, color=colour, label=label)
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.1)
    axes.axhline(results["real"]["distance"], color="gray", linewidth=0.8, label="real samples")
    axes.set(xlabel="steps", ylabel="Fréchet distance to held-out digits", yscale="log", title="DCGAN on digits, 16×16")
    axes.grid(visible=True, which="both", color="#eeeeee")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time, each of one thread")
    parser.add_argument("--out", type=Path, default=RESULTS / "gan.json")
    parser.add_argument("--ledger", type=Path, default=None)
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        ledger = Ledger(arguments.ledger, pool)
        calls = [(method, setting) for method, grid in GRIDS.items() for setting in draws(grid, TRIALS)]
        tried = ledger.all(trial, calls)
        log = {method: [t for t, (m, _) in zip(tried, calls, strict=True) if m == method] for method in GRIDS}
        best = {method: min(found, key=lambda pair: pair[0])[1] for method, found in log.items()}
        for method, setting in best.items():
            print(f"{method}: {setting}", flush=True)
        runs = [(method, best[method], seed, STEPS) for method in GRIDS for seed in range(arguments.seeds)]
        ended = dict(zip([(m, s) for m, _, s, _ in runs], ledger.all(run, runs), strict=True))
    by_method = {method: [ended[method, seed] for seed in range(arguments.seeds)] for method in GRIDS}
    results = {
        "real": floor(),
        "settings": best,
        "final_distance": {m: spread([curve[-1][1] for curve, _ in found]) for m, found in by_method.items()},
        "final_score": {m: spread([curve[-1][2] for curve, _ in found]) for m, found in by_method.items()},
        "curves": {method: [curve for curve, _ in found] for method, found in by_method.items()},
        "tuning": log,
    }
    settings = {
        "seeds": arguments.seeds,
        "steps": STEPS,
        "tuning": {"seed": TUNING_SEED, "steps": TUNING_STEPS, "trials": TRIALS},
        "threads": 1,
        "trainings_at_a_time": arguments.workers,
    }
    print(write("gan", arguments.out, settings, results))
    draw(results, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
