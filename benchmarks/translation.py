"""Translation with K-FAC and with AdamW at equal tuning: held-out loss and chrF against steps and CPU seconds.

Both get the same number of trials, the points of their grids, and the same number of steps. Trials train without the
strings of `dev` and `test` and are judged by chrF on `dev`, on a seed of their own. The chosen setting then trains on
everything but `test`, on another seed, and is judged on `test`, which no choice has seen. K-FAC measures in the reduce
setting; `--expand` repeats the chosen trial in the expand setting.

Seconds are CPU seconds of one thread in training steps, so that a busy machine distorts them little: measuring,
inverting and preconditioning are in them, evaluation isn't. Beside both stands what the copied source scores: many
names are the same in two languages.

    python -m benchmarks.translation [--trials 6] [--seeds 1] [--steps 600] [--expand] [--out FILE] [--ledger FILE]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.reporting import RESULTS, spread, write
from benchmarks.trials import Grid, Ledger, draws
from kfac_dist import KFAC
from kfac_dist.tasks.data import DataSplits
from kfac_dist.tasks.models.translator import translator
from kfac_dist.tasks.scores import IGNORED
from kfac_dist.tasks.translation import translations
from kfac_dist.tasks.translation_score import TranslationScore

TUNING_SEED = 1000
METHODS = ("adamw", "kfac")


@dataclass(frozen=True)
class Budget:
    """Common settings of all trainings: steps, samples per step, the lr's warm-up and last share, points of a curve."""

    steps: int = 600
    batch: int = 64
    warmup: int = 30
    final: float = 0.05
    points: int = 10


TUNING = Budget()

# As many points in each, all of them tried. K-FAC's lr bounds its step where the KL clip doesn't; its dampings were
# redrawn after a look at the toy task of the tests, where 0.01 learnt to copy less well, and at the first trial.
GRIDS: dict[str, Grid] = {
    "adamw": {"lr": [0.0015, 0.003, 0.006], "beta2": [0.95, 0.999], "weight_decay": [0.0]},
    "kfac": {"lr": [0.2], "kl_clip": [0.003, 0.01, 0.03], "damping": [0.03, 0.1], "intervals": [(5, 20)]},
}


def build(
    method: str, setting: dict[str, Any], model: nn.Module, sharing: str
) -> tuple[torch.optim.Optimizer, KFAC | None]:
    lr = setting["lr"]
    if method == "adamw":
        betas, decay = (0.9, setting["beta2"]), setting["weight_decay"]
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=decay, foreach=True), None
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, foreach=True)
    factor_every, inverse_every = setting["intervals"]
    config = {
        "curvature": {"loss_terms": "token", "sharing": sharing, "factor_every": factor_every},
        "inversion": {"inverse_every": inverse_every, "damping": setting["damping"]},
        "update": {"kl_clip": setting["kl_clip"], "kl_clip_lr": lr},
    }
    return optimizer, KFAC(model, config, optimizer=optimizer)


