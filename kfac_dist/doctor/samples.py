"""A walk over the data: values that aren't finite, and targets that the loss doesn't know."""

from __future__ import annotations

from torch import Tensor, arange

from kfac_dist.distributed.communicators.agreement import agreed
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.doctor.findings import Finding, Severity
from kfac_dist.inputs import tensors
from kfac_dist.tasks import Loss
from kfac_dist.training.data.batches import InMemorySource, Source
from kfac_dist.training.data.sampler import split
from kfac_dist.training.recovery.diagnosis import not_finite
from kfac_dist.training.trial import outside_targets

BATCH = 64
# Of data that isn't in memory, no more samples than this are read.
LOADED_SAMPLES = 2048
SHOWN = 8


def examine_samples(what: str, data: Source, loss: Loss, outputs: Tensor | None, ranks: Communicator) -> list[Finding]:
    """Look at the samples; collective, each rank reads a part.

    Args:
        what: `training` or `test`.
        data: The data.
        loss: Knows which targets there are.
        outputs: Outputs of the model for any samples; None leaves targets unchecked.
        ranks: The ranks.

    Raises:
        DataError: The data can't be read; every rank raises.
    """
    count = len(data) if isinstance(data, InMemorySource) else min(len(data), LOADED_SAMPLES)
    own = split(count, ranks.size)[ranks.rank]
    parts = list(arange(own.start, own.stop).split(BATCH)) if len(own) else []
    bad: list[tuple[int, str]] = []
    outside: list[tuple[int, str]] = []
    with agreed(ranks):
        for indices, (inputs, targets) in zip(parts, data.fetch(parts, seed=0), strict=True):
            for values in (*tensors(inputs).values(), targets):
                bad += not_finite(values, indices)
            if outputs is not None:
                outside += [(int(indices[place]), value) for place, value in outside_targets(loss, targets, outputs)]
    gathered = ranks.gather_objects((bad, outside), label="samples")
    bad = sorted({entry for part, _ in gathered for entry in part})
    outside = sorted({entry for _, part in gathered for entry in part})
    findings = []
    if bad:
        text = f"NaN or infinity in {_count(bad)} of the {what} data: {_list(bad)}; remove or replace them"
        findings.append(Finding("data", Severity.ERROR, text))
    if outside and outputs is not None:
        allowed = loss.allowed.format(last=outputs.shape[-1] - 1)
        text = f"a target that is not {allowed}, in {_count(outside)} of the {what} data: {_list(outside)}"
        findings.append(Finding("data", Severity.ERROR, text))
    if not findings:
        seen = f"{count:,}" if count == len(data) else f"the first {count:,} of {len(data):,}"
        findings.append(Finding("data", Severity.FINE, f"{seen} {what} samples: finite, with targets that fit"))
    return findings


def _count(entries: list[tuple[int, str]]) -> str:
    number = len({sample for sample, _ in entries})
    return f"{number} sample{'s' if number > 1 else ''}"


def _list(entries: list[tuple[int, str]]) -> str:
    shown = ", ".join(f"{sample} ({value})" for sample, value in entries[:SHOWN])
    return shown + (f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else "")
