"""A start from which plain K-FAC diverges, with each mechanism that stabilises it.

The autoencoder on digits with ReLUs and initial weights three times too large; the settings are those of
configs/bad_start.yaml but for what a way changes. A run whose loss is not finite has diverged and ends there: the guard
of `kfac-dist train`, which would skip such steps, is not part of this.

    python -m benchmarks.bad_start [--seeds 5] [--out FILE]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting import RESULTS, spread, write
from benchmarks.workloads import reconstruction
from kfac_dist import KFAC
from kfac_dist.config.schedules import value_at
from kfac_dist.config.schema import Config, LossName
from kfac_dist.config.yaml.load import load_config
from kfac_dist.optimizers import build_optimizer, set_learning_rate
from kfac_dist.reporting.curves import STYLES
from kfac_dist.tasks import build_data, build_model

CONFIG = Path(__file__).parents[1] / "configs" / "bad_start.yaml"
BARE = ("optimizer.lr=0.1", "kfac.inversion.damping=0.03", "kfac.update.graft=null")
HIGHEST = 1e5  # of the picture
CLIP = ("kfac.update.kl_clip=0.03", "kfac.update.kl_clip_lr=0.1")
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bare": ("K-FAC, bare", BARE),
    "warm-ups": (
        "warm-ups of lr and damping",
        (
            *BARE,
            "optimizer.lr={value: 0.1, warmup_steps: 20}",
            "kfac.inversion.damping={value: 3.0, kind: exponential, final: 0.03, steps: 100}",
        ),
    ),
    "graft gradient": ("grafted to the gradient's length", (*BARE, "optimizer.lr=0.003", "kfac.update.graft=gradient")),
    "clip": ("trust region by KL", (*BARE, *CLIP)),
    "clip, adapt": ("trust region, damping follows it", (*BARE, *CLIP, "kfac.inversion.adapt={every: 10}")),
    "graft sign": ("grafted to sign descent's length", (*BARE, "optimizer.lr=0.003", "kfac.update.graft=sign")),
    "shipped": ("the same with warm-ups: configs/bad_start.yaml", ()),
}


def train(config: Config, seed: int) -> tuple[list[float], float]:
    """Train once; the loss of every batch, and of the whole training set at the end (infinite if it diverged)."""
    torch.manual_seed(seed)
    model = build_model(config.model)
    data = build_data(config.data).train.tensors[0]
    steps = config.train.steps or 0
    optimizer = build_optimizer(model.parameters(), config.first_order)
    likelihood = {"likelihood": LossName.SIGMOID_CROSS_ENTROPY.likelihood}
    options = config.kfac.model_copy(update={"curvature": config.kfac.curvature.model_copy(update=likelihood)})
    kfac = KFAC(model, options, optimizer=optimizer, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for step in range(steps):
        set_learning_rate(optimizer, value_at(config.first_order.lr, step, steps))
        batch = data[torch.randint(len(data), (config.train.batch_size,), generator=order)]
        optimizer.zero_grad()
        outputs = model(batch)
        kfac.fisher_backward(outputs)
        loss = reconstruction(outputs, batch)
        loss.backward()
        kfac.step()
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    kfac.remove()
    with torch.no_grad():
        final = reconstruction(model(data), data).item()
    return losses, final if math.isfinite(final) and len(losses) == steps else math.inf


def study(seeds: int) -> dict[str, Any]:
    """Train every way from every start."""
    results: dict[str, Any] = {}
    for name, (_, overrides) in WAYS.items():
        config = load_config(CONFIG, overrides)
        runs = [train(config, seed) for seed in range(seeds)]
        finals = [final for _, final in runs if math.isfinite(final)]
        results[name] = {
            "overrides": overrides,
            "diverged": seeds - len(finals),
            "steps_before_divergence": [len(losses) - 1 for losses, final in runs if not math.isfinite(final)],
            "final_loss": spread(finals) if finals else None,
            "losses": [round(loss, 3) for loss in runs[0][0] if math.isfinite(loss)],
        }
        print(name, results[name]["diverged"], "diverged;", results[name]["final_loss"], flush=True)
    return results


def draw(results: dict[str, Any], seeds: int, path: Path) -> None:
    """One line for each way, of the first seed; a cross where it ended too early."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    longest = max(len(found["losses"]) for found in results.values())
    for index, (name, found) in enumerate(results.items()):
        colour, line, _ = STYLES[index % len(STYLES)]
        losses = found["losses"]
        steps = range(1, len(losses) + 1)
        (drawn,) = axes.plot(steps, losses, linestyle=line, color=colour if index < len(STYLES) else "#000000")
        fate = f" (diverges in {found['diverged']} of {seeds})" if found["diverged"] else ""
        drawn.set_label(WAYS[name][0] + fate)
        if len(losses) < longest:
            axes.plot(
                steps[-1:], [min(losses[-1], HIGHEST)], "x", color=drawn.get_color(), markersize=9, markeredgewidth=2
            )
    axes.set(title="initial weights three times too large", xlabel="step", ylabel="training loss of the batch")
    axes.set_yscale("log")
    axes.set_ylim(12, HIGHEST)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = study(arguments.seeds)
    path = write("bad_start", arguments.out or RESULTS / "bad_start.json", {"seeds": arguments.seeds}, results)
    draw(results, arguments.seeds, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
