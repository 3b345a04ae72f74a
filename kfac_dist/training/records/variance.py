"""The relative variance of every parameter's gradient, from the optimizer's averages, over all ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.engines import TrainingEngine
from kfac_dist.optimizers.variance import TALLY, RelativeVariance, shared_beta, tally_of

FILE = "relative_variance.json"


@torch.no_grad()
def relative_variances(
    engine: TrainingEngine, optimizer: torch.optim.Optimizer, communicator: Communicator
) -> dict[str, RelativeVariance]:
    """Return η² of each parameter by name; empty for optimizers that don't average squares; one sum over the ranks.

    Waits for the device.
    """
    betas = {shared_beta(group) for group in optimizer.param_groups}
    beta = betas.pop() if len(betas) == 1 else None
    names = [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    rows = {name: row for row, name in enumerate(names)}
    device = next(engine.module.parameters()).device
    tallies = torch.zeros(len(names), TALLY, dtype=torch.float64, device=device)
    for holding in engine.holdings():
        state = optimizer.state.get(holding.key, {}) if holding.key is not None else {}
        if beta is not None and "exp_avg_sq" in state:
            mean, square = holding.within(state["exp_avg"]), holding.within(state["exp_avg_sq"])
            tallies[rows[holding.name]] += tally_of(mean, square, beta, int(state["step"])).to(device)
    communicator.all_reduce(tallies, label="relative variance").wait()
    found = {name: RelativeVariance.of(tallies[row].cpu()) for name, row in rows.items()}
    return {name: variance for name, variance in found.items() if variance is not None}


def variance_metrics(found: Mapping[str, RelativeVariance]) -> dict[str, float]:
    """Return their entries in a line of metrics."""
    return {
        f"relative_variance/{name}/{key}": value for name, row in found.items() for key, value in asdict(row).items()
    }


def describe_variances(found: Mapping[str, RelativeVariance]) -> str:
    """Return them in a line: the least and the most noisy parameter."""
    least, most = (choose(found, key=lambda name: found[name].median) for choose in (min, max))
    return (
        f"relative variance of gradients ({FILE}): median η² from {found[least].median:.3g} ({least}) to "
        f"{found[most].median:.3g} ({most})"
    )


def write_variances(found: Mapping[str, RelativeVariance], directory: Path) -> None:
    """Write them as a file of the run."""
    text = json.dumps({name: asdict(row) for name, row in found.items()}, indent=2)
    (directory / FILE).write_text(text + "\n")
