"""A solver: inverses column by column by conjugate gradients, which begin at the last inverse.

extensions: [examples.extensions.solver]
kfac:
  inversion: {solver: conjugate_gradients}

python -m examples.extensions.solver
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_dist.extensions import register_solver


def conjugate_gradients(matrices: Tensor, previous: Tensor) -> Tensor:
    """Return the inverses of damped factors (Hestenes & Stiefel 1952); any other number of steps would serve, too.

    Args:
        matrices: `[k, n, n]`, symmetric, on their way to be thrown away.
        previous: The last inverses of the same factors `[k, n, n]`; at first the identity or zero.
    """
    n = matrices.shape[-1]
    tiny, enough = torch.finfo(matrices.dtype).tiny, (n * torch.finfo(matrices.dtype).eps) ** 2
    inverse = previous.clone()
    residual = torch.eye(n, dtype=matrices.dtype, device=matrices.device) - matrices @ inverse
    direction = residual.clone()
    size = residual.square().sum(-2, keepdim=True)
    for _ in range(2 * n):
        if bool((size <= enough).all()):
            break
        product = matrices @ direction
        length = size / (direction * product).sum(-2, keepdim=True).clamp_min(tiny)
        inverse += length * direction
        residual -= length * product
        smaller = residual.square().sum(-2, keepdim=True)
        direction = residual + smaller / size.clamp_min(tiny) * direction
        size = smaller
    return inverse


register_solver("conjugate_gradients", conjugate_gradients, api_version=1)


def main() -> None:
    """Print how far from the identity a product with an inverse is."""
    root = torch.randn(3, 64, 256)
    factors = root @ root.mT / 256 + 0.01 * torch.eye(64)
    inverse = conjugate_gradients(factors.clone(), torch.zeros_like(factors))
    print(f"{float((factors @ inverse - torch.eye(64)).abs().max()):.1e}")


if __name__ == "__main__":
    main()
