"""Class-conditional factors against the exact block, and in training against plain K-FAC: errors and steps, no seconds.

    python -m benchmarks.class_conditional          # writes benchmarks/results/class_conditional.json, minutes

Part one: a small classifier of digits, trained for a while; at some steps each layer's exact Fisher block over all
training samples is enumerated, and compared in Frobenius norm with

    plain       E[A]⊗E[G]
    by class    the Kronecker product that is nearest to Σ π_c A_c⊗G_c
    sum         Σ π_c A_c⊗G_c itself, which no solver could invert
    nearest     the exact block's own nearest Kronecker product: no product does better

Part two: the same classifier trained by either, each at the best of the same grid of learning rates and dampings.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks import reporting
from kfac_dist import KFAC
from kfac_dist.curvature.class_conditional import nearest, summarize
from kfac_dist.tasks.data import digits
from kfac_dist.tasks.models.mlp import mlp

CLASSES = 10
WIDTHS = [64, 16, CLASSES]
SHOWN = (0, 5, 20, 50, 100, 200)
SEEDS = (0, 1, 2)
BATCH = 128
STEPS = 200
TARGET = 0.1
GRID: dict[str, list[float]] = {"lr": [0.05, 0.1, 0.3], "damping": [0.01, 0.03, 0.1]}


def _data() -> tuple[TensorDataset, TensorDataset]:
    splits = digits()
    assert isinstance(splits.train, TensorDataset)
    assert isinstance(splits.test, TensorDataset)
    return splits.train, splits.test


def _layers(model: nn.Sequential, inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return each linear layer's inputs with the homogeneous coordinate, its outputs in the graph, and the logits."""
    found: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    hidden = inputs
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            found[name] = torch.cat([hidden.detach(), hidden.new_ones(len(hidden), 1)], dim=1)
        hidden = layer(hidden)
        if isinstance(layer, nn.Linear):
            outputs[name] = hidden
    return found, outputs, hidden


def _columns(logits: Tensor, labels: Tensor, fisher: str) -> list[tuple[Tensor, Tensor]]:
    """Return the vectors that are sent back from the logits, each with every sample's share in the classes `[N, C]`."""
    probability = logits.detach().softmax(-1)
    if fisher == "empirical":
        members = F.one_hot(labels, CLASSES).to(logits)
        return [(probability - members, members)]
    columns = []
    for index in range(CLASSES):
        unit = F.one_hot(torch.full_like(labels, index), CLASSES).to(logits)
        share = probability[:, index, None]
        columns.append((share.sqrt() * (unit - probability), share * unit))
    return columns


def _errors(model: nn.Sequential, inputs: Tensor, labels: Tensor, fisher: str) -> dict[str, dict[str, float]]:
    """Return the relative Frobenius errors of every layer's approximations; everything in float64."""
    rows, outputs, logits = _layers(model, inputs)
    size = len(inputs)
    columns = _columns(logits, labels, fisher)
    found = {}
    for name, a in rows.items():
        d_a, d_g = a.shape[1], outputs[name].shape[1]
        exact = a.new_zeros(d_g * d_a, d_g * d_a)
        sums_a, sums_g = a.new_zeros(CLASSES, d_a, d_a), a.new_zeros(CLASSES, d_g, d_g)
        weights = a.new_zeros(CLASSES)
        for vector, shares in columns:
            [g] = torch.autograd.grad(logits, outputs[name], vector, retain_graph=True)
            flat = torch.einsum("bi,bj->bij", g, a).flatten(1)
            exact += flat.mT @ flat / size
            member = shares / shares.sum(-1, keepdim=True)  # of gradients, which have their share in them
            sums_a += torch.einsum("bc,bi,bj->cij", shares, a, a)
            sums_g += torch.einsum("bc,bi,bj->cij", member, g, g)
            weights += shares.sum(0)
        found[name] = _compare(exact, sums_a, sums_g, weights)
    return found


def _compare(exact: Tensor, sums_a: Tensor, sums_g: Tensor, weights: Tensor) -> dict[str, float]:
    pi = weights / weights.sum()
    there = weights > 0
    a, g = sums_a[there] / weights[there, None, None], sums_g[there] / weights[there, None, None]
    pi = pi[there]
    ones = torch.ones_like(pi)
    alpha, beta = nearest(summarize(a[:, None], ones).products, summarize(g[:, None], ones).products, pi)
    products = {
        "plain": torch.kron((pi[:, None, None] * g).sum(0), (pi[:, None, None] * a).sum(0)),
        "by class": torch.kron(torch.einsum("c,cij->ij", beta[0], g), torch.einsum("c,cij->ij", alpha[0], a)),
        "sum": sum((p * torch.kron(y, x) for p, x, y in zip(pi, a, g, strict=True)), torch.zeros_like(exact)),
        "nearest": _nearest_product(exact, g.shape[-1], a.shape[-1]),
    }
    return {name: float((product - exact).norm() / exact.norm()) for name, product in products.items()}


