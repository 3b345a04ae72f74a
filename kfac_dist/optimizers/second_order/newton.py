"""K-FAC Newton: the full algorithm of Martens & Grosse (2015, algorithm 2), with K-FAC as the source of its direction.

    Δ = −P⁻¹∇h                          P: K-FAC damped by γ (factored Tikhonov)
    δ = αΔ + μδ₀                        the lowest point of M on the plane; δ₀ is the step before
    M(δ) = ½ δᵀ(F + (λ+η)I)δ + ∇hᵀδ     F exactly, by forward-mode products on the batch
    every T₁ steps                      λ by ρ = (h(θ+δ) − h(θ)) / M(δ)
    every T₂ steps                      γ: the best of three by M(δ), each with its own inverses

It needs no learning rate and no momentum constant. F is the GGN of the loss at the model's outputs, which is the Fisher
matrix for all losses that K-FAC knows the likelihood of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.compat.torch import AnyBatchNorm
from kfac_dist.errors import ModelError
from kfac_dist.optimizers.second_order.batch_loss import Total
from kfac_dist.optimizers.second_order.levenberg_marquardt import Bounds, GammaSearch, LevenbergMarquardt
from kfac_dist.optimizers.second_order.plane import minimise
from kfac_dist.optimizers.stepper import Problem, Stepper
from kfac_dist.preconditioner.kfac import KFAC

LABEL = "newton"


class NewtonStepper(Stepper):
    """Finds steps by rescaling K-FAC's proposal and the last step; see `Stepper` for its arguments.

    Its state is λ, γ and the last step.

    Attributes:
        trust: The rule of λ.
        search: The rule of γ.

    Raises:
        ModelError: Products are to be taken over a share of a batch by which the model normalises.
    """

    def __init__(self, kfac: KFAC, total: Total, *, total_steps: int | None = None) -> None:
        super().__init__(kfac, total, total_steps=total_steps)
        self.options = kfac.solver_access.config.newton_options
        if self.options.products_fraction < 1:
            _refuse_batch_norm(kfac.solver_access.engine.module, self.options.products_fraction)
        start, self._l2 = kfac.solver_access.config.inversion.damping.value, kfac.solver_access.config.update.l2
        bounds = Bounds(*self.options.damping_bounds)
        self.trust = LevenbergMarquardt(start, self.options.damping_every, bounds)
        self.search = GammaSearch(start, self._l2, self.options.gamma_every, bounds)
        self._last = self.space.zeros()
        self._started = False
        self._numbers: dict[str, float] = {}
        self._use(self.search.gamma)

    @property
    def damping(self) -> float:
        """λ + η of the quadratic model; raised like K-FAC's own after steps that had to be skipped."""
        return self.kfac.solver_access.damping_factor * self.trust.damping + self._l2

    def find(self, problem: Problem) -> Tensor:
        """See `Stepper.find`.

        A step after which the batch's loss isn't finite is left out (it is returned as NaN), and λ grows. That is seen
        where λ is judged, every T₁ steps.
        """
        gammas, proposals, inverses = self._propose(problem.gradient)
        directions = [*proposals, *([self._last] if self._started and self.options.momentum else [])]
        curvature, slope = self._model(problem, directions)
        found = [self._lowest(curvature, slope, place, len(proposals)) for place in range(len(proposals))]
        best = self.search.choose(gammas, [value for _, value in found])
        self._use(gammas[best])
        if inverses:
            self.kfac.solver_access.use_inverses(inverses[best])
        (alpha, mu), predicted = found[best]
        step = alpha * proposals[best]
        if self._started:
            step.add_(self._last, alpha=mu)
        self._numbers |= {"alpha": alpha, "mu": mu, "model": predicted}
        return self._judged(problem, step, predicted)

    def took(self, step: Tensor) -> None:
        """See `Stepper.took`."""
        self._last, self._started = step.clone(), True

    def metrics(self) -> dict[str, float]:
        """Return numbers of the last step: α, μ, the value of the `model`, λ and γ; and ρ of the last judgement."""
        return {**self._numbers, "lambda": self.trust.damping, "gamma": self.search.gamma}

    def state_dict(self) -> dict[str, Any]:
        """See `Stepper.state_dict`."""
        numbers = {**self.trust.state_dict(), **self.search.state_dict()}
        return {
            "started": torch.tensor(self._started),
            "last": self.named(self._last),
            **{name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()},
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """See `Stepper.load_state_dict`."""
        self._started = bool(values["started"])
        self._last = self.unnamed(values["last"])
        self.trust.load_state_dict(values)
        self.search.load_state_dict(values)
        self._use(self.search.gamma)

    # ---- parts of find

    def _propose(self, gradient: Tensor) -> tuple[Sequence[float], list[Tensor], list[dict[str, Tensor]]]:
        """Return the candidates for γ, their proposals, and their inverses if there are several."""
        if not (self.search.due(self.kfac.steps) and self.kfac.solver_access.can_refresh_again):
            return (self.search.gamma,), [-self.precondition(gradient)], []
        gammas = self.search.candidates()
        proposals: list[Tensor] = []
        inverses: list[dict[str, Tensor]] = []
        for place, gamma in enumerate(gammas):
            if place:  # this step's own refresh has used the present γ
                self._use(gamma)
                self.kfac.solver_access.refresh_again()
            proposals.append(-self.precondition(gradient))
            inverses.append(self.kfac.solver_access.inverses())
        return gammas, proposals, inverses

    def _model(self, problem: Problem, directions: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return `[k, k]` and `[k]` of M along some directions, the same on every rank; waits for the device."""
        stride = round(1 / self.options.products_fraction)
        batch = problem.batch if stride == 1 else problem.batch.thinned(stride, self.kfac.steps)
        forms = batch.forms(directions).double().cpu()
        vectors = torch.stack([*directions, problem.gradient])
        # Every rank has the same vectors; the numbers computed from them are agreed on nevertheless.
        products = vectors @ vectors[:-1].T / self.kfac.communicator.size
        self.kfac.communicator.all_reduce(products, label=LABEL).wait()
        products = products.double().cpu()
        return forms + self.damping * products[:-1], products[-1]

    def _lowest(
        self, curvature: Tensor, slope: Tensor, place: int, proposals: int
    ) -> tuple[tuple[float, float], float]:
        """Return α, μ and M(δ) for one of the proposals; without a step before, μ is 0."""
        two, one = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        kept = [place, *range(proposals, len(slope))]
        two[: len(kept), : len(kept)] = curvature[kept][:, kept]
        one[: len(kept)] = slope[kept]
        coefficients, value = minimise(two, one)
        alpha, mu = coefficients.tolist()
        return (alpha, mu), float(value)

    def _judged(self, problem: Problem, step: Tensor, predicted: float) -> Tensor:
        """Return the step; every T₁ steps adapt λ by the step's change of the batch's loss."""
        if not self.trust.due(self.kfac.steps):
            return step
        change = float(problem.batch.value(step) - problem.batch.value()) + self._decay_change(step)
        self._numbers["rho"] = self.trust.judge(change, predicted)
        return step if math.isfinite(change) else torch.full_like(step, torch.nan)

    def _decay_change(self, step: Tensor) -> float:
        """Return a step's change of the weight decay in the loss: `η (θᵀδ + ½ δᵀδ)`."""
        product = torch.dot(self.space.point() + step / 2, step) / self.kfac.communicator.size
        self.kfac.communicator.all_reduce(product, label=LABEL).wait()
        return self._l2 * float(product)

    def _use(self, gamma: float) -> None:
        """Damp K-FAC's inverses by γ from the next refresh on."""
        self.kfac.solver_access.set_damping(gamma**2 - self._l2)


def _refuse_batch_norm(module: nn.Module, fraction: float) -> None:
    """Refuse layers whose outputs depend on which other samples are there: a share of them is another function.

    Raises:
        ModelError: There is such a layer.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, AnyBatchNorm) and (layer.training or layer.running_mean is None):
            raise ModelError(
                f"kfac.newton.products_fraction ({fraction}) must be 1 with {name} ({type(layer).__name__}), which "
                "normalises by the whole batch: leave it out, or use GroupNorm or LayerNorm"
            )
