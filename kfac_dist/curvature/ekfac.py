"""EKFAC's second moments: the diagonal of a block's Fisher in its eigenbasis (George et al. 2018, eq. 9).

    S = E[(Q_Gᵀ ∇ Q_A)²]        ∇ = Σ_t ĝ_t a_tᵀ, the gradient of one sample's term of the loss

which is exactly diag(Qᵀ F Q) for Q = Q_G ⊗ Q_A, and of all diagonals in this basis the nearest to F. With
one position, S is a single product of squares, ((Q_Gᵀĝ)²)ᵀ(Q_Aᵀa)². With several, positions of a sample add up before
anything is squared, a few samples' gradients at a time.

Under a token loss in the expand setting, a term's own gradient is unknown: ĝ_t is the sum over *all* later terms. Each
position counts as a separate term, as in G: S has the scale of A ⊗ G, and differs from its diagonal only by the
correlation of a position's input with its output gradient. In the reduce setting a sequence is one sample: ∇ sums over
its positions, and with labels drawn from the model (`mc`), independent of each other, the cross terms
vanish on average, so that this is the exact diagonal again.

A factor of fewer samples than its size has a null space, in which any basis is an eigenbasis: whichever LAPACK returns,
by the last bit of the sums. K-FAC doesn't mind, its eigenvalues are all zero there. A measured diagonal would, so that
it is levelled: where an eigenvalue is zero, every direction has the mean of S (`level`), which no choice changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kfac_dist.config.schema import LossTerms, Sharing
from kfac_dist.curvature.blocks.base import KroneckerBlock
from kfac_dist.curvature.blocks.layer_calls import LayerCall
from kfac_dist.curvature.blocks.rows import MicroBatch, sample, unscale
from kfac_dist.precision import at_least_single, widened

# Values of a temporary: per-sample gradients, or the patches of a convolution.
_VALUES = 2**22
# Eigenvalues below this share of the largest are rounding: some hundred or thousand times that of one value.
_NULL = {torch.float32: 1e-5, torch.float64: 1e-12}

Pieces = Sequence[Tensor]


def second_moments(
    block: KroneckerBlock, calls: Sequence[LayerCall], batch: MicroBatch, a: Pieces, g: Pieces
) -> tuple[Tensor, float | Tensor]:
    """Return the sum of the squared per-sample gradients in an eigenbasis, and the number of terms it is a sum over.

    Args:
        block: The layer.
        calls: Its calls in one forward pass, with their gradients.
        batch: Sizes, scales and sampling of the micro-batch.
        a: Q_A, diagonal block by diagonal block, `[batch, n, n]` each.
        g: Q_G, likewise.

    Returns:
        `[batch, d_out, d_in(+1)]` in fp32 (fp64 for a layer in it), and its weight.
    """
    rows = block.output_rows(_gradient(calls[0]), batch.batch_size)
    apart = batch.loss_terms is LossTerms.TOKEN and block.sharing is Sharing.EXPAND
    total = torch.zeros(block.matrix_shape, device=rows.device, dtype=at_least_single(rows.dtype))
    kept = 0
    for inputs, grads in _positions(block, calls, batch) if apart else _samples(block, calls, batch):
        scaled, factor = unscale(grads, batch)
        kept += inputs.shape[1]
        total.add_(_squares(inputs, scaled, a, g, ones=block.has_bias), alpha=factor**2)
    samples = [_gradient(call).numel() // (rows.shape[0] * rows.shape[3]) for call in calls]
    seen = sum(samples) if apart else rows.shape[1]
    return total, batch.terms * (kept / max(seen, 1))


def level(moments: Tensor, d_a: Tensor, d_g: Tensor) -> Tensor:
    """Return S with its mean over the null space of A, and over that of G, in every direction of them.

    Args:
        moments: S, or its sum, `[batch, d_out, d_in]`.
        d_a: Eigenvalues of A, `[batch, d_in]`.
        d_g: Eigenvalues of G, `[batch, d_out]`.
    """
    return _level(_level(moments, d_a).mT, d_g).mT


def _level(moments: Tensor, eigenvalues: Tensor) -> Tensor:
    null = eigenvalues <= _NULL[eigenvalues.dtype] * eigenvalues.amax(-1, keepdim=True)
    null = (null & (eigenvalues >= 0))[:, None, :]  # below are those not known yet
    mean = (moments * null).sum(-1, keepdim=True) / null.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(null, mean, moments)


def turn(moments: Tensor, a: Sequence[tuple[Tensor, Tensor]], g: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the diagonal, in a new eigenbasis, of the matrix that has `moments` for its diagonal in the old one.

    `diag(Q'ᵀ Q diag(S) Qᵀ Q') = (R_G ∘ R_G) S (R_A ∘ R_A)ᵀ` with R = Q'ᵀ Q; linear in S, and keeps its sum.

    Args:
        moments: S, or its sum, `[batch, d_out, d_in]`.
        a: The old and the new Q_A, diagonal block by diagonal block.
        g: Likewise for Q_G.
    """
    turned = _project(moments, [_overlap(old, new) for old, new in a])
    return _project(turned.mT, [_overlap(old, new) for old, new in g]).mT


