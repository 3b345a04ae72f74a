r"""K-FAC in one process, as the papers say it: to be read first, and what tests hold the package to.

    loss.backward()          # of a mean over samples
    reference.step()         # gradients → natural gradients, in place
    optimizer.step()

Shapes: B samples, T positions that share the weight (tokens, pixels; 1 for a plain linear layer), weight W `[d_out,
d_in]`, its bias the last column of `[d_out, d_in + 1]`; activations a `[B, T, d_in + 1]`, output gradients ĝ `[B, T,
d_out]`, both of single terms of the loss `L = (1/n) Σ ℓ_i`: ĝ = n ∂L/∂s.

    (1)  F ≈ A ⊗ G                                               a layer's block of the Fisher matrix   [1] §3, [2] §3
    (2)  A = (1/BT) Σ_bt a aᵀ,     G = (1/n) Σ_bt ĝ ĝᵀ           expand                                 [2] Theorem 1
    (3)  A = (1/B) Σ_b ā_b ā_bᵀ,   G = (1/n) Σ_b ĝ_b ĝ_bᵀ        reduce: ā_b = (1/T) Σ_t a, ĝ_b = Σ_t ĝ   [3] §3
    (4)  S ← βS + (1−β) Σ_new,   w ← βw + (1−β) count            a factor is S/w                        [1] §5
    (5)  π = √( (tr A / dim A) / (tr G / dim G) )                what the damping is shared out by      [1] §6.3
    (6)  Δ = (G + √λ/π I)⁻¹ ∇L (A + π√λ I)⁻¹                     the natural gradient                   [1] §4.2, §6.3
    (7)  ν = min(1, √( κ / (lr² Σ ⟨Δ, ∇L⟩) ))                    shortens all of Δ                      [4]

(4) weighs every measurement by what it is a mean over, and needs no first value. ĝ at the data's own labels makes the
*empirical* Fisher. [2] puts 1/T into G instead of A: π makes up for that, and (6) is the same.

[1] Martens & Grosse 2015, arXiv:1503.05671         [3] Eschenhagen et al. 2023, arXiv:2311.00636
[2] Grosse & Martens 2016, arXiv:1602.01407         [4] Ba, Grosse & Martens 2017, openreview SkkTMpjex
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class Factor:
    """A running average (4) of A or G."""

    total: Tensor | None = None
    weight: float = 0.0

    def update(self, rows: Tensor, count: int, decay: float) -> None:
        """Let a measurement in: `rows [N, dim]`, whose outer products are divided by `count` for their mean."""
        old = 0.0 if self.total is None else decay * self.total
        self.total = old + (1 - decay) * rows.T @ rows
        self.weight = decay * self.weight + (1 - decay) * count

    def value(self) -> Tensor:
        """Return the average, `[dim, dim]`."""
        assert self.total is not None, "no backward pass has measured this layer yet"
        return self.total / self.weight


@dataclass
class Layer:
    """A layer and its statistics; `passes` holds (a, ∂L/∂s) of the backward passes since the last step."""

    module: nn.Linear | nn.Conv2d
    a: Factor = field(default_factory=Factor)
    g: Factor = field(default_factory=Factor)
    inverses: tuple[Tensor, Tensor] | None = None
    passes: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class ReferenceKFAC:
    """K-FAC of a model's `nn.Linear` and ungrouped `nn.Conv2d` layers; other parameters keep their gradients.

    The package does the same with `inversion: {early_refresh: 0}` and equal values of the options below.

    Args:
        model: The model, in one process; each step follows one backward pass.
        damping: λ of (6).
        decay: β of (4).
        factor_every: Steps between measurements.
        inverse_every: Steps between inversions, a multiple of `factor_every`.
        sharing: `expand` (2) or `reduce` (3).
        kl_clip: κ of (7); None leaves Δ as it is.
        lr: The learning rate in (7).

    Raises:
        ValueError: A convolution has groups, or a padding of another kind than a number of zeros.
    """

    def __init__(
        self,
        model: nn.Module,
        damping: float = 0.003,
        decay: float = 0.95,
        factor_every: int = 10,
        inverse_every: int = 100,
        sharing: Literal["expand", "reduce"] = "expand",
        kl_clip: float | None = None,
        lr: float = 1.0,
    ) -> None:
        self.damping, self.decay = damping, decay
        self.factor_every, self.inverse_every = factor_every, inverse_every
        self.sharing, self.kl_clip, self.lr = sharing, kl_clip, lr
        self.steps = 0
        self.layers = [Layer(module) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        for layer in self.layers:
            if isinstance(layer.module, nn.Conv2d):
                check_convolution(layer.module)
            layer.module.register_forward_hook(self._capture(layer))

    def _capture(self, layer: Layer) -> Any:
        """Return a forward hook that keeps a layer's input together with the gradient of its output."""

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad and self.steps % self.factor_every == 0:
                a = inputs[0].detach()
                output.register_hook(lambda gradient: layer.passes.append((a, gradient)))

        return keep

    @torch.no_grad()
    def step(self, terms: int | None = None) -> None:
        """Turn the gradients into natural gradients, in place.

        Args:
            terms: n, what the loss is a mean over; by default the number of samples.
        """
        updates = []
        for layer in self.layers:
            if layer.passes:
                self._measure(layer, terms)
            if self.steps % self.inverse_every == 0:
                layer.inverses = damped_inverses(layer.a.value(), layer.g.value(), self.damping)
            assert layer.inverses is not None
            inverse_a, inverse_g = layer.inverses
            gradient = matrix(layer.module)
            updates.append((layer.module, gradient, inverse_g @ gradient @ inverse_a))  # (6)
        scale = 1.0
        if self.kl_clip is not None:
            product = sum(float((update * gradient).sum()) for _, gradient, update in updates)
            scale = min(1.0, math.sqrt(self.kl_clip / (self.lr**2 * product)))  # (7)
        for module, _, update in updates:
            write(module, scale * update)
        self.steps += 1

    def _measure(self, layer: Layer, terms: int | None) -> None:
        """Average this step's factors; a module that was called several times has the rows of all of its calls."""
        n = terms or len(layer.passes[0][0])
        rows = [self._rows(layer.module, a, n * gradient) for a, gradient in layer.passes]
        layer.passes.clear()
        a, g = (torch.cat(parts) for parts in zip(*rows, strict=True))
        layer.a.update(a, len(a), self.decay)
        layer.g.update(g, n, self.decay)

    def _rows(self, module: nn.Linear | nn.Conv2d, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows whose outer products are summed in (2) or (3), `[BT or B, d_in (+ 1)]` and `[.., d_out]`."""
        if isinstance(module, nn.Conv2d):  # a patch is a position's input: [B, d_in, T] → [B, T, d_in]
            size, padding = module.kernel_size, module.padding
            assert not isinstance(padding, str)
            a = functional.unfold(a, size, module.dilation, padding, module.stride).transpose(1, 2)
            g = g.flatten(2).transpose(1, 2)
        a, g = (tensor.reshape(len(tensor), -1, tensor.shape[-1]) for tensor in (a, g))
        if module.bias is not None:
            a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], dim=2)
        if self.sharing == "reduce":
            return a.mean(1), g.sum(1)
        return a.flatten(0, 1), g.flatten(0, 1)


def damped_inverses(a: Tensor, g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the inverses in (6), of A and of G, with the π of (5), or 1 where a trace is zero."""
    ratio = float((a.trace() / len(a)) / (g.trace() / len(g)))
    pi = math.sqrt(ratio) if 0 < ratio < math.inf else 1.0
    root = math.sqrt(damping)
    identity_a, identity_g = (torch.eye(len(m), dtype=m.dtype, device=m.device) for m in (a, g))
    return inverse(a + pi * root * identity_a), inverse(g + root / pi * identity_g)


def inverse(positive: Tensor) -> Tensor:
    """Return the inverse of a positive definite matrix."""
    return torch.cholesky_inverse(torch.linalg.cholesky(positive))


def matrix(module: nn.Linear | nn.Conv2d) -> Tensor:
    """Return a layer's gradient ∇L, `[d_out, d_in (+ 1)]`: a bias's column behind those of the weight."""
    return torch.cat([gradient.reshape(len(gradient), -1) for gradient in gradients(module)], dim=1)


def write(module: nn.Linear | nn.Conv2d, update: Tensor) -> None:
    """Make such a matrix the layer's gradient."""
    start = 0
    for gradient in gradients(module):
        columns = gradient[0].numel()
        gradient.copy_(update[:, start : start + columns].reshape(gradient.shape))
        start += columns


def gradients(module: nn.Linear | nn.Conv2d) -> list[Tensor]:
    """Return the gradients of a layer's weight and, if it has one, bias."""
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def check_convolution(module: nn.Conv2d) -> None:
    """Refuse a convolution that `unfold` alone doesn't describe."""
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError(
            f"{module}: the reference takes one group and a number of zeros as padding; use kfac_dist.KFAC"
        )
