"""`kfac-dist doctor --fisher`: the better estimator of the diagonal Fisher in each layer, and the cost of labels.

What Soen & Sun (2024) ask for before a long run: both estimators' variances at the initial weights and how they move
over the first steps, which are really taken: with the run's optimizer, K-FAC and data. Every rank takes them, in DDP
and float32 whatever the run's engine is; rank 0 measures the layers, on the same samples each time, in eval mode, in a
copy of the model that no hook watches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from kfac_dist.config.schema import Config, CurvatureConfig, EngineName, Likelihood, Precision
from kfac_dist.curvature.fisher import label_gradient
from kfac_dist.distributed.communicators.agreement import agreed
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.startup.bootstrap import World
from kfac_dist.doctor.fisher.advice import advise
from kfac_dist.doctor.fisher.directional import OutputFunction
from kfac_dist.doctor.fisher.layers import (
    DRAWS,
    Layer,
    Sums,
    coordinates_of,
    find_layers,
    judge_smoothness,
    measure_layers,
)
from kfac_dist.doctor.fisher.report import FisherCost, FisherReport, layer_row, trend_rows
from kfac_dist.doctor.fisher.smoothness import Course, observe
from kfac_dist.doctor.measure import Still
from kfac_dist.errors import ModelError
from kfac_dist.reporting.progress import SilentProgress
from kfac_dist.tasks import Loss, build_model
from kfac_dist.training.checkpoints.checkpoint import Checkpoints
from kfac_dist.training.data.sampler import Position
from kfac_dist.training.loop import RunOutputs, Trainer
from kfac_dist.training.passes import forward, full_precision
from kfac_dist.training.setup import RunParts, build_parts

T = TypeVar("T")

LABEL = "fisher"
SAMPLES = 32
# Numbers that a forward pass of all samples may compute; of larger models fewer samples are looked at.
ELEMENTS = 2**20
REPEATS = 5


@dataclass(frozen=True)
class FisherRequest:
    """The questions of an examination.

    Attributes:
        steps: Steps of training to follow the variance over.
        deviation: Relative standard deviation to count labels for.
        moments: Weights at which to measure along the way, the first and the last among them.
    """

    steps: int = 20
    deviation: float = 0.1
    moments: int = 6


@dataclass(frozen=True)
class _Subject:
    """The model that rank 0 examines: the twin of the one that is trained, on the same samples each time."""

    outputs: OutputFunction
    course: Course
    layers: list[Layer]
    indices: dict[str, Tensor]
    likelihood: Likelihood
    loss: Loss
    targets: Tensor
    seed: int

    def measure(self) -> dict[str, Sums]:
        """Measure every layer at the weights that the twin has now."""
        return measure_layers(
            self.outputs,
            self.layers,
            self.indices,
            self.likelihood,
            _data_gradient(self.loss, self.outputs, self.targets),
            elements=self.course.elements,
            seed=self.seed,
        )


def examine_fisher(
    config: Config, world: World, ranks: Communicator, request: FisherRequest, still: Still = nn.Module.eval
) -> FisherReport:
    """Measure both estimators in every layer, at first and over some steps; collective, the same on every rank.

    Args:
        config: The run's configuration.
        world: This process's place.
        ranks: The ranks.
        request: The examination.
        still: Sets the mode in which the model is measured.

    Raises:
        KFACError: The run can't be built, its steps can't be taken, or torch can't differentiate the model twice in
            forward mode; every rank raises.
    """
    engine = config.engine.model_copy(update={"name": EngineName.DDP, "precision": Precision.FLOAT32})
    replicated = config.model_copy(update={"engine": engine})
    parts = build_parts(replicated, world, ranks)
    try:
        with (
            agreed(ranks, ModelError),
            torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []),
        ):
            still(twin := build_model(config.model).to(world.device))
        return _examine(config.kfac.curvature, config.loss.name.likelihood, parts, twin, ranks, request)
    finally:
        if parts.kfac is not None:
            parts.kfac.remove()
        parts.engine.close()


def _examine(
    curvature: CurvatureConfig,
    likelihood: Likelihood,
    parts: RunParts,
    twin: nn.Module,
    ranks: Communicator,
    request: FisherRequest,
) -> FisherReport:
    nowhere = RunOutputs(None, Checkpoints(Path(), 1, ranks), SilentProgress(), {})
    trainer = Trainer(parts, ranks, nowhere)
    _follow(twin, parts.engine.module)
    subject: _Subject | None = None
    with _measuring(ranks):
        if ranks.rank == 0:
            subject = _subject(likelihood, curvature.seed, parts, twin)
    backward = _seconds_of_backward(likelihood, parts, twin, ranks)
    history: dict[int, dict[str, Sums]] = {}
    stepping = looking = 0.0
    parts.engine.module.train()
    for moment in _moments(min(request.steps, parts.total_steps), request.moments):
        stepping += _timed(partial(trainer.take, moment - trainer.step), parts)
        _follow(twin, parts.engine.module)
        with _measuring(ranks):
            if subject is not None:
                started = time.perf_counter()
                history[moment] = subject.measure()
                looking = time.perf_counter() - started
    report = None
    if subject is not None:
        coordinates = sum(len(found) for found in subject.indices.values())
        cost = FisherCost(stepping / trainer.step if trainer.step else None, backward, looking / coordinates)
        report = _report(subject, history, cost, request)
        report = replace(report, advice=tuple(advise(report, curvature, parts.settings.batch_size)))
    found: FisherReport = ranks.gather_objects(report, label=LABEL)[0]
    return found


def _subject(likelihood: Likelihood, seed: int, parts: RunParts, twin: nn.Module) -> _Subject:
    [(inputs, _)] = parts.train.fetch([torch.arange(1)], seed=0)
    one = observe(twin, inputs)
    count = max(2, min(SAMPLES, len(parts.train), ELEMENTS // max(one.elements, 1)))
    [(inputs, targets)] = parts.train.fetch([torch.arange(count)], seed=0)
    course, outputs = observe(twin, inputs), OutputFunction(twin, inputs)
    layers = judge_smoothness(outputs, find_layers(twin, course), course)
    trained = {name: outputs.parameters[name] for layer in layers for name in layer.parameters}
    indices = coordinates_of(trained, course.elements)
    return _Subject(outputs, course, layers, indices, likelihood, parts.loss, targets, seed)


def _report(
    subject: _Subject, history: dict[int, dict[str, Sums]], cost: FisherCost, request: FisherRequest
) -> FisherReport:
    outputs, layers = subject.outputs, subject.layers
    rows = []
    for layer in layers:
        values = sum(outputs.parameters[name].numel() for name in layer.parameters)
        seen = sum(len(subject.indices[name]) for name in layer.parameters)
        rows.append(layer_row(layer, history[0][layer.name], values, seen, request.deviation))
    trend = [row for step, sums in history.items() for row in trend_rows(step, layers, sums)]
    with torch.no_grad():
        shape = forward(outputs.module, outputs.inputs).shape
    categorical = subject.likelihood is Likelihood.CATEGORICAL
    return FisherReport(
        likelihood=str(subject.likelihood),
        columns=shape[-1] if categorical else shape[1:].numel(),
        samples=len(subject.targets),
        draws=DRAWS,
        deviation=request.deviation,
        layers=tuple(rows),
        trend=tuple(trend),
        cost=cost,
        advice=(),
    )


@contextmanager
def _measuring(ranks: Communicator) -> Iterator[None]:
    """Agree on how a measurement went, and say what torch's refusal to differentiate means here."""
    with agreed(ranks, ModelError):
        try:
            yield
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ModelError(
                f"the variances need derivatives of the outputs in forward mode, twice, which torch refuses: {reason}"
            ) from error


