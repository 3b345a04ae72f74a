"""The minimum of a quadratic model over the plane of two directions (Martens & Grosse 2015, §6.4 and §7).

    δ = αΔ + μδ₀        M(δ) = ½ δᵀF̃δ + ∇hᵀδ,  F̃ = F + (λ+η)I

    ⎡α⎤      ⎡ΔᵀF̃Δ   ΔᵀF̃δ₀ ⎤⁻¹ ⎡∇hᵀΔ ⎤
    ⎣μ⎦ = −  ⎣  ·    δ₀ᵀF̃δ₀⎦   ⎣∇hᵀδ₀⎦

Five numbers, added up over the ranks before they come here; all on the device, so that no step waits for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Products are sums in fp32: a direction's component orthogonal to the other one is rounding below this share.
_COLLINEAR = 1e-5


def minimise(curvature: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coefficients of the lowest point of `½ cᵀQc + bᵀc`, and its value.

    Where the plane is none, the line is taken: without a δ₀ (the first step), or with one along Δ, μ is 0; with neither
    direction (no gradient), both are. A direction of non-positive or non-finite curvature, which a Fisher matrix has
    only by rounding, counts as none.

    Args:
        curvature: Q: `[2, 2]`, of Δ and δ₀ in this order; symmetric.
        slope: b: `[2]`.

    Returns:
        `[2]` and a 0-dim tensor, float64.
    """
    q, b = curvature.double(), slope.double()
    lengths = q.diagonal()
    usable = (lengths > 0) & torch.isfinite(lengths) & torch.isfinite(b)
    scale = torch.where(usable, lengths, 1.0).sqrt()
    # In units of its own length each direction has curvature 1, so that only their angle matters.
    cosine = q[0, 1] / (scale[0] * scale[1])
    down = torch.where(usable, -b / scale, 0.0)
    sine_squared = 1 - cosine.square()
    plane = usable.all() & torch.isfinite(cosine) & (sine_squared > _COLLINEAR)
    first = torch.stack([usable[0], ~usable[0]]).double()
    both = (down - cosine * down.flip(0)) / torch.where(plane, sine_squared, 1.0)
    coefficients = torch.where(plane, both, first * down) / scale
    known = torch.where(torch.isfinite(q), q, 0.0)
    value = 0.5 * (coefficients @ known @ coefficients) + coefficients @ torch.where(usable, b, 0.0)
    return coefficients, value
