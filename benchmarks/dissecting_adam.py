"""Comparison of Adam's parts: sign or magnitude, with and without adaptation to the gradient's variance.

After Balles & Hennig, "Dissecting Adam" (ICML 2018), figure 4: momentum SGD, Adam, M-SSD and M-SVAG with β = 0.9 (Adam:
0.9 and 0.999) and a constant learning rate from grids of equal size, chosen on a seed of its own by the final training
loss; then the chosen one on other seeds. Beside the losses: how the relative variance η² of each parameter's gradient
develops in the runs of M-SVAG, which measures it anyway.

    python -m benchmarks.dissecting_adam [--seeds 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.reporting import RESULTS, spread, write
from benchmarks.workloads import reconstruction
from kfac_dist.config.schema import Target
from kfac_dist.optimizers.dissected import MSSD, MSVAG
from kfac_dist.optimizers.variance import RelativeVariance, tally_of
from kfac_dist.reporting.curves import STYLES, smoothed
from kfac_dist.tasks import build_data, build_model

TUNING_SEED = 1000
BETA = 0.9
RECORDS = 12  # of η² in a run
LAST = 0.1  # share of the steps whose mean loss is a run's figure


@dataclass(frozen=True)
class Problem:
    """A model, its data and loss, and how long it trains."""

    title: str
    model: Target
    data: Target
    loss: Callable[[Tensor, Tensor], Tensor]
    unit: str
    batch: int
    steps: int


def _next_bytes(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


PROBLEMS = {
    "digits": Problem(
        "digits autoencoder, batches of 128",
        Target(name="autoencoder", args={"dims": [64, 100, 50, 25, 8], "activation": "tanh"}),
        Target(name="digits", args={"target": "input"}),
        reconstruction,
        "training loss (nats an image)",
        128,
        1000,
    ),
    "byte_gpt": Problem(
        "byte GPT of 2 layers, width 64, batches of 16",
        Target(name="byte_gpt", args={"layers": 2, "width": 64, "heads": 4, "context": 64}),
        Target(name="byte_text", args={"context": 64}),
        _next_bytes,
        "training loss (nats a byte)",
        16,
        400,
    ),
}

# Six of each, three to a decade and a half.
STEEP = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
SIGNS = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03]

Build = Callable[[Any, float], torch.optim.Optimizer]
METHODS: dict[str, tuple[str, list[float], Build]] = {
    "msgd": (
        "momentum SGD (magnitude)",
        STEEP,
        # Damped like the others' averages, so that all learning rates mean the step of a steady gradient.
        lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=BETA, dampening=BETA, foreach=True),
    ),
    "msvag": ("M-SVAG (magnitude, adapted)", STEEP, lambda p, lr: MSVAG(p, lr, BETA)),
    "mssd": ("M-SSD (sign)", SIGNS, lambda p, lr: MSSD(p, lr, BETA)),
    "adam": ("Adam (sign, adapted)", SIGNS, lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(BETA, 0.999))),
}


@dataclass
class Training:
    """Results of one training: the loss of every batch, and η² of each parameter at some steps."""

    losses: list[float]
    variances: dict[str, list[dict[str, float]]]

    @property
    def final(self) -> float:
        last = self.losses[-max(1, round(LAST * len(self.losses))) :]
        value = sum(last) / len(last)
        return value if math.isfinite(value) else math.inf


def train(problem: Problem, method: str, lr: float, seed: int) -> Training:
    """Train once."""
    torch.manual_seed(seed)
    model = build_model(problem.model)
    inputs, targets = build_data(problem.data).train.tensors
    optimizer = METHODS[method][2](model.parameters(), lr)
    order = torch.Generator().manual_seed(seed)
    losses: list[Tensor] = []
    variances: dict[str, list[dict[str, float]]] = {}
    for step in range(1, problem.steps + 1):
        rows = torch.randint(len(inputs), (problem.batch,), generator=order)
        optimizer.zero_grad()
        loss = problem.loss(model(inputs[rows]), targets[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if isinstance(optimizer, MSVAG) and step % (problem.steps // RECORDS) == 0:
            for name, found in relative_variances(model, optimizer).items():
                variances.setdefault(name, []).append({"step": step, **vars(found)})
    return Training(torch.stack(losses).tolist(), variances)


def relative_variances(model: nn.Module, optimizer: MSVAG) -> dict[str, RelativeVariance]:
    """η² of every parameter, as the optimizer has it."""
    found = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        variance = RelativeVariance.of(tally_of(state["exp_avg"], state["exp_avg_sq"], BETA, int(state["step"])))
        if variance is not None:
            found[name] = variance
    return found


def study(problem: Problem, seeds: int) -> dict[str, Any]:
    """Tune every method, then train it with the chosen setting."""
    methods: dict[str, Any] = {}
    for name, (_, grid, _) in METHODS.items():
        trials = [{"lr": lr, "loss": train(problem, name, lr, TUNING_SEED).final} for lr in grid]
        chosen = min(trials, key=lambda trial: trial["loss"])["lr"]
        runs = [train(problem, name, chosen, seed) for seed in range(seeds)]
        finals = [run.final for run in runs]
        methods[name] = {
            "trials": trials,
            "lr": chosen,
            "at_the_edge": chosen in (grid[0], grid[-1]),
            "final_loss": spread(finals),
            "final_losses": finals,
            "losses": [round(value, 4) for value in runs[0].losses],
            "relative_variance": runs[0].variances,
        }
        print(f"  {name:6s} lr {chosen:g}: {statistics.median(finals):.4f}", flush=True)
    return methods


def draw(results: dict[str, Any], path: Path) -> None:
    """One row for each problem: losses, and the medians of η²."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2 * len(results)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(results), 2, squeeze=False)
    for (name, methods), (left, right) in zip(results.items(), panels, strict=True):
        problem = PROBLEMS[name]
        for (method, found), (colour, line, _) in zip(methods.items(), STYLES, strict=False):
            left.plot(
                range(1, len(found["losses"]) + 1),
                smoothed(found["losses"], max(1, problem.steps // 40)),
                color=colour,
                linestyle=line,
                label=f"{METHODS[method][0]}, lr {found['lr']:g}",
            )
        left.set(title=problem.title, xlabel="step", ylabel=problem.unit)
        finals = [found["final_loss"]["median"] for found in methods.values()]
        left.set_ylim(min(finals) * 0.9, max(finals) * 1.5)
        left.legend(frameon=False, fontsize=8)
        for parameter, records in methods["msvag"]["relative_variance"].items():
            weights = parameter.endswith("weight")
            right.plot(
                [record["step"] for record in records],
                [record["median"] for record in records],
                color="#0072B2" if weights else "#E69F00",
                linewidth=1.0,
                alpha=0.7,
            )
        right.plot([], [], color="#0072B2", label="weights, one line each")
        right.plot([], [], color="#E69F00", label="biases and other vectors")
        right.axhline(1, color="#555555", linewidth=0.8, linestyle=":")
        right.set(title="relative variance of the gradient", xlabel="step", ylabel="median η² of a parameter")
        right.set_yscale("log")
        right.legend(frameon=False, fontsize=8)
        for axes in (left, right):
            axes.grid(color="#dddddd", linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    results = {}
    for name in arguments.problems:
        print(PROBLEMS[name].title, flush=True)
        results[name] = study(PROBLEMS[name], arguments.seeds)
    settings = {"seeds": arguments.seeds, "tuning_seed": TUNING_SEED, "beta": BETA}
    settings |= {"cpu_seconds": round(time.process_time() - began)}
    path = write("dissecting_adam", arguments.out or RESULTS / "dissecting_adam.json", settings, results)
    draw(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