def _data_gradient(loss: Loss, outputs: OutputFunction, targets: Tensor) -> Tensor:
    """Return the gradient of the summed loss at the outputs, with the data's labels."""
    with torch.no_grad():
        values = full_precision(forward(outputs.module, outputs.inputs))
    values.requires_grad_()
    [gradient] = torch.autograd.grad(loss.total(values, full_precision(targets)), values)
    return gradient


def _seconds_of_backward(likelihood: Likelihood, parts: RunParts, twin: nn.Module, ranks: Communicator) -> float:
    """Return the seconds of one more backward of a step's batch, with sampled labels: the slowest rank's median."""
    trained = [p for p in twin.parameters() if p.requires_grad]
    micro_batches = next(parts.stream.steps(Position())).micro_batches
    found = []
    with agreed(ranks, ModelError):
        for repeat in range(REPEATS + 1):
            seconds = 0.0
            for part in micro_batches:
                outputs = forward(twin, part.inputs)
                resample = partial(_resample, likelihood, outputs, trained, repeat)
                seconds += _timed(resample, parts)
            found.append(seconds)
    everywhere: list[float] = ranks.gather_objects(statistics.median(found[1:]), label=LABEL)
    return max(everywhere)


def _resample(likelihood: Likelihood, outputs: Tensor, trained: list[nn.Parameter], draw: int) -> None:
    labels = label_gradient(likelihood, outputs, seed=0, step=draw, first_sample=0)
    torch.autograd.grad(outputs, trained, labels, allow_unused=True)


def _timed(action: Callable[[], object], parts: RunParts) -> float:
    """Return the seconds of a call, including its work on the device."""
    device = next(parts.engine.module.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@torch.no_grad()
def _follow(twin: nn.Module, module: nn.Module) -> None:
    """Give the twin the weights and buffers that the model has now."""
    for mine, its in ((twin.parameters(), module.parameters()), (twin.buffers(), module.buffers())):
        for target, source in zip(mine, its, strict=True):
            target.copy_(source)


def _moments(steps: int, count: int) -> list[int]:
    """Return the steps after which to measure: none taken, all of them, and some between, closer at first."""
    between = {round(steps ** (k / (count - 1))) for k in range(1, count - 1)} if steps > 1 else set()
    return sorted({0, steps, *between})