def _overlap(old: Tensor, new: Tensor) -> Tensor:
    return (widened(old).mT @ widened(new)).square()


def _positions(block: KroneckerBlock, calls: Sequence[LayerCall], batch: MicroBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield activations and output gradients `[batch, M, 1, d]`: each position a sample with one."""
    for call in calls:
        inputs, grads = _rows(block, call, batch.batch_size)
        yield sample(inputs.flatten(1, 2), batch).unsqueeze(2), sample(grads.flatten(1, 2), batch).unsqueeze(2)


def _samples(block: KroneckerBlock, calls: Sequence[LayerCall], batch: MicroBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield activations and output gradients `[batch, B, T, d]` of some samples, all their positions and uses."""
    size = batch.batch_size
    if size is None or any(len(call.inputs) != size or len(_gradient(call)) != size for call in calls):
        first = batch.first_row(1)
        pairs = [_rows(block, call, size) for call in calls]
        yield from _joined([(x[:, first :: batch.stride], y[:, first :: batch.stride]) for x, y in pairs])
        return
    # So few samples at a time that a convolution's patches are small.
    groups, d_out, d_in = block.matrix_shape
    positions = sum(_gradient(call).numel() for call in calls) // (size * groups * d_out)
    step = batch.stride * max(1, _VALUES // (positions * groups * (d_in + d_out)))
    for begin in range(batch.first_row(1), size, step):
        chosen = slice(begin, min(begin + step, size), batch.stride)
        yield from _joined([_rows(block, call.part(chosen), len(range(size)[chosen])) for call in calls])


def _rows(block: KroneckerBlock, call: LayerCall, batch_size: int | None) -> tuple[Tensor, Tensor]:
    return block.use_rows(call, batch_size), block.output_rows(_gradient(call), batch_size)


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Bring several uses together as positions of the same samples, if they saw as many."""
    if len(pairs) == 1 or len({inputs.shape[1] for inputs, _ in pairs}) > 1:
        return list(pairs)
    inputs, grads = zip(*pairs, strict=True)
    return [(torch.cat(inputs, dim=2), torch.cat(grads, dim=2))]


def _squares(inputs: Tensor, grads: Tensor, a: Pieces, g: Pieces, *, ones: bool) -> Tensor:
    """Return `Σ_b (Q_Gᵀ (Σ_t ĝ_bt a_btᵀ) Q_A)²` for rows `[batch, B, T, d]`; `ones` adds the bias's coordinate."""
    dtype = at_least_single(torch.promote_types(inputs.dtype, grads.dtype))
    inputs, grads = inputs.to(dtype), grads.to(dtype)
    groups, samples, positions, width = inputs.shape
    if ones:
        inputs = torch.cat([inputs, inputs.new_ones(groups, samples, positions, 1)], dim=-1)
        width += 1
    height = grads.shape[-1]
    if positions == 1:
        a_rows, g_rows = _project(inputs.squeeze(2), a), _project(grads.squeeze(2), g)
        return torch.bmm(g_rows.square_().mT, a_rows.square_())
    # Rows are many and gradients small, or the other way round: rotate the smaller ones.
    rows_first = positions * (width**2 + height**2) < width * height * (width + height)
    if rows_first:
        inputs = _project(inputs.flatten(1, 2), a).unflatten(1, (samples, positions))
        grads = _project(grads.flatten(1, 2), g).unflatten(1, (samples, positions))
    total = inputs.new_zeros(groups, height, width)
    step = max(1, _VALUES // (groups * height * width))
    for some_inputs, some_grads in zip(inputs.split(step, dim=1), grads.split(step, dim=1), strict=True):
        products = some_grads.mT @ some_inputs  # [batch, b, d_out, d_in]
        if not rows_first:
            count = products.shape[1]
            products = _project(products.flatten(1, 2), a).unflatten(1, (count, height)).mT
            products = _project(products.flatten(1, 2), g).unflatten(1, (count, width)).mT
        total += products.square_().sum(1)
    return total


def _project(rows: Tensor, pieces: Pieces) -> Tensor:
    """Return rows `[batch, M, n]` times block-diagonal matrices, in the rows' precision; a new tensor."""
    if len(pieces) == 1:
        return torch.bmm(rows, pieces[0].to(rows.dtype))
    dims = [piece.shape[-1] for piece in pieces]
    parts = zip(rows.split(dims, dim=-1), pieces, strict=True)
    return torch.cat([torch.bmm(part, piece.to(rows.dtype)) for part, piece in parts], dim=-1)


def _gradient(call: LayerCall) -> Tensor:
    assert call.grad is not None
    return call.grad
