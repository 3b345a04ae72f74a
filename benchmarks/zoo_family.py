"""One family of the zoo in separate processes: the findings of `doctor`, and five steps on one rank and on two.

    examined(name)               the doctor's report, shares of parameters, exactness; then the steps on one rank
    stepped(name, file, …)       the steps on a rank of a world that meets in a file

A family whose model fails by itself, with no K-FAC about, counts as not built. Everything that draws random numbers in
a model is off in the steps that are compared (evaluation mode, or for models that can't be differentiated in it the one
in which the doctor measures them); two more steps on one rank run in training mode with dropout as the class has it.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.zoo_models import SEQUENCES, Absent, build, data, families
from kfac_dist import KFAC
from kfac_dist.config.schema import Config
from kfac_dist.config.yaml.load import resolve
from kfac_dist.curvature.blocks import Coverage
from kfac_dist.doctor import Severity, examine
from kfac_dist.doctor.measure import Still, still_in_training
from kfac_dist.tasks import build_loss
from kfac_dist.training.data.batches import source_of
from kfac_dist.training.trial import try_two_passes

STEPS, TRAINING_STEPS, BATCH, SEED = 5, 2, 8, 1
LR, DAMPING = 0.02, 0.03
FLOOR = 1e-3
"""Parameters smaller than this are compared by it."""

IDLE = "no backward pass comes through its calls"
CHECKED = ("Linear", "Conv", "Embedding", "Norm")
"""Parts of a type's name by which a module counts as one that K-FAC should cover or name."""


def examined(name: str) -> dict[str, Any]:
    """Return the results of a family on one rank; `state` are its parameters after the steps."""
    _quiet()
    torch.manual_seed(SEED)
    model = build(name)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    _try_alone(model, name)
    del model
    found |= _doctor(name)
    trained = steps(name, STEPS)
    found |= _coverage(trained)
    found["training_mode"] = all(map(math.isfinite, steps(name, TRAINING_STEPS, training=True).losses))
    return {**found, "losses": trained.losses, "state": trained.state}


def stepped(name: str, rendezvous: str, rank: int, size: int, with_kfac: bool) -> dict[str, Any]:
    """Return the parameters after the steps as one of several ranks over gloo, or alone with size 1."""
    _quiet()
    if size == 1:
        return {"state": steps(name, STEPS, with_kfac=with_kfac).state}
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        dist.barrier()
        return {"state": steps(name, STEPS, with_kfac=with_kfac).state}
    finally:
        dist.destroy_process_group()


def _try_alone(model: nn.Module, name: str) -> None:
    """Pass the first samples through a model, forward and back.

    Raises:
        Absent: That fails.
    """
    inputs, targets = data(name).train.tensors
    try:
        _loss(model.train()(inputs[:BATCH]).float(), targets[:BATCH]).backward()
    except Exception as error:  # whatever the model raises
        raise Absent(f"the model itself fails, without K-FAC: {type(error).__name__}: {error}") from error


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def _still(model: nn.Module, name: str) -> Still:
    """Return how to set the mode in which nothing is drawn and the model can be differentiated."""
    source = source_of(data(name).train, torch.device("cpu"), 0)
    loss = build_loss(configuration(name).loss)
    return still_in_training if try_two_passes(model, loss, source, nn.Module.eval) else nn.Module.eval


@dataclass(frozen=True)
class Trained:
    """Results of some steps: the parameters, the losses of this rank's part, and K-FAC's coverage."""

    model: nn.Module
    losses: list[float]
    coverage: Coverage | None

    @property
    def state(self) -> dict[str, Tensor]:
        return {key: value.detach().clone() for key, value in self.model.named_parameters()}


