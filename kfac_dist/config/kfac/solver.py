"""`kfac.solver`: methods that compute the step, and options of those that use the quadratic model of the loss.

direct    K-FAC preconditions the gradient, the first-order optimizer of the section `optimizer` takes the step
newton    rescaling and momentum from the model M(δ) = ½ δᵀ(F + λI)δ + ∇hᵀδ, by exact products with F
cg        the model's minimum by conjugate gradients, with K-FAC's inverse as their preconditioner
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from kfac_dist.config.schedules import Damping, Schedule, ScheduleKind
from kfac_dist.config.section import Count, CountOrZero, Flag, Gone, Positive, Section, check_one_in_k


class StepSolver(StrEnum):
    """The method that finds the step."""

    DIRECT = "direct"
    NEWTON = "newton"
    CG = "cg"


class CGConfig(Section):
    """Settings of `cg`: minimise `½ dᵀ(GGN + λI)d + ∇hᵀd` (Martens 2010), preconditioned by K-FAC's damped inverse.

    Attributes:
        lr: Factor on the solution; a number or a schedule over steps.
        damping: λ of the model; by default `kfac.inversion.damping`, which also damps the preconditioner.
        adapt_every: Steps between two adaptations of λ, which then only begins as configured, to how well the model
            foretells the loss (Levenberg and Marquardt); 0 leaves it.
        max_iterations: Iterations, and so products with the GGN, of one step at most.
        tolerance: ε of the stopping rule: the last k iterations have lowered the model by less than kε of its value.
        window: k of that rule, or a tenth of the iterations if that is more.
        warm_start: The last step's solution times this is where the next one starts; 0 starts from nothing.
        backtracking: Times that the solution may be halved until the batch's loss falls enough; then the step is
            left out. 0 doesn't look.
        compare_every: Steps between comparisons: how many iterations, 500 at most, would conjugate gradients without
            K-FAC have needed to lower the model as far? 0 never asks.
    """

    gone: ClassVar[Mapping[str, Gone]] = {
        "compare_iterations": Gone(500, "leave it out; comparisons end after 500 iterations"),
    }

    lr: Schedule = Schedule(value=1.0)
    damping: Damping | None = None
    adapt_every: CountOrZero = 0
    max_iterations: Count = 50
    tolerance: Positive = 5e-4
    window: Count = 10
    warm_start: Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)] = 0.95
    backtracking: CountOrZero = 0
    compare_every: CountOrZero = 0

    @model_validator(mode="after")
    def _one_moves_the_damping(self) -> Self:
        damping = self.damping
        if self.adapt_every and damping and (damping.kind is not ScheduleKind.CONSTANT or damping.warmup_steps):
            what = "damping's warm-up" if damping.kind is ScheduleKind.CONSTANT else f"a {damping.kind} damping"
            raise ValueError(
                f"adapt_every ({self.adapt_every}) and {what} both move λ: give damping one value, or leave "
                "adapt_every out"
            )
        return self


class NewtonConfig(Section):
    """Settings of `newton`: `δ = αΔ + μδ₀`, from K-FAC's Δ and the step before (Martens & Grosse 2015, §6–7).

    λ of the quadratic model starts at `kfac.inversion.damping`, a number here, and follows the Levenberg–Marquardt
    rule. K-FAC's inverses carry a damping of their own, γ², which starts at λ + l2 and is searched for.

    Attributes:
        damping_every: T₁: steps between two judgements of λ, which take a trial pass over the batch; 0 keeps λ.
        damping_bounds: The least and the greatest λ, and γ² without l2.
        gamma_every: T₂: steps between searches for γ, a multiple of `kfac.inversion.inverse_every`; each inverts three
            times instead of once. 0 keeps γ.
        momentum: Whether the step before is part of the plane; without it only α is found.
        products_fraction: Share of the batch that products with the Fisher are taken over: 1/k, every k-th sample. Not
            with BatchNorm, which normalises by the whole batch.
    """

    damping_every: CountOrZero = 5
    damping_bounds: tuple[Positive, Positive] = (1e-6, 1e4)
    gamma_every: CountOrZero = 20
    momentum: Flag = True
    products_fraction: Annotated[float, Field(ge=1e-3, le=1, strict=True, allow_inf_nan=False)] = 1.0

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.damping_bounds[0] > self.damping_bounds[1]:
            raise ValueError(f"damping_bounds ({list(self.damping_bounds)}) must be the least λ, then the greatest")
        return self

    @model_validator(mode="after")
    def _fraction_is_one_in_k(self) -> Self:
        check_one_in_k("products_fraction", self.products_fraction, "one sample in k is used")
        return self
