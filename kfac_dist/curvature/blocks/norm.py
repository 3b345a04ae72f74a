"""Normalisation layers: scale and shift of one unit form a 2×2 block of the Fisher, exactly.

With y = γ·x̂ + β, a unit's per-term gradient is (Σ_t ĝ_t x̂_t, Σ_t ĝ_t). The sum runs over the positions of a sample
when the loss has one term a sample; for token losses every position is a term of its own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.config.schema import LossTerms, Sharing
from kfac_dist.curvature.blocks.base import (
    Block,
    MicroBatch,
    StatisticsSink,
    Use,
    batch_first,
    dense,
    fold_samples,
    loss_terms,
    sample,
    unscale,
)
from kfac_dist.curvature.factors import Side


class NormBlock(Block):
    """F: one 2×2 matrix (1×1 without a shift) a unit; the gradient matrix has a row a unit."""

    def __init__(self, name: str, module: nn.Module, sharing: Sharing) -> None:
        super().__init__(name, module, sharing)
        self.units = next(iter(self.parameters.values())).numel()
        width = len(self.parameters)
        self.factors = (dense(Side.F, width, self.units),)
        self.matrix_shape = (self.units, 1, width)

    @abstractmethod
    def normalized(self, inputs: Tensor) -> Tensor:
        """Return x̂ in the input's shape."""

    @abstractmethod
    def positions(self, tensor: Tensor, batch_size: int | None) -> Tensor:
        """Return a tensor of the input's shape as `[B, T, units]`."""

    def measure(self, uses: Sequence[Use], batch: MicroBatch, sink: StatisticsSink, sides: frozenset[Side]) -> None:
        """Add the second moments of the units' gradients; see `Block.measure`."""
        if Side.F not in sides:
            return
        parts: list[Tensor] = []
        terms: float | Tensor = 0.0
        for use in uses:
            if use.grad is None:
                continue
            grad = self.positions(use.grad, batch.batch_size)
            terms = loss_terms(grad.unsqueeze(0), batch)
            scaled, factor = unscale(grad.float(), terms, batch)
            scale = scaled * self.positions(self.normalized(use.inputs.float()), batch.batch_size)
            gradients = torch.stack([scale, scaled] if len(self.parameters) > 1 else [scale], dim=-1) * factor
            parts.append(gradients.flatten(0, 1) if batch.loss_terms is LossTerms.TOKEN else gradients.sum(dim=1))
        if not parts:
            return
        # Uses of one sample add up; token losses keep every position of every use apart.
        if batch.loss_terms is LossTerms.SAMPLE and len({part.shape for part in parts}) == 1:
            parts = [torch.stack(parts).sum(0)]
        total = kept_total = 0
        for part in parts:
            kept = sample(part.unsqueeze(0), batch)[0]
            sink.add_values(self.name, Side.F, torch.einsum("mui,muj->uij", kept, kept))
            total, kept_total = total + part.shape[0], kept_total + kept.shape[0]
        sink.add_count(self.name, Side.F, terms * (kept_total / max(total, 1)))

    def matrix_views(self, tensors: Sequence[Tensor], matrix: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """See `Block.matrix_views`."""
        return [(tensor.flatten(), matrix[:, 0, column]) for column, tensor in enumerate(tensors)]


class LayerNormBlock(NormBlock):
    """`nn.LayerNorm` and `nn.RMSNorm`: units are the normalised elements."""

    def normalized(self, inputs: Tensor) -> Tensor:
        """See `NormBlock.normalized`."""
        module = cast(nn.LayerNorm | nn.RMSNorm, self.module)
        shape = list(module.normalized_shape)
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(inputs, shape, eps=module.eps)
        return F.layer_norm(inputs, shape, eps=module.eps)

    def positions(self, tensor: Tensor, batch_size: int | None) -> Tensor:
        """See `NormBlock.positions`."""
        shape = cast(nn.LayerNorm | nn.RMSNorm, self.module).normalized_shape
        return batch_first(tensor, batch_size, feature_dims=len(shape)).flatten(2)


class ChannelNormBlock(NormBlock):
    """Norms whose units are channels of `[B, C, *spatial]`."""

    def positions(self, tensor: Tensor, batch_size: int | None) -> Tensor:
        """See `NormBlock.positions`."""
        rows = tensor.reshape(*tensor.shape[:2], math.prod(tensor.shape[2:])).transpose(1, 2)
        return fold_samples(rows.unsqueeze(0), batch_size)[0]


class GroupNormBlock(ChannelNormBlock):
    """`nn.GroupNorm`."""

    def normalized(self, inputs: Tensor) -> Tensor:
        """See `NormBlock.normalized`."""
        module = cast(nn.GroupNorm, self.module)
        return F.group_norm(inputs, module.num_groups, eps=module.eps)


class BatchNormBlock(ChannelNormBlock):
    """`nn.BatchNorm1d/2d/3d` and `nn.SyncBatchNorm`.

    A sample's gradient through the batch's mean and variance is not its own; as usual, x̂ is taken as given.
    """

    def normalized(self, inputs: Tensor) -> Tensor:
        """See `NormBlock.normalized`: by the batch's statistics in training, by the running ones otherwise."""
        module = cast(nn.BatchNorm2d, self.module)
        own = module.training or module.running_mean is None
        mean, variance = (None, None) if own else (module.running_mean, module.running_var)
        return F.batch_norm(inputs, mean, variance, training=own, eps=module.eps)