def _nearest_product(exact: Tensor, d_g: int, d_a: int) -> Tensor:
    """Return the first term of the exact block's Kronecker SVD."""
    rearranged = exact.view(d_g, d_a, d_g, d_a).permute(0, 2, 1, 3).reshape(d_g**2, d_a**2)
    u, s, v = torch.svd_lowrank(rearranged, q=4, niter=20)
    return torch.kron((u[:, 0] * s[0]).view(d_g, d_g), v[:, 0].view(d_a, d_a))


def frobenius() -> list[dict[str, Any]]:
    """Return the errors at each shown step, means over seeds."""
    train, _ = _data()
    inputs, labels = train.tensors
    collected: dict[tuple[int, str, str], list[dict[str, float]]] = {}
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = mlp(WIDTHS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(max(SHOWN) + 1):
            if step in SHOWN:
                exactly = mlp(WIDTHS).double()
                exactly.load_state_dict(model.state_dict())
                for fisher in ("empirical", "type2"):
                    for layer, errors in _errors(exactly, inputs.double(), labels, fisher).items():
                        collected.setdefault((step, fisher, layer), []).append(errors)
            chosen = torch.randint(0, len(inputs), (BATCH,))
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
            optimizer.step()
    return [
        {"step": step, "fisher": fisher, "layer": layer, **{key: mean(e[key] for e in errors) for key in errors[0]}}
        for (step, fisher, layer), errors in collected.items()
    ]


def _train(by_class: bool, fisher: str, lr: float, damping: float, seed: int) -> dict[str, float]:
    """Train once; returns the steps to the target (`STEPS` + 1 if it isn't met), and where it ends."""
    (train, test), settings = _data(), {"classes": CLASSES} if by_class else None
    inputs, labels = train.tensors
    torch.manual_seed(seed)
    model = mlp(WIDTHS)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    config = {
        "curvature": {"fisher": fisher, "likelihood": "categorical", "class_conditional": settings},
        "inversion": {"damping": damping, "inverse_every": 20},
        "update": {"kl_clip": 0.01, "kl_clip_lr": lr},
    }
    kfac = KFAC(model, config, optimizer=optimizer)
    reached = STEPS + 1
    for step in range(1, STEPS + 1):
        chosen = torch.randint(0, len(inputs), (BATCH,))
        kfac.micro_batch(classes=labels[chosen])
        optimizer.zero_grad()
        outputs = model(inputs[chosen])
        kfac.fisher_backward(outputs)
        F.cross_entropy(outputs, labels[chosen]).backward()
        kfac.step()
        optimizer.step()
        if reached > STEPS and step % 5 == 0 and _loss(model, train) < TARGET:
            reached = step
    kfac.remove()
    with torch.no_grad():
        right = (model(test.tensors[0]).argmax(-1) == test.tensors[1]).float().mean()
    return {"steps": reached, "train_loss": _loss(model, train), "test_accuracy": float(right)}


@torch.no_grad()
def _loss(model: nn.Module, data: TensorDataset) -> float:
    return float(F.cross_entropy(model(data.tensors[0]), data.tensors[1]))


def training() -> list[dict[str, Any]]:
    """Return, for each way, the grid's best by steps, then loss: means over seeds."""
    found: list[dict[str, Any]] = []
    for fisher, by_class in itertools.product(("empirical", "mc"), (False, True)):
        tried = []
        for lr, damping in itertools.product(*GRID.values()):
            runs = [_train(by_class, fisher, lr, damping, seed) for seed in SEEDS]
            tried.append({"lr": lr, "damping": damping, **{key: mean(run[key] for run in runs) for key in runs[0]}})
        best = min(tried, key=lambda entry: (entry["steps"], entry["train_loss"]))
        found.append({"fisher": fisher, "class_conditional": by_class, **best})
    return found


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write, instead of benchmarks/results/class_conditional.json")
    arguments = parser.parse_args()
    settings = {"widths": WIDTHS, "seeds": SEEDS, "batch": BATCH, "steps": STEPS, "target": TARGET, "grid": GRID}
    results = {"frobenius": frobenius(), "training": training()}
    print(f"wrote {reporting.write('class_conditional', arguments.out, settings, results)}")


if __name__ == "__main__":
    main()
