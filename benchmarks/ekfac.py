"""EKFAC and K-FAC: their distance to the exact Fisher block, and their loss after the same number of steps.

Errors are ‖F − F̂‖/‖F‖ in Frobenius norm, of those layers of the digits autoencoder whose block fits into memory, on one
batch: at the initial parameters, and along a training. Both have the same eigenbasis, K-FAC the eigenvalues of A ⊗ G in
it, EKFAC the second moments that were measured in it. The losses are the full training set's after each training of the
shipped lengths, on seeds of its own. Seconds are CPU seconds of one thread.

    python -m benchmarks.ekfac [--seeds 3] [--out FILE]
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reporting import spread, write
from benchmarks.workloads import reconstruction
from kfac_dist import KFAC
from kfac_dist.config.schema import KFACConfig, Target
from kfac_dist.config.yaml.load import load_config, resolve
from kfac_dist.tasks import build_data
from kfac_dist.tasks.models.autoencoder import autoencoder

ROOT = Path(__file__).parents[1]
DIMS = [64, 100, 50, 25, 8]
BATCH, STEPS = 256, 300
LOOKS = (0, 100, 300)
LARGEST = 700
RUNS: dict[str, dict[str, Any]] = {
    "cholesky": {},
    "eigen": {"solver": "eigen"},
    "ekfac": {"solver": "ekfac"},
    "ekfac, moments at every step": {"solver": "ekfac", "rescale_every": 1},
}


def settings() -> KFACConfig:
    """The shipped configuration of the digits autoencoder; only the solver differs between runs."""
    return resolve(load_config(ROOT / "configs" / "digits_autoencoder.yaml")).kfac


def with_inversion(config: KFACConfig, changes: dict[str, Any]) -> KFACConfig:
    values = config.model_dump()
    values["inversion"] |= changes
    return KFACConfig.model_validate(values)


def errors(model: nn.Module, batch: Tensor) -> dict[str, dict[str, float]]:
    """Relative errors of both by layer, at the model's parameters."""
    options = {
        "curvature": {"fisher": "type2", "likelihood": "bernoulli", "factor_every": 1, "decay": 0.0},
        "inversion": {"solver": "ekfac", "inverse_every": 100, "early_refresh": 0},
        "update": {"kl_clip": None},
    }
    kfac = KFAC(model, options)
    for _ in range(2):  # bases, then moments in them
        outputs = model(batch)
        kfac.fisher_backward(outputs)
        kfac.step()
    state = kfac.state_dict()
    kfac.remove()
    found = {}
    for block in kfac.coverage.blocks:
        if math.prod(block.matrix_shape) > LARGEST:
            continue
        payloads = {side: state["units"][f"{block.name}/{side}/0"]["payload"].double() for side in "AG"}
        moments = state["moments"][f"{block.name}/S/0"]
        measured = (moments["sum"] / moments["scalars"][0]).double().flatten()
        sizes = {"G": block.matrix_shape[1], "A": block.matrix_shape[2]}
        bases = {side: p[: sizes[side] ** 2].view(sizes[side], -1) for side, p in payloads.items()}
        values = {side: p[sizes[side] ** 2 :] for side, p in payloads.items()}
        q = torch.kron(bases["G"], bases["A"])
        rotated = q.T @ exact_block(model, block.module, batch) @ q
        kronecker = torch.outer(values["G"], values["A"]).flatten()
        found[block.name] = {
            "kfac": float((rotated - kronecker.diag()).norm() / rotated.norm()),
            "ekfac": float((rotated - measured.diag()).norm() / rotated.norm()),
        }
    return found


def exact_block(model: nn.Module, layer: nn.Module, batch: Tensor) -> Tensor:
    """The layer's block of the Fisher of independent pixels, `[d_out·(d_in+1)]²`, without any approximation."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(inputs=args[0].detach(), output=output)

    handle = layer.register_forward_hook(keep)
    outputs = model(batch)
    handle.remove()
    p = outputs.detach().sigmoid().double()
    rows = torch.cat([seen["inputs"], torch.ones(len(batch), 1)], dim=1).double()
    block = torch.zeros(1, dtype=torch.float64)
    for pixel in range(outputs.shape[1]):
        [grad] = torch.autograd.grad(outputs[:, pixel].sum(), seen["output"], retain_graph=True)
        scaled = grad.double() * (p[:, pixel] * (1 - p[:, pixel])).sqrt()[:, None]
        flat = (scaled[:, :, None] * rows[:, None, :]).flatten(1)
        block = block + flat.T @ flat
    return block / len(batch)


def train(data: Tensor, config: KFACConfig, seed: int, looks: dict[int, Any] | None = None) -> tuple[float, float]:
    """Return the loss after the shipped run's steps, and its CPU seconds; `looks` takes errors along the way."""
    torch.manual_seed(seed)
    model = autoencoder(dims=DIMS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
    kfac = KFAC(model, config, optimizer=optimizer, total_steps=STEPS)
    generator = torch.Generator().manual_seed(seed)
    seconds = 0.0
    for step in range(STEPS + 1):
        if looks is not None and step in LOOKS:
            copy = autoencoder(dims=DIMS)  # without the training's hooks
            copy.load_state_dict(model.state_dict())
            looks[step] = errors(copy, data[:BATCH])
        if step == STEPS:
            break
        started = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 + 0.09 * (1 + math.cos(math.pi * step / STEPS)) / 2
        batch = data[torch.randint(len(data), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        outputs = model(batch)
        kfac.fisher_backward(outputs)
        reconstruction(outputs, batch).backward()
        kfac.step()
        optimizer.step()
        seconds += time.process_time() - started
    kfac.remove()
    with torch.no_grad():
        return float(reconstruction(model(data), data)), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = build_data(Target(name="digits", args={"target": "input"})).train.tensors[0]
    config = settings()
    looks: dict[int, Any] = {}
    train(data, config, seed=0, looks=looks)
    losses = {}
    for name, changes in RUNS.items():
        ends = [train(data, with_inversion(config, changes), seed) for seed in range(1, arguments.seeds + 1)]
        losses[name] = {
            "loss": spread([loss for loss, _ in ends]),
            "seconds": spread([seconds for _, seconds in ends]),
        }
        print(f"{name}: {losses[name]['loss']['median']:.3f} in {losses[name]['seconds']['median']:.2f} s")
    path = write("ekfac", arguments.out, {"batch": BATCH, "steps": STEPS}, {"errors": looks, "losses": losses})
    print(path)


if __name__ == "__main__":
    main()
