"""Construction of the stepper of `kfac.solver`."""

from __future__ import annotations

from kfac_dist.config.schema import StepSolver
from kfac_dist.errors import ConfigError
from kfac_dist.optimizers.second_order.batch_loss import Total
from kfac_dist.optimizers.second_order.cg import CGStepper
from kfac_dist.optimizers.second_order.newton import NewtonStepper
from kfac_dist.optimizers.stepper import Stepper
from kfac_dist.preconditioner.kfac import KFAC


def build_stepper(kfac: KFAC, total: Total, *, total_steps: int | None = None) -> Stepper:
    """Return the stepper that `kfac.solver` names; `stepper` describes its use in a loop.

    Args:
        kfac: K-FAC on the model.
        total: The loss: outputs and targets to the *sum* of its terms, a negative log-likelihood that is convex in
            the outputs.
        total_steps: Length of the run, for schedules that span it.

    Raises:
        ConfigError: `kfac.solver` is direct, or the engine shards parameters.
    """
    match kfac.solver_access.config.solver:
        case StepSolver.DIRECT:
            raise ConfigError("kfac.solver is direct: a first-order optimizer takes the step after kfac.step()")
        case StepSolver.NEWTON:
            return NewtonStepper(kfac, total, total_steps=total_steps)
        case StepSolver.CG:
            return CGStepper(kfac, total, total_steps=total_steps)