def train(
    data: DataSplits, method: str, setting: dict[str, Any], seed: int, budget: Budget, sharing: str = "reduce"
) -> Iterator[dict[str, Any]]:
    """Yield a point of the curve every now and then, and at the end; ends early where the loss is no number."""
    torch.manual_seed(seed)
    model = translator()
    optimizer, kfac = build(method, setting, model, sharing)
    sources, prefixes, targets = data.train.tensors
    generator = torch.Generator().manual_seed(seed)
    seconds, started = 0.0, time.process_time()
    for step in range(budget.steps):
        share = budget.final + (1 - budget.final) * (1 + math.cos(math.pi * step / budget.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = setting["lr"] * share * min(1.0, (step + 1) / budget.warmup)
        rows = torch.randint(len(sources), (budget.batch,), generator=generator)
        labels = targets[rows]
        terms = (labels != IGNORED).sum()
        if kfac is not None:
            kfac.micro_batch(divisor=terms.float(), terms=terms)
        total = token_loss(model, sources[rows], prefixes[rows], labels)
        (total / terms).backward()
        if kfac is not None:
            kfac.step()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (budget.steps // budget.points) == 0:
            seconds += time.process_time() - started
            point = {"step": step + 1, "seconds": seconds, **judge(data, model)}
            yield point
            if not math.isfinite(point["loss"]):
                return
            started = time.process_time()


def token_loss(model: nn.Module, sources: Tensor, prefixes: Tensor, targets: Tensor) -> Tensor:
    logits = model(sources, prefixes)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def judge(data: DataSplits, model: nn.Module) -> dict[str, Any]:
    """Return loss a token, and chrF, of the held-out data."""
    assert data.score is not None
    model.eval()
    total, terms, found = 0.0, 0, []
    for sources, prefixes, targets in zip(*(tensor.split(128) for tensor in data.test.tensors), strict=True):
        total += token_loss(model, sources, prefixes, targets).item()
        terms += int((targets != IGNORED).sum())
        found += data.score.judge(model, (sources, prefixes), targets, torch.empty(0))
    model.train()
    return {"loss": total / terms, **data.score.summarize(found)}


# ---- work of a worker: each function returns JSON values


def trial(method: str, setting: dict[str, Any], budget: Budget, sharing: str = "reduce") -> dict[str, Any]:
    """Return how a setting ends on `dev`."""
    torch.set_num_threads(1)
    seldom = replace(budget, points=1)
    return list(train(translations(held_out="dev"), method, setting, TUNING_SEED, seldom, sharing))[-1]


def run_seed(method: str, setting: dict[str, Any], seed: int, budget: Budget) -> list[dict[str, Any]]:
    """Return the curve of the chosen setting on `test`."""
    torch.set_num_threads(1)
    return list(train(translations(), method, setting, seed, budget))


def copied(held_out: Literal["dev", "test"]) -> dict[str, float]:
    """Return the score of the sources as translations of held-out strings."""
    data = translations(held_out=held_out)
    assert isinstance(data.score, TranslationScore)
    sources, prefixes, targets = data.test.tensors
    return data.score.summarize(data.score.beside(sources, prefixes, targets))


def tune(trials: int, ledger: Ledger) -> tuple[dict[str, dict[str, Any]], dict[str, list[Any]]]:
    """Return each method's best setting on `dev`, and all trials."""
    settings = {method: draws(GRIDS[method], trials) for method in METHODS}
    tried = iter(ledger.all(trial, [(m, setting, TUNING) for m in METHODS for setting in settings[m]]))
    log = {method: [{"setting": setting, **next(tried)} for setting in settings[method]] for method in METHODS}
    best = {method: max(log[method], key=lambda entry: entry["chrF"])["setting"] for method in METHODS}
    print(best, flush=True)
    return best, log


def judge_chosen(best: dict[str, dict[str, Any]], seeds: int, final: Budget, ledger: Ledger) -> dict[str, Any]:
    """Train the chosen settings and judge them on `test`."""
    curves = iter(ledger.all(run_seed, [(m, best[m], seed, final) for m in METHODS for seed in range(seeds)]))
    by_method = {method: [next(curves) for _ in range(seeds)] for method in METHODS}
    return {
        "test": {
            method: {name: spread([curve[-1][name] for curve in found]) for name in found[0][-1] if name != "step"}
            for method, found in by_method.items()
        },
        "curves": by_method,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    looks = {"adamw": ("AdamW", "C0"), "kfac": ("K-FAC, reduce", "C1")}
    for axes, quantity in zip(rows, ("loss", "chrF"), strict=True):
        for axis, over, label in zip(axes, ("step", "seconds"), ("optimizer steps", "CPU seconds"), strict=True):
            for method, curves in results["curves"].items():
                title, color = looks[method]
                for index, curve in enumerate(curves):
                    x, y = ([point[key] for point in curve] for key in (over, quantity))
                    axis.plot(x, y, color=color, label=title if index == 0 else None)
            if quantity == "chrF":
                axis.axhline(
                    results["copied_source"]["test"]["chrF"], color="gray", linewidth=0.8, label="source, copied"
                )
            axis.set(xlabel=label, ylabel=f"held-out {quantity}")
            axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=1, help="of the chosen settings; 0 tunes only")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time, each of one thread")
    parser.add_argument("--out", type=Path, default=RESULTS / "translation.json")
    parser.add_argument("--ledger", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=TUNING.steps, help="steps of the chosen settings' trainings")
    parser.add_argument("--expand", action="store_true", help="repeat K-FAC's chosen trial in the expand setting")
    arguments = parser.parse_args()
    final = replace(TUNING, steps=arguments.steps, points=12)
    results: dict[str, Any] = {}
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        ledger = Ledger(arguments.ledger, pool)
        results["settings"], results["tuning"] = tune(arguments.trials, ledger)
        if arguments.seeds:
            results |= judge_chosen(results["settings"], arguments.seeds, final, ledger)
        if arguments.expand:
            repeated = ("kfac", results["settings"]["kfac"], TUNING, "expand")
            [results["expand_on_dev"]] = ledger.all(trial, [repeated])
    results["copied_source"] = {"dev": copied("dev"), "test": copied("test")}
    settings = {
        "tuning": asdict(TUNING),
        "final": asdict(final),
        "trials": arguments.trials,
        "grids": GRIDS,
        "tuning_seed": TUNING_SEED,
        "threads": 1,
        "trainings_at_a_time": arguments.workers,
    }
    print(write("translation", arguments.out, settings, results))
    if arguments.seeds:
        draw(results, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
