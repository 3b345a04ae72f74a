"""Is ĝ the gradient of a *term* of the loss? The statistics of a batch against those of its samples, one by one.

The batch goes the way that it goes in training: engine, micro-batches, the loss divided over all ranks. The samples go
through the bare model alone, each with the sum of its own terms, which no division can have spoiled. Both give each
factor a trace; G's is quadratic in ĝ. Equal traces mean the right scale; another ratio is the error.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor, nn

from kfac_dist.config.schema import Fisher, KFACConfig, LossTerms
from kfac_dist.curvature.capture.shared_outputs import Samples
from kfac_dist.curvature.factors import Side
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.doctor.findings import Finding, Severity
from kfac_dist.doctor.measure import Still, factors, found_shared, measuring
from kfac_dist.engines.ddp import DDPEngine
from kfac_dist.inputs import each
from kfac_dist.preconditioner.kfac import KFAC
from kfac_dist.preconditioner.measure.loss_scale import Terms, explain_scale
from kfac_dist.reporting.progress import SilentProgress
from kfac_dist.training.checkpoints.checkpoint import Checkpoints
from kfac_dist.training.data.batches import StepBatch, Stream
from kfac_dist.training.data.sampler import Position, Sampler
from kfac_dist.training.loop import RunOutputs, Trainer
from kfac_dist.training.passes import forward
from kfac_dist.training.setup import RunParts

SAMPLES_A_RANK = 8
TOLERANCE = 0.02
# Traces below this are sums of squares that fp32 can't hold to the last digit.
FAINT = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps

Units = Mapping[str, Mapping[str, Tensor]]


def examine_scale(
    kfac_config: KFACConfig,
    loss_terms: LossTerms,
    parts: RunParts,
    seed: int,
    communicator: Communicator,
    still: Still = nn.Module.eval,
) -> list[Finding]:
    """Measure a batch in two ways; collective.

    Args:
        kfac_config: The run's K-FAC.
        loss_terms: The terms of its loss.
        parts: The run's parts; its `kfac` isn't used.
        seed: Of the order of the samples.
        communicator: The ranks.
        still: Sets the mode in which the model is measured.
    """
    still(parts.engine.module)
    batch = _batch(parts, seed, communicator)
    with measuring(parts.engine, kfac_config, Fisher.EMPIRICAL) as kfac:
        whole = _measure_batch(parts, communicator, kfac, batch)
        shared = found_shared(kfac)
        if any(samples is not Samples.SHARED for samples in shared.values()):
            whole = _measure_batch(parts, communicator, kfac, batch)
        mismatched = kfac.coverage.mismatched
    with measuring(parts.engine.module, kfac_config, Fisher.EMPIRICAL) as kfac:
        single = _measure_samples(parts, parts.engine.module, kfac, batch)
        blocks = {block.name: tuple(block.parameters) for block in kfac.coverage.blocks}
    samples = batch.samples
    ratios = {name: _ratio(whole[name]["scalars"], single[name]["scalars"]) for name in whole if name in single}
    if any(map(_off, ratios.values())) and isinstance(parts.engine, DDPEngine):  # elsewhere the module isn't whole
        ratios |= dict.fromkeys(_of_rounding_alone(kfac_config, parts, single, batch))
    coupled = set[str]()
    if any(map(_off, ratios.values())) and isinstance(parts.engine, DDPEngine):
        apart = _coupled_parameters(parts, batch)
        coupled = {name for name in ratios if apart & set(blocks.get(_block(name), ()))}
    shared_blocks = [name for name, kind in shared.items() if kind is Samples.SHARED]
    findings = [*_idle_blocks(whole, shared_blocks), *_constant_inputs(kfac, whole, samples)]
    findings += [Finding("capture", Severity.WARNING, f"{name}: {reason}") for name, reason in mismatched.items()]
    positions = max(targets_of(batch) // max(sum(len(micro.targets) for micro in batch.micro_batches), 1), 1)
    terms = Terms(samples, positions, communicator.size, loss_terms, scaled=True)
    return [*findings, *_judge(ratios, terms, coupled)]


def targets_of(batch: StepBatch) -> int:
    """Return the number of targets of this rank's part."""
    return sum(micro.targets.numel() for micro in batch.micro_batches)


