"""Cost of evenly long steps in loss: layers that take turns, and inverses that are some steps old when used.

Two shipped runs, the autoencoder on digits and the byte GPT, are trained as `kfac-dist train` does it, with everything
measured and inverted in one step, with layers taking turns, with a lag, and with both. All else is the same, the number
of steps too. `mc` can't take turns, so that the Fisher is the empirical one in all of them.

    python -m benchmarks.turns [--runs …] [--seeds 5] [--workers 1] [--out FILE] [--ledger FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting import RESULTS, spread, write
from benchmarks.trials import Ledger
from kfac_dist.config.yaml.load import load_config
from kfac_dist.training.run import train

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Run:
    """A shipped run: its file, the options common to all variants, the steps of evaluation, and its intervals."""

    config: str
    overrides: tuple[str, ...]
    checks: tuple[int, ...]
    factor_every: int
    inverse_every: int


RUNS = {
    "digits autoencoder": Run("digits_autoencoder.yaml", ("kfac.curvature.fisher=empirical",), (50, 100, 300), 10, 50),
    "byte GPT, inverses every 10": Run("byte_gpt.yaml", (), (100, 200, 400), 10, 10),
    "byte GPT, inverses every 100": Run("byte_gpt.yaml", (), (100, 200, 400), 10, 100),
}
BASE = "all in one step"
VARIANTS = (BASE, "layers take turns", "lag", "turns, and lag")
LAG = 4
"""Steps; a lag is at most half of the shortest interval between refreshes."""


def overrides_of(run: Run, variant: str) -> list[str]:
    found = [
        *run.overrides,
        f"kfac.curvature.factor_every={run.factor_every}",
        f"kfac.inversion.inverse_every={run.inverse_every}",
    ]
    if "turns" in variant:
        found += [f"kfac.curvature.stagger={run.factor_every}", f"kfac.inversion.stagger={run.inverse_every}"]
    if "lag" in variant:
        found += [f"kfac.inversion.inverse_lag={LAG}"]
    return found


def losses(name: str, variant: str, seed: int) -> dict[int, float]:
    """Train once; return the test loss at the checks."""
    torch.set_num_threads(1)
    run = RUNS[name]
    with tempfile.TemporaryDirectory() as directory:
        own = [f"run.directory={directory}", f"run.seed={seed}", f"train.evaluate_every={run.checks[0]}"]
        config = load_config(CONFIGS / run.config, [*own, "checkpoint.every=0", *overrides_of(run, variant)])
        result = train(config, compare=False, quiet=True, live=False)
        records = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    found = {record["step"]: record["test_loss"] for record in records if "test_loss" in record}
    last = result.runs[0]
    assert last.test_loss is not None  # a run that diverges raises
    found[last.steps] = last.test_loss
    return {step: found[step] for step in run.checks}


def study(names: list[str], seeds: int, ledger: Ledger) -> list[dict[str, Any]]:
    results = []
    for name in names:
        calls = [(name, variant, seed) for variant in VARIANTS for seed in range(seeds)]
        found = dict(zip(calls, ledger.all(losses, calls), strict=True))
        for variant in VARIANTS:
            own = [{int(step): loss for step, loss in found[name, variant, seed].items()} for seed in range(seeds)]
            base = [{int(step): loss for step, loss in found[name, BASE, seed].items()} for seed in range(seeds)]
            row = {
                "run": name,
                "variant": variant,
                "overrides": overrides_of(RUNS[name], variant),
                "test_loss": {step: spread([seed[step] for seed in own]) for step in RUNS[name].checks},
                "ratio": {
                    step: statistics.median(mine[step] / theirs[step] for mine, theirs in zip(own, base, strict=True))
                    for step in RUNS[name].checks
                },
            }
            results.append(row)
            medians = row["test_loss"]
            shown = (f"{step}: {medians[step]['median']:.4f} ({ratio:.3f})" for step, ratio in row["ratio"].items())
            print(f"{name:28} {variant:18} " + "  ".join(shown), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time, each of one thread")
    parser.add_argument("--out", type=Path, default=RESULTS / "turns.json")
    parser.add_argument("--ledger", type=Path, default=None)
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        results = study(arguments.runs, arguments.seeds, Ledger(arguments.ledger, pool))
    settings = {"seeds": arguments.seeds, "lag": LAG, "checks": "steps at which the test loss is taken"}
    print(write("turns", arguments.out, settings, results))


if __name__ == "__main__":
    main()
