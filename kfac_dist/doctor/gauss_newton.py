"""The exact generalised Gauss–Newton matrix (GGN), block by block, as far as a comparison needs it.

    GGN = (1/n) Σ_i J_iᵀ H_i J_i = (1/n) RᵀR

with J_i the Jacobian of a sample's outputs, H_i the Hessian of its loss there (by automatic differentiation of the
loss itself, independent of K-FAC's likelihood), and R its rows `(H_i^½ J_i)`: one backward pass
each. No block of P×P is ever made: norms and inner products follow from the rows,

    ‖GGN‖² = ‖RRᵀ‖²/n²,    ⟨A⊗G, GGN⟩ = (1/n) Σ_k ⟨R_k, G R_k A⟩,    ‖A⊗G‖² = ‖A‖²‖G‖².
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfac_dist.curvature.blocks import Block
from kfac_dist.inputs import Inputs
from kfac_dist.tasks import Loss
from kfac_dist.training.passes import forward

# Entries of the rows that are held at a time; a block that alone has more is not compared.
ENTRIES = 2**25
# Eigenvalues of H below this share of the largest are rounding.
_RANK = 1e-9


@dataclass(frozen=True)
class Comparison:
    """Two matrices by their norms and inner product.

    Attributes:
        exact: ‖GGN‖².
        approximate: ‖A⊗G‖².
        inner: ⟨A⊗G, GGN⟩.
    """

    exact: float
    approximate: float
    inner: float

    @property
    def error(self) -> float:
        """‖A⊗G − GGN‖ / ‖GGN‖."""
        difference = max(self.exact + self.approximate - 2 * self.inner, 0.0)
        return math.sqrt(difference / max(self.exact, 1e-300))

    @property
    def cosine(self) -> float:
        """Their angle's cosine."""
        return self.inner / max(math.sqrt(self.exact * self.approximate), 1e-300)


def hessian_rows(loss: Loss, outputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Return vectors at the outputs whose outer products add up to the Hessian of the summed loss.

    Args:
        loss: The loss.
        outputs: `[B, ...]`, detached; samples don't share terms.
        targets: `[B, ...]`.
    """
    rows = []
    for sample in range(len(outputs)):
        one, its = outputs[sample : sample + 1].double(), targets[sample : sample + 1]
        its = its.double() if its.is_floating_point() else its

        def total(flat: Tensor, shape: torch.Size = one.shape, its: Tensor = its) -> Tensor:
            return loss.total(flat.view(shape), its)

        values, vectors = torch.linalg.eigh(torch.func.hessian(total)(one.flatten()))
        for value, vector in zip(values, vectors.T, strict=True):
            if value > _RANK * values[-1]:
                row = torch.zeros_like(outputs)
                row[sample] = (value.sqrt() * vector).view(one.shape[1:]).to(outputs.dtype)
                rows.append(row)
    return rows


def compare(
    module: nn.Module,
    blocks: Sequence[Block],
    factors: dict[str, tuple[Tensor, ...]],
    inputs: Inputs,
    rows: Sequence[Tensor],
    terms: float,
) -> Iterator[tuple[Block, Comparison | None]]:
    """Yield each block with its comparison, None where the rows would have more than `ENTRIES` entries.

    Args:
        module: The bare model.
        blocks: Its blocks.
        factors: By block `(A, G)`, dense `[batch, n, n]` or diagonal `[batch, n]`; `(F,)` for unit-wise blocks.
        inputs: The model's inputs, `[B, ...]`.
        rows: The result of `hessian_rows` for the outputs.
        terms: n.
    """
    outputs = forward(module, inputs)
    for group in _groups(blocks, len(rows)):
        parameters = [p for block in group for p in block.parameters.values()]
        held = {block.name: rows[0].new_zeros(len(rows), *block.matrix_shape) for block in group}
        for index, row in enumerate(rows):
            gradients = torch.autograd.grad(
                outputs, parameters, row, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            each = iter(gradients)
            for block in group:
                tensors = [next(each) for _ in block.parameters]
                for values, view in block.matrix_views(tensors, held[block.name][index]):
                    view.copy_(values)
        for block in group:
            yield block, _compare_block(held.pop(block.name).double(), factors[block.name], terms)
    for block in blocks:
        if _entries(block, len(rows)) > ENTRIES:
            yield block, None


def _groups(blocks: Sequence[Block], rows: int) -> Iterator[list[Block]]:
    """Cut blocks into runs whose rows fit into `ENTRIES`, without those that don't fit by themselves."""
    group: list[Block] = []
    for block in blocks:
        if _entries(block, rows) > ENTRIES:
            continue
        if group and sum(_entries(other, rows) for other in [*group, block]) > ENTRIES:
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def _entries(block: Block, rows: int) -> int:
    return rows * torch.Size(block.matrix_shape).numel()


def _compare_block(rows: Tensor, factors: tuple[Tensor, ...], terms: float) -> Comparison:
    """Compare within the block's independent parts: rows `[N, batch, d_out, d_in]`."""
    products = rows.flatten(2).transpose(0, 1)  # [batch, N, d_out·d_in]
    if len(factors) == 1:
        f = factors[0].double()
        exact = products.mT @ products / terms
        return Comparison(float(exact.square().sum()), float(f.square().sum()), float((exact * f).sum()))
    a, g = (factor.double() for factor in factors)
    gram = products @ products.mT
    applied = rows * a[:, None, :] if a.ndim == 2 else rows @ a
    applied = g[:, :, None] * applied if g.ndim == 2 else g @ applied
    approximate = (a.flatten(1).square().sum(1) * g.flatten(1).square().sum(1)).sum()
    return Comparison(float(gram.square().sum()) / terms**2, float(approximate), float((rows * applied).sum()) / terms)
