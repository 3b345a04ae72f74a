"""Rows of a layer from its inputs and output gradients: samples' dimension, weight sharing, sampling, the loss's scale.

Rows are `[batch, B, T, d]`, T positions of B samples, until sharing has made `[batch, M, d]` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_dist.config.schema import LossTerms, Sharing
from kfac_dist.curvature.class_conditional import Classes, Members
from kfac_dist.precision import at_least_single, widened


@dataclass(frozen=True)
class MicroBatch:
    """A block's view of the micro-batch, beyond its own tensors.

    Attributes:
        terms: n, the loss's terms in this micro-batch on this rank, independent of a layer's number of rows.
        loss_terms: Terms of the mean in the loss.
        batch_size: B, samples that the model was called with; None if the model itself was not called.
        first_sample: Index of the first of them in the optimizer step's global batch.
        divisor: Number d by which the sum of the per-term losses was divided, so that ĝ = d·∂L/∂s; None: n. A tensor
            when only the device knows it (valid tokens).
        inverse_scale: Reciprocal of the loss scale: a 0-dim tensor where only the device knows it; None without one.
        stride: One row in `stride` enters the factors.
        phase: Index of the first one; rotates from measurement to measurement.
        classes: Source of the rows' classes, where statistics are kept apart by class.
    """

    terms: float | Tensor
    loss_terms: LossTerms = LossTerms.SAMPLE
    batch_size: int | None = None
    first_sample: int = 0
    divisor: float | Tensor | None = None
    inverse_scale: float | Tensor | None = None
    stride: int = 1
    phase: int = 0
    classes: Classes | None = None

    def members(self, layer: str, rows: int, *, inputs: bool) -> Members | None:
        """Return the classes of those of a layer's `rows` that enter the factors; None if they aren't kept apart."""
        if self.classes is None:
            return None
        members = self.classes.members(layer, rows, inputs=inputs)
        if self.stride == 1:
            return members
        return members.kept(lambda values: sample(values.view(1, -1, 1), self).reshape(-1))

    def first_row(self, rows_per_sample: int) -> int:
        """Return the first local row to keep; a function of global row numbers, so that W doesn't matter."""
        return (self.phase - self.first_sample * rows_per_sample) % self.stride


def unscale(grad: Tensor, batch: MicroBatch) -> tuple[Tensor, float]:
    """Return rows and a host factor whose product is ĝ = divisor·∂L/∂s.

    A host number costs nothing: its square scales the Gram matrix. A device number (and with it an AMP loss scale) is
    multiplied in fp32 before anything is squared.
    """
    divisor = batch.terms if batch.divisor is None else batch.divisor
    if batch.inverse_scale is not None:
        divisor = batch.inverse_scale * divisor
    if isinstance(divisor, Tensor):
        return widened(grad) * divisor, 1.0
    return grad, divisor


def batch_first(tensor: Tensor, batch_size: int | None, feature_dims: int = 1) -> Tensor:
    """Return `[N..., d]` as `[B, T, d]`, finding the samples' dimension by the model's batch size.

    Layers see [B, d], [B, T, d], [T, B, d] or rows already folded to [B·T, d]; or a part of the samples, [m, T, d].
    """
    if tensor.ndim == feature_dims:
        tensor = tensor.unsqueeze(0)
    lead = tensor.shape[: tensor.ndim - feature_dims]
    features = tensor.shape[tensor.ndim - feature_dims :]
    rows = lead.numel()
    if not rows:
        return tensor.reshape(0, 1, *features)
    if not batch_size or lead[0] == batch_size or rows % batch_size:
        return tensor.reshape(lead[0], rows // lead[0], *features)
    if len(lead) > 1 and lead[1] == batch_size:
        return tensor.transpose(0, 1).reshape(batch_size, rows // batch_size, *features)
    if len(lead) > 1 and lead[0] > 1 and lead[0] % batch_size:
        return tensor.reshape(lead[0], rows // lead[0], *features)  # not folded: a part of the samples
    return tensor.reshape(batch_size, rows // batch_size, *features)


def fold_samples(rows: Tensor, batch_size: int | None) -> Tensor:
    """Return image-like rows `[batch, N, T, d]` as `[batch, B, k·T, d]` when a layer sees N = B·k images.

    A model that folds frames or crops into the batch has them as positions of its samples; the loss has B terms.
    """
    batch, found, positions, width = rows.shape
    if not batch_size or not found or found == batch_size or found % batch_size:
        return rows
    return rows.reshape(batch, batch_size, found // batch_size * positions, width)


def shared_rows(rows: Sequence[Tensor], sharing: Sharing, *, mean: bool) -> list[Tensor]:
    """Bring uses `[batch, B, T, d]` to rows `[batch, M, d]` by the weight-sharing setting.

    Expand keeps every position; reduce sums a sample's positions over all uses (means, for activations). Uses that saw
    different numbers of samples can't be one sample's positions: each is then reduced by itself.
    """
    if sharing is Sharing.EXPAND:
        return [call.flatten(1, 2) for call in rows]
    if len({call.shape[1] for call in rows}) > 1:
        return [call.mean(dim=2) if mean else call.sum(dim=2) for call in rows]
    if len(rows) == 1 and rows[0].shape[2] == 1:
        return [rows[0].squeeze(2)]
    total = torch.stack([call.sum(dim=2, dtype=at_least_single(call.dtype)) for call in rows]).sum(0)
    return [total / sum(call.shape[2] for call in rows) if mean else total]


def sample(rows: Tensor, batch: MicroBatch) -> Tensor:
    """Keep every `stride`-th row of `[batch, M, d]`: a view, no copy."""
    if batch.stride == 1:
        return rows
    per_sample = rows.shape[1] // batch.batch_size if batch.batch_size and rows.shape[1] >= batch.batch_size else 1
    return rows[:, batch.first_row(per_sample) :: batch.stride]