def _batch(parts: RunParts, seed: int, communicator: Communicator) -> StepBatch:
    """Return the first samples of the run, fewer of them."""
    samples = min(SAMPLES_A_RANK * communicator.size, parts.settings.batch_size, len(parts.train))
    sampler = Sampler(len(parts.train), samples, seed)
    accumulate = parts.settings.accumulate
    stream = Stream(parts.train, sampler, rank=communicator.rank, world_size=communicator.size, accumulate=accumulate)
    return next(stream.steps(Position()))


def _measure_batch(parts: RunParts, communicator: Communicator, kfac: KFAC, batch: StepBatch) -> Units:
    nowhere = RunOutputs(None, Checkpoints(Path(), 1, communicator), SilentProgress(), {})
    trainer = Trainer(replace(parts, kfac=kfac), communicator, nowhere)
    trainer.backpropagate(batch)
    kfac.step()
    parts.optimizer.zero_grad()
    return factors(kfac)


def _of_rounding_alone(config: KFACConfig, parts: RunParts, single: Units, batch: StepBatch) -> list[str]:
    """Return the units whose gradients differ in a model of doubles, so that they can't be judged."""
    double = copy.deepcopy(parts.engine.module).double()
    try:
        with measuring(double, config, Fisher.EMPIRICAL) as kfac:
            exact = _measure_samples(parts, double, kfac, batch)
    except RuntimeError:  # it computes in float32, also as a model of doubles
        return []
    return [name for name in single if name in exact and _differs(single[name]["scalars"], exact[name]["scalars"])]


def _coupled_parameters(parts: RunParts, batch: StepBatch) -> set[str]:
    """Return the parameters whose gradient of the batch isn't the sum of its samples' gradients, for any reason."""
    module, loss = parts.engine.module, parts.loss
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    sums = []
    for single in (False, True):
        total = [torch.zeros_like(parameter) for parameter in trained.values()]
        for micro in batch.micro_batches:
            count = len(micro.targets)
            for index in range(count if single else 1):
                cut = itemgetter(slice(index, index + 1) if single else slice(None))
                value = loss.total(forward(module, each(cut, micro.inputs)), cut(micro.targets))
                found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
                for own, grad in zip(total, found, strict=True):
                    if grad is not None:
                        own += grad
        sums.append(total)
    return {
        name
        for name, whole, apart in zip(trained, *sums, strict=True)
        if not float((whole - apart).norm()) <= TOLERANCE * float(apart.norm())
    }


def _differs(single: Tensor, exact: Tensor) -> bool:
    """Whether doubles have another trace than floats, or none at all."""
    return _off(_ratio(single, exact)) or float(exact[1]) < FAINT < float(single[1])


def _measure_samples(parts: RunParts, module: nn.Module, kfac: KFAC, batch: StepBatch) -> Units:
    loss, dtype = parts.loss, next(module.parameters()).dtype
    for micro in batch.micro_batches:
        for index in range(len(micro.targets)):
            cut = itemgetter(slice(index, index + 1))
            inputs, targets = each(cut, micro.inputs), cut(micro.targets)
            if dtype is torch.float64:
                inputs = each(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, inputs)
            last = micro is batch.micro_batches[-1] and index == len(micro.targets) - 1
            terms = loss.count(targets) if loss.counts_on_device else None
            kfac.micro_batch(first_sample=micro.first_sample + index, divisor=1.0, terms=terms, last=last)
            loss.total(forward(module, inputs), targets).backward()
    kfac.step()
    parts.optimizer.zero_grad()
    return factors(kfac)


def _ratio(whole: Tensor, single: Tensor) -> float | None:
    """Return the factor's trace by the batch over that by single samples; None where nothing was measured.

    Nor where there is next to nothing: squares of fp32 numbers round to few digits there.
    """
    (w1, t1), (w2, t2) = whole.tolist(), single.tolist()
    if min(w1, t1, w2, t2) <= 0 or max(t1 / w1, t2 / w2) < FAINT:
        return None
    return float((t1 / w1) / (t2 / w2))


