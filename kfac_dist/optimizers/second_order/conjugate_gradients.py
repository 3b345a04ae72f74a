"""Preconditioned conjugate gradients on a quadratic model, stopped early: a pure function of products.

    minimise  φ(x) = ½ xᵀAx + gᵀx,   A = C + λI,     by products with C and with a preconditioner P⁻¹ ≈ A⁻¹

One product an iteration, and every number that is used travels with it, so that all ranks use and decide the same.
That takes the form of Chronopoulos & Gear (1989), which multiplies z = P⁻¹r and has Ap from Az and the last Ap:

    γ = rᵀz,   δ = zᵀAz,   β = γ/γ',   pᵀAp = δ − βγ/α',   α = γ / pᵀAp,   φ ← φ − ½ αγ          ' of the last iteration

Martens (2010): iterating stops at i > k, φ_i < 0 and (φ_i − φ_{i−k}) / φ_i < k ε, with k = max(window, i/10).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.optimizers.second_order.batch_loss import Product

Multiply = Callable[[Tensor, Sequence[Tensor]], Product]
Precondition = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """When to stop.

    Attributes:
        max_iterations: After so many iterations at most.
        tolerance: ε; 0 never stops for lack of progress.
        window: Least k.
        target: As soon as φ is this low.
    """

    max_iterations: int
    tolerance: float = 0.0
    window: int = 1
    target: float = -math.inf

    def satisfied(self, values: Sequence[float]) -> bool:
        """Whether to stop after the iterations that gave these values of φ; the first is the start's."""
        done, now = len(values) - 1, values[-1]
        if done >= self.max_iterations or now <= self.target:
            return True
        k = max(self.window, done // 10)
        return done > k and now < 0 and (now - values[-1 - k]) / now < k * self.tolerance


@dataclass(frozen=True)
class Solution:
    """The result of conjugate gradients.

    Attributes:
        point: x.
        values: φ at the start and after each iteration.
        products: Products with C that it took.
        curved_down: Whether a direction without positive curvature was met, and ended it.
    """

    point: Tensor
    values: tuple[float, ...]
    products: int
    curved_down: bool

    @property
    def iterations(self) -> int:
        """Iterations that moved x."""
        return len(self.values) - 1


def conjugate_gradients(
    multiply: Multiply, precondition: Precondition, gradient: Tensor, damping: float, rule: Rule, start: Tensor | None
) -> Solution:
    """Minimise φ until the rule says stop.

    A start is first scaled by the factor in [0, 1] that minimises φ along it: φ is never above 0 there.
    Where curvature isn't positive (rounding, a loss that isn't convex in the outputs) the last iterate is returned;
    if that is still zero, the preconditioned gradient itself with its φ, so that a step is made and can be judged.

    Args:
        multiply: v and numbers to share ↦ product with C.
        precondition: v ↦ P⁻¹v, linear, symmetric and positive.
        gradient: g.
        damping: λ.
        rule: When to stop.
        start: x₀; None starts from zero.
    """
    point, residual, value, products = _begin(multiply, gradient, damping, start)
    values = [value]
    converged = (8 * torch.finfo(gradient.dtype).eps) ** 2
    first, before, length, curved_down = None, 1.0, 1.0, False
    direction, pushed = torch.zeros_like(point), torch.zeros_like(point)  # p and Ap
    while not rule.satisfied(values):
        z = precondition(residual)
        product = multiply(z, (torch.dot(residual, z), torch.dot(z, z)))
        products += 1
        inner, squared = product.means  # rᵀz, zᵀz
        first = inner if first is None else first
        if not inner > converged * first:  # nothing is left to be solved, or something isn't finite
            break
        share = inner / before if len(values) > 1 else 0.0
        curvature = product.form + damping * squared - share * inner / length  # pᵀAp, as p and the last p are conjugate
        direction = z.add(direction, alpha=share)
        if not curvature > 0:
            curved_down = True
            break
        pushed = product.vector.add(z, alpha=damping).add_(pushed, alpha=share)
        before, length = inner, inner / curvature
        point = point.add(direction, alpha=length)
        residual = residual.sub(pushed, alpha=length)
        values.append(values[-1] - inner * length / 2)
    if curved_down and values == [0.0]:
        point = direction
        values.append(curvature / 2 - inner)  # φ(p) from zero, where pᵀg = −γ
    return Solution(point, tuple(values), products, curved_down)


def _begin(
    multiply: Multiply, gradient: Tensor, damping: float, start: Tensor | None
) -> tuple[Tensor, Tensor, float, int]:
    """Return the first iterate, its residual `−∇φ`, its φ, and the products that they took."""
    if start is None:
        return torch.zeros_like(gradient), -gradient, 0.0, 0
    product = multiply(start, (torch.dot(gradient, start), torch.dot(start, start)))
    slope, squared = product.means
    curvature = product.form + damping * squared
    share = min(max(-slope / curvature, 0.0), 1.0) if curvature > 0 else 0.0
    residual = -gradient - share * (product.vector + damping * start)
    return share * start, residual, share * slope + share**2 * curvature / 2, 1
