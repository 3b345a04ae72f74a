"""Quantities with a schedule (learning rate, damping): a pure function of the step, so resuming needs no state.

warmup_from ── linear ──▶ value ── constant, linear, cosine or exponential ──▶ final ── and stays
     0               warmup_steps                                 steps (or the end of the run)

A rate may warm up from 0; a damping has to say from where, since the least of it would meet the worst steps.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import AfterValidator, model_validator

from kfac_dist.config.section import Count, CountOrZero, NonNegative, Positive, Section
from kfac_dist.errors import ConfigError


class ScheduleKind(StrEnum):
    """The path of a scheduled value from its start to its end once the warm-up is over."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"
    EXPONENTIAL = "exponential"


class Schedule(Section):
    """A scalar as a function of the optimizer step.

    A bare number in YAML means a constant. With `steps` unset the schedule spans the whole run.

    Attributes:
        value: Its value once the warm-up is over.
        kind: Its course from there.
        final: Its last value; not of a constant.
        steps: Step at which it gets there; by default the run's last.
        warmup_steps: Steps until `value` is reached.
        warmup_from: First value of the warm-up.
    """

    value: Positive
    kind: ScheduleKind = ScheduleKind.CONSTANT
    final: NonNegative | None = None
    steps: Count | None = None
    warmup_steps: CountOrZero = 0
    warmup_from: NonNegative = 0.0

    @model_validator(mode="before")
    @classmethod
    def _number_is_constant(cls, data: Any) -> Any:
        return {"value": data} if isinstance(data, int | float) and not isinstance(data, bool) else data

    @model_validator(mode="after")
    def _final_fits_kind(self) -> Self:
        if self.kind is ScheduleKind.CONSTANT and self.final is not None:
            raise ValueError("final has no effect on a constant schedule: set kind to linear, cosine or exponential")
        if self.kind is not ScheduleKind.CONSTANT and self.final is None:
            raise ValueError(f"kind {self.kind} needs final, the value at the schedule's end")
        if self.kind is ScheduleKind.EXPONENTIAL and self.final == 0:
            raise ValueError("final is 0, which an exponential schedule never reaches: give it a positive value")
        if self.kind is ScheduleKind.CONSTANT and self.steps is not None:
            raise ValueError("steps has no effect on a constant schedule: set kind to linear, cosine or exponential")
        if self.steps is not None and self.steps <= self.warmup_steps:
            raise ValueError(f"steps ({self.steps}) must exceed warmup_steps ({self.warmup_steps}), which it includes")
        if self.warmup_from and not self.warmup_steps:
            raise ValueError("warmup_from has no effect without a warm-up: set warmup_steps")
        return self


def _damps_from_the_start(damping: Schedule) -> Schedule:
    if damping.warmup_steps and not damping.warmup_from:
        raise ValueError(
            f"warmup_steps ({damping.warmup_steps}) needs warmup_from, such as {100 * damping.value:g}, to come down "
            "from: from 0 the first steps, whose curvature is known least, would be damped least"
        )
    return damping


# A schedule of λ.
Damping = Annotated[Schedule, AfterValidator(_damps_from_the_start)]


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
            "set its steps, or pass total_steps"
        )
    span = end - schedule.warmup_steps
    return 1.0 if span <= 0 else min(1.0, (step - schedule.warmup_steps) / span)