def steps(name: str, count: int, *, training: bool = False, with_kfac: bool = True) -> Trained:
    """Train on this rank's part of each global batch."""
    family = next(family for family in families() if family.name == name)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    token = family.task in SEQUENCES
    torch.manual_seed(SEED)
    model = build(name).train()
    if not training:
        _still(model, name)(model)
    torch.manual_seed(SEED)
    inputs, targets = data(name).train.tensors
    # Experts, and parts of a model that the logits don't need, may be left without a gradient.
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    kfac = None
    if with_kfac:
        options: dict[str, Any] = {
            "curvature": {
                "factor_every": 2,
                "decay": 0.8,
                "likelihood": "categorical",
                "loss_terms": "token" if token else "sample",
            },
            "inversion": {"inverse_every": 2, "damping": DAMPING},
        }
        kfac = KFAC(wrapped, options, optimizer=optimizer)
    losses = []
    for step in range(count):
        own = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
        chosen = (torch.arange(BATCH) + step * BATCH // 2) % len(inputs)
        x, y = inputs[chosen][own], targets[chosen][own]
        if kfac is not None:
            kfac.micro_batch(first_sample=own.start, divisor=float(y.numel()), terms=float(y.numel()))
        optimizer.zero_grad()
        loss = _loss(wrapped(x).float(), y)
        loss.backward()
        if kfac is not None:
            kfac.step()
        optimizer.step()
        losses.append(loss.item())
    return Trained(model, losses, None if kfac is None else kfac.coverage)


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference of any parameter, relative to the largest value of its tensor, and where."""
    worst, where = 0.0, ""
    for key, value in wanted.items():
        error = float((found[key] - value).abs().max() / value.abs().max().clamp(min=FLOOR)) if value.numel() else 0.0
        if not error <= worst:  # NaN, too
            worst, where = error, key
    return worst, where


def configuration(name: str) -> Config:
    """Return the run that the doctor examines."""
    family = next(family for family in families() if family.name == name)
    token = family.task in SEQUENCES
    return resolve(
        Config.model_validate(
            {
                "run": {"name": name, "directory": "unused", "seed": SEED, "device": "cpu", "timeout_seconds": 60},
                "model": {"name": "benchmarks.zoo_models:build", "args": {"name": name}},
                "data": {"name": "benchmarks.zoo_models:data", "args": {"name": name}},
                "loss": {"name": "token_cross_entropy" if token else "cross_entropy"},
                "optimizer": {"name": "sgd", "lr": LR},
                "kfac": {"inversion": {"damping": DAMPING}},
                "train": {"batch_size": BATCH, "steps": STEPS},
                "checkpoint": {"every": 0},
            }
        )
    )


def _coverage(trained: Trained) -> dict[str, Any]:
    """Return which values have a block after the steps, by kind of module, and why the others have none."""
    coverage = trained.coverage
    assert coverage is not None
    blocks = {key: block.name for block in coverage.blocks for key in block.parameters}
    modules = dict(trained.model.named_modules())
    covered: Counter[str] = Counter()
    values: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {}
    unnamed = []
    for key, parameter in trained.model.named_parameters():
        size = parameter.numel()
        holder = type(modules[key.rpartition(".")[0]]).__name__
        kind = next((part for part in CHECKED if part.lower() in holder.lower()), "others")
        values[kind] += size
        reason = IDLE if blocks.get(key) in coverage.idle else coverage.uncovered.get(key, "")
        if key in blocks and reason != IDLE:
            covered[kind] += size
        elif not reason:
            unnamed.append(key)
        else:
            # Without numbers and without the correction.
            reason = re.sub(r" by (its whole size|\S+ of its norm)", "", reason).partition(":")[0]
            reasons.setdefault(reason, Counter()).update(parameters=1, values=size)
    return {
        "covered": sum(covered.values()) / max(sum(values.values()), 1),
        "layers": {kind: [covered[kind], values[kind]] for kind in values},
        "unnamed": unnamed,
        "reasons": {reason: dict(counts) for reason, counts in reasons.items()},
    }


def _doctor(name: str) -> dict[str, Any]:
    report = examine(configuration(name))
    exact = [row.error for row in report.curvature if row.exact and row.error is not None]
    cosines = sorted(row.cosine for row in report.curvature if not row.exact and row.cosine is not None)
    return {
        "verdict": report.verdict,
        "findings": [
            [str(finding.severity), finding.check, re.sub(r"(?<![\w.])/\S+/(?=[^/\s]+:\d)", "", finding.text)]
            for finding in report.findings
            if finding.severity is not Severity.FINE
        ],
        "exact": {"blocks": len(exact), "worst": max(exact, default=None)},
        "cosine": cosines[len(cosines) // 2] if cosines else None,
    }


def _quiet() -> None:
    from transformers import logging

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    os.environ["HF_HUB_OFFLINE"] = "1"
