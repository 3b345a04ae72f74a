"""The value of a scheduled quantity (learning rate, damping) at a step: a pure function, so resuming needs no state.

warmup_from ── linear ──▶ value ── constant, linear, cosine or exponential ──▶ final ── and stays
     0               warmup_steps                                 steps (or the end of the run)
"""

from __future__ import annotations

import math

from kfac_dist.config.schema import Schedule, ScheduleKind
from kfac_dist.errors import ConfigError


def value_at(schedule: Schedule, step: int, total_steps: int | None = None) -> float:
    """Return the schedule's value at an optimizer step.

    The warm-up's first step already lies above `warmup_from`, so that a rate that warms up from 0 wastes no step, and
    step `warmup_steps` has the full value. From there the value moves to `final`, which it reaches at `steps`.

    Args:
        schedule: Shape, start and end.
        step: Optimizer step, counted from 0.
        total_steps: Length of the run: the span of a schedule that names no `steps` of its own.

    Raises:
        ConfigError: The schedule moves to a final value but neither it nor the run says by when.
    """
    if step < schedule.warmup_steps:
        share = (step + 1) / (schedule.warmup_steps + 1)
        return schedule.warmup_from + (schedule.value - schedule.warmup_from) * share
    if schedule.kind is ScheduleKind.CONSTANT or schedule.final is None:
        return schedule.value
    progress = _progress(schedule, step, total_steps)
    match schedule.kind:
        case ScheduleKind.LINEAR:
            return schedule.value + (schedule.final - schedule.value) * progress
        case ScheduleKind.COSINE:
            return schedule.final + (schedule.value - schedule.final) * (1 + math.cos(math.pi * progress)) / 2
        case ScheduleKind.EXPONENTIAL:
            return float(schedule.value * (schedule.final / schedule.value) ** progress)


def _progress(schedule: Schedule, step: int, total_steps: int | None) -> float:
    end = schedule.steps if schedule.steps is not None else total_steps
    if end is None:
        raise ConfigError(
            f"a {schedule.kind} schedule from {schedule.value} to {schedule.final} has no end: "
            "set its steps, or give total_steps to whoever uses it"
        )
    span = end - schedule.warmup_steps
    return 1.0 if span <= 0 else min(1.0, (step - schedule.warmup_steps) / span)
