"""Random projections of a block's gradient matrix, cheap to make from rows: they tell whether two matrices are one.

Projection k of `P [batch, d_out, d_in]` is `⟨P, R_k⟩` with `R_k[b] = u_k vₖᵀ` for random signs u and v, so that that of
`P = Σ ĝᵀa` is `Σ (ĝ·u)(a·v)`: P itself is never made. `E⟨D, R⟩² = ‖D‖²` in the Frobenius norm.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

# Projections a block: all are near zero by chance with a probability below 1e-10.
PROJECTIONS = 16


class Signs:
    """The random signs of one block; the same wherever they are made.

    Args:
        name: The block's name, which seeds them.
        shape: `(batch, d_out, d_in(+1))` of its gradient matrix.
        device: Device of their use.
    """

    def __init__(self, name: str, shape: Sequence[int], device: torch.device) -> None:
        batch, outputs, inputs = shape
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

        def draw(size: int) -> Tensor:
            signs = torch.randint(0, 2, (batch, size, PROJECTIONS), generator=generator, dtype=torch.int8)
            return (2 * signs - 1).to(device, torch.float32)

        self.left = draw(outputs)
        self.right = draw(inputs)

    def project_rows(self, grads: Tensor, rows: Tensor, *, ones: bool) -> tuple[Tensor, Tensor]:
        """Return projections of `Σ_m ĝ_mᵀ [a_m, 1]` and magnitudes, both `[k]`.

        Args:
            grads: `[batch, M, d_out]`.
            rows: `[batch, M, d_in]`, without the homogeneous coordinate.
            ones: Whether rows end in a 1.
        """
        right = self.right[:, :-1] if ones else self.right
        along = _product(rows, right)
        if ones:
            along = along + self.right[:, -1:].to(along.dtype)
        terms = _product(grads, self.left) * along
        return terms.sum((0, 1)), terms.abs().sum((0, 1))

    def project_lookup(self, grads: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return projections of `Σ_m ĝ_mᵀ e_token` and magnitudes, for one-hot rows.

        Args:
            grads: `[M, d_out]`.
            tokens: `[M]`, the columns of the ones.
        """
        terms = _product(grads, self.left[0]) * self.right[0].index_select(0, tokens).double()
        return terms.sum(0), terms.abs().sum(0)

    def project(self, matrix: Tensor) -> Tensor:
        """Return the projections `[k]` of a gradient matrix."""
        return (_product(matrix.mT, self.left) * self.right.double()).sum((0, 1))


def sum_of(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Add up projections, and magnitudes."""
    values, sizes = zip(*parts, strict=True)
    return torch.stack(values).sum(0), torch.stack(sizes).sum(0)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in fp32 at least."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _product(rows: Tensor, signs: Tensor) -> Tensor:
    values = wide(rows)
    return (values @ signs.to(values.dtype)).double()
