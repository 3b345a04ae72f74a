"""`kfac.solver`: who finds the step, and the options of those that find it from the quadratic model of the loss.

direct    K-FAC preconditions the gradient, the first-order optimizer of the section `optimizer` takes the step
newton    rescaling and momentum from the model M(δ) = ½ δᵀ(F + λI)δ + ∇hᵀδ, by exact products with F
cg        the model's minimum by conjugate gradients, with K-FAC's inverse as their preconditioner
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from kfac_dist.config.schedules import Schedule, ScheduleKind
from kfac_dist.config.section import Count, CountOrZero, Positive, Section


class StepSolver(StrEnum):
    """Who finds the step."""

    DIRECT = "direct"
    NEWTON = "newton"
    CG = "cg"


class CGConfig(Section):
    """How `cg` minimises `½ dᵀ(GGN + λI)d + ∇hᵀd` (Martens 2010), with K-FAC's damped inverse as preconditioner.

    Attributes:
        lr: What the solution is multiplied by; a number or a schedule over steps.
        damping: λ of the model; by default `kfac.inversion.damping`, which also damps the preconditioner.
        adapt_every: Steps between two adaptations of λ, which then only begins as configured, to how well the model
            foretells the loss (Levenberg and Marquardt); 0 leaves it.
        max_iterations: Iterations, and so products with the GGN, of one step at most.
        tolerance: ε of the stopping rule: the last k iterations have lowered the model by less than kε of its value.
        window: k of that rule, or a tenth of the iterations if that is more.
        warm_start: The last step's solution times this is where the next one starts; 0 starts from nothing.
        backtracking: How often the solution may be halved until the batch's loss falls enough; then the step is
            left out. 0 doesn't look.
        compare_every: Steps between comparisons: how many iterations would conjugate gradients without K-FAC have
            needed to lower the model as far? 0 never asks.
        compare_iterations: Iterations after which such a comparison ends.
    """

    lr: Schedule = Schedule(value=1.0)
    damping: Schedule | None = None
    adapt_every: CountOrZero = 0
    max_iterations: Count = 50
    tolerance: Positive = 5e-4
    window: Count = 10
    warm_start: Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)] = 0.95
    backtracking: CountOrZero = 0
    compare_every: CountOrZero = 0
    compare_iterations: Count = 500

    @model_validator(mode="after")
    def _one_moves_the_damping(self) -> Self:
        if self.adapt_every and self.damping is not None and self.damping.kind is not ScheduleKind.CONSTANT:
            raise ValueError(
                f"adapt_every ({self.adapt_every}) and a {self.damping.kind} damping both move λ: give damping one "
                "value, or leave adapt_every out"
            )
        return self
