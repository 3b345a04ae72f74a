"""K-FAC CG: a truncated Newton method whose linear systems K-FAC's inverse preconditions (Martens 2010).

    solve (GGN + λI) d = −∇h,    δ = lr · d · (½)^k

Solving starts from the last step's solution and ends when the model's progress does (`conjugate_gradients`). With
`backtracking` the solution is halved, k times, until the batch's loss falls by a hundredth of the slope's prediction;
if it never does, δ = 0. With `adapt_every` λ follows how well the model foretells the loss (`levenberg_marquardt`); the
preconditioner keeps the damping of its own section, since it decides how fast the system is solved, not which one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_dist.config.schedules import Schedule, value_at
from kfac_dist.optimizers.second_order.batch_loss import Total
from kfac_dist.optimizers.second_order.conjugate_gradients import Rule, Solution, conjugate_gradients
from kfac_dist.optimizers.second_order.levenberg_marquardt import Bounds, LevenbergMarquardt
from kfac_dist.optimizers.second_order.ray import Ray
from kfac_dist.optimizers.stepper import Problem, Stepper
from kfac_dist.preconditioner.kfac import KFAC

# Share of the fall that the slope promises below which a step is halved (Armijo's rule).
_ENOUGH = 0.01
# Iterations of a comparison without K-FAC, at most.
COMPARED_ITERATIONS = 500
# Largest factor of λ from its start, up or down.
_RANGE = 1e4


class CGStepper(Stepper):
    """Finds steps by preconditioned conjugate gradients; see `Stepper` for its arguments.

    Its state is the last solution, and λ.
    """

    def __init__(self, kfac: KFAC, total: Total, *, total_steps: int | None = None) -> None:
        super().__init__(kfac, total, total_steps=total_steps)
        self.options = kfac.solver_access.config.cg_options
        self._last = self.space.zeros()
        self._coming = self._last
        self._started = False
        first = value_at(self._schedule, 0, total_steps)
        bounds = Bounds(first / _RANGE, first * _RANGE)
        self._trust = LevenbergMarquardt(first, max(self.options.adapt_every, 1), bounds)
        self._numbers: dict[str, float] = {}
        self._iterations = 0

    @property
    def damping(self) -> float:
        """λ of this step, with the weight decay that is part of the loss."""
        kfac = self.kfac
        scheduled = value_at(self._schedule, kfac.steps, self._total_steps)
        own = self._trust.damping if self.options.adapt_every else scheduled
        return kfac.solver_access.config.update.l2 + kfac.solver_access.damping_factor * own

    def find(self, problem: Problem) -> Tensor:
        """See `Stepper.find`."""
        solution = self._solve(problem)
        self._coming = solution.point
        scale = value_at(self.options.lr, self.kfac.steps, self._total_steps)
        adapts = self.options.adapt_every > 0 and self._trust.due(self.kfac.steps)
        if self.options.backtracking or adapts:
            scale = self._judge(problem, solution, scale, adapts=adapts)
        self._numbers["scale"] = scale
        return scale * solution.point

    def took(self, step: Tensor) -> None:
        """See `Stepper.took`."""
        self._last, self._started = self._coming, True

    def metrics(self) -> dict[str, float]:
        """Return numbers of the last step, and of the last ones at which there was more to say.

        `iterations`, and their sum since the run began or was resumed; the value of the `model` that they reached and
        its `damping` λ; whether they ended at a direction that `curved_down`; the `scale` by which the solution became
        the step; `rho`, by which λ was last adapted. `compared` and `plain` are the iterations of the last compared
        step, with K-FAC and without; if those without ended before they came as far, their number is `plain_above`
        instead.
        """
        return {name: value for name, value in self._numbers.items() if value == value}

    def state_dict(self) -> dict[str, Any]:
        """See `Stepper.state_dict`."""
        return {
            "started": torch.tensor(self._started),
            "damping": torch.tensor(self._trust.damping, dtype=torch.float64),
            "last": self.named(self._last),
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """See `Stepper.load_state_dict`."""
        self._last = self._coming = self.unnamed(values["last"])
        self._started = bool(values["started"])
        self._trust.load_state_dict({"damping": float(values["damping"])})

    @property
    def _schedule(self) -> Schedule:
        return self.options.damping or self.kfac.solver_access.config.inversion.damping

    def _solve(self, problem: Problem) -> Solution:
        options = self.options
        rule = Rule(options.max_iterations, options.tolerance, options.window)
        start = options.warm_start * self._last if self._started and options.warm_start else None
        multiply, damping = problem.batch.product, self.damping
        solution = conjugate_gradients(multiply, self.precondition, problem.gradient, damping, rule, start)
        self._iterations += solution.iterations
        self._numbers |= {
            "iterations": solution.iterations,
            "iterations_total": self._iterations,
            "model": solution.values[-1],
            "damping": damping,
            "curved_down": float(solution.curved_down),
        }
        if options.compare_every and self.kfac.steps % options.compare_every == 0:
            # As far as K-FAC went, by as many iterations as it takes without.
            rule = Rule(COMPARED_ITERATIONS, target=solution.values[-1])
            plain = conjugate_gradients(multiply, lambda vector: vector, problem.gradient, damping, rule, start)
            arrived = plain.values[-1] <= rule.target
            self._numbers.pop("plain_above" if arrived else "plain", None)
            self._numbers |= {"compared": solution.iterations, "plain" if arrived else "plain_above": plain.iterations}
        return solution

    def _judge(self, problem: Problem, solution: Solution, scale: float, *, adapts: bool) -> float:
        """Return the factor of the solution, from the batch's loss there; adapt λ by that loss."""
        l2, value = self.kfac.solver_access.config.update.l2, solution.values[-1]
        ray = Ray.along(solution.point, problem.gradient, value, problem.batch, l2, self.kfac.communicator)
        before = ray.loss(0)
        after = ray.loss(scale)
        if adapts:
            change, curved_down = after - before, solution.curved_down
            self._numbers["rho"] = self._trust.judge(change, ray.model(scale), curved_down=curved_down)
        for _ in range(self.options.backtracking):
            if after <= before + _ENOUGH * scale * ray.slope:
                return scale
            scale /= 2
            after = ray.loss(scale)
        return scale if not self.options.backtracking or after <= before + _ENOUGH * scale * ray.slope else 0.0
