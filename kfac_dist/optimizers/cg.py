"""K-FAC CG: a truncated Newton method whose linear systems K-FAC's inverse preconditions (Martens 2010).

    solve (GGN + λI) d = −∇h,    δ = lr · d · (½)^k

Solving starts from the last step's solution and ends when the model's progress does (`conjugate_gradients`). With
`backtracking` the solution is halved, k times, until the batch's loss falls by a hundredth of what the slope promises;
if it never does, δ = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_dist.config.schedules import value_at
from kfac_dist.optimizers.batch_loss import Total
from kfac_dist.optimizers.conjugate_gradients import Rule, Solution, conjugate_gradients
from kfac_dist.optimizers.stepper import Problem, Stepper
from kfac_dist.preconditioner.kfac import KFAC

# Share of the fall that the slope promises below which a step is halved.
_ENOUGH = 0.01


class CGStepper(Stepper):
    """Finds steps by preconditioned conjugate gradients; see `Stepper` for its arguments.

    Its state is the last solution.
    """

    def __init__(self, kfac: KFAC, total: Total, *, total_steps: int | None = None) -> None:
        super().__init__(kfac, total, total_steps=total_steps)
        self.options = kfac.config.cg_options
        self._last = self.space.zeros()
        self._coming = self._last
        self._started = False
        self._numbers: dict[str, float] = {}
        self._iterations = 0

    @property
    def damping(self) -> float:
        """λ of this step, with the weight decay that is part of the loss."""
        kfac, own = self.kfac, self.options.damping
        return kfac.config.update.l2 + (
            kfac.damping if own is None else kfac.damping_factor * value_at(own, kfac.steps, self._total_steps)
        )

    def find(self, problem: Problem) -> Tensor:
        """See `Stepper.find`."""
        options = self.options
        rule = Rule(options.max_iterations, options.tolerance, options.window)
        start = options.warm_start * self._last if self._started and options.warm_start else None
        solution = conjugate_gradients(
            problem.batch.product, self.precondition, problem.gradient, self.damping, rule, start
        )
        self._iterations += solution.iterations
        self._numbers |= {
            "iterations": solution.iterations,
            "iterations_total": self._iterations,
            "model": solution.values[-1],
            "curved_down": float(solution.curved_down),
        }
        if options.compare_every and self.kfac.steps % options.compare_every == 0:
            self._compare(problem, solution, start)
        self._coming = solution.point
        lr = value_at(options.lr, self.kfac.steps, self._total_steps)
        return solution.point * (lr if not options.backtracking else self._backtrack(problem, solution.point, lr))

    def took(self, step: Tensor) -> None:
        """See `Stepper.took`."""
        self._last, self._started = self._coming, True

    def metrics(self) -> dict[str, float]:
        """Return numbers of the last step, and of the last one at which solving was compared.

        `iterations`, their sum since the run began or was resumed, the value of the `model` that they reached, and
        whether they ended at a direction that `curved_down`; `compared` and `plain`: iterations of a compared step,
        with K-FAC and without.
        """
        return dict(self._numbers)

    def state_dict(self) -> dict[str, Any]:
        """See `Stepper.state_dict`."""
        return {"started": torch.tensor(self._started), "last": self.named(self._last)}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """See `Stepper.load_state_dict`."""
        self._started = bool(values["started"])
        self._last = self._coming = self.unnamed(values["last"])

    def _compare(self, problem: Problem, solution: Solution, start: Tensor | None) -> None:
        """Count the iterations that it takes without K-FAC to lower the model as far."""
        rule = Rule(self.options.compare_iterations, target=solution.values[-1])
        plain = conjugate_gradients(
            problem.batch.product, lambda vector: vector, problem.gradient, self.damping, rule, start
        )
        self._numbers |= {"compared": solution.iterations, "plain": plain.iterations}

    def _backtrack(self, problem: Problem, point: Tensor, lr: float) -> float:
        """Return what the solution is multiplied by so that the batch's loss falls; 0 if nothing makes it fall."""
        before = self._loss(problem, None)
        slope = float(torch.dot(problem.gradient, point))
        scale = lr
        for _ in range(self.options.backtracking + 1):
            if self._loss(problem, point * scale) <= before + _ENOUGH * scale * slope:
                return scale
            scale /= 2
        return 0.0

    def _loss(self, problem: Problem, offset: Tensor | None) -> float:
        """Return h(θ + offset), with the weight decay that is part of it."""
        loss = float(problem.batch.value(offset))
        if l2 := self.kfac.config.update.l2:
            point = self.space.point() if offset is None else self.space.point() + offset
            loss += l2 / 2 * float(torch.dot(point, point))
        return loss