def _judge(ratios: Mapping[str, float | None], terms: Terms, unequal: Collection[str] = ()) -> list[Finding]:
    """Judge the ratios.

    Args:
        ratios: By unit.
        terms: The sizes of the batch.
        unequal: Units of layers whose gradient of the batch isn't the sum of those of its samples.
    """
    coupled = [name for name, ratio in ratios.items() if _side(name) is Side.A and _off(ratio)]
    off = {
        name: math.sqrt(ratio)
        for name, ratio in ratios.items()
        if ratio is not None and _side(name) is not Side.A and _off(ratio)
    }
    # A wrong scale of the loss is wrong in all layers.
    right = any(ratio is not None and _side(name) is not Side.A and not _off(ratio) for name, ratio in ratios.items())
    wrong = {name: factor for name, factor in off.items() if name not in unequal or not right}
    if off and not wrong and not coupled:
        return [
            Finding(
                "scale",
                Severity.WARNING,
                f"{_blocks(list(off))}: the model's gradient of {terms.samples} samples together, without K-FAC, isn't "
                "the sum of those of the samples alone: samples influence each other, or an operation of torch "
                "computes another gradient for another batch; the scale of G can't be checked",
            )
        ]
    if coupled:
        return [
            Finding(
                "scale",
                Severity.WARNING,
                f"{_blocks(coupled)}: other inputs in a batch than alone, so that samples influence each other; the "
                "run then depends on the number of ranks, and the scale of G can't be checked",
            )
        ]
    if wrong:
        factor = sorted(wrong.values())[len(wrong) // 2]
        said = explain_scale(factor, terms)
        if said is not None and said[0]:
            return [Finding("scale", Severity.ERROR, f"{_blocks(list(wrong))}: {said[1]}")]
        return [
            Finding(
                "scale",
                Severity.ERROR,
                f"{_blocks(list(wrong))}: the output gradients of {terms.samples} samples together are {factor:.4g} "
                "times those of the samples alone. K-FAC takes samples to be the first dimension of the model's "
                "outputs: make it so",
            )
        ]
    measured = sum(ratio is not None for ratio in ratios.values())
    text = f"{measured} factors of {terms.samples} samples together equal those of the samples alone"
    return [Finding("scale", Severity.FINE, text)]


def _off(ratio: float | None) -> bool:
    return ratio is not None and abs(math.sqrt(ratio) - 1) > TOLERANCE


def _idle_blocks(units: Units, shared: Collection[str]) -> list[Finding]:
    """Find blocks that no gradient reaches, or none of a single sample."""
    idle = [name for name, entry in units.items() if _side(name) is not Side.A and not float(entry["scalars"][1]) > 0]
    findings = []
    if unmeasured := [name for name in idle if _block(name) in shared]:
        text = (
            f"{_blocks(unmeasured)}: all samples share its output, so that none has a gradient of its own there: it "
            "keeps its plain gradient. Expand its input over the batch to have it preconditioned"
        )
        findings.append(Finding("gradients", Severity.WARNING, text))
    if idle := [name for name in idle if _block(name) not in shared]:
        text = (
            f"{_blocks(idle)}: no backward pass comes through its calls, so that it keeps its plain gradient: the loss "
            "of these samples doesn't depend on it, or its weight is used by hand, as in F.linear(x, layer.weight)"
        )
        findings.append(Finding("gradients", Severity.WARNING, text))
    return findings


def _constant_inputs(kfac: KFAC, units: Units, samples: int) -> list[Finding]:
    """Find layers whose input doesn't vary: A is then the outer product of its mean."""
    constant = []
    for block in kfac.coverage.blocks:
        unit = units.get(f"{block.name}/A/0")
        if unit is None or not getattr(block, "has_bias", False) or unit["sum"].ndim != 3 or samples < 2:
            continue
        weight = float(unit["scalars"][0])
        a = unit["sum"].double() / max(weight, 1e-30)
        diagonal, mean = a.diagonal(dim1=1, dim2=2)[:, :-1], a[:, :-1, -1]
        spread = (diagonal - mean.square()).sum()
        if weight > 1 and float(spread) <= 1e-6 * max(float(diagonal.sum()), 1e-30):
            constant.append(f"{block.name}/A/0")
    if not constant:
        return []
    text = f"{_blocks(constant)}: the input is the same for all {samples} samples: only its own direction is learnt"
    return [Finding("inputs", Severity.WARNING, text)]


def _side(unit: str) -> Side:
    return Side(unit.rsplit("/", 2)[1])


def _block(unit: str) -> str:
    return unit.rsplit("/", 2)[0]


def _blocks(units: list[str]) -> str:
    names = list(dict.fromkeys(map(_block, units)))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
