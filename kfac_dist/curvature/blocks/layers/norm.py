"""Normalisation layers: scale and shift of one unit form a 2×2 block of the Fisher, exactly.

With y = γ·x̂ + β, a unit's per-term gradient is (Σ_t ĝ_t x̂_t, Σ_t ĝ_t). The sum runs over the positions of a sample
when the loss has one term a sample; for token losses every position is a term of its own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.compat.torch import ranks_normalized_over
from kfac_dist.config.schema import LossTerms, Sharing
from kfac_dist.curvature.blocks.base import Block, StatisticsSink, dense
from kfac_dist.curvature.blocks.layer_calls import Handle, LayerCall, Recorder
from kfac_dist.curvature.blocks.projection import PROJECTIONS, Signs, wide
from kfac_dist.curvature.blocks.rows import MicroBatch, batch_first, fold_samples, sample, unscale
from kfac_dist.curvature.factors import Side
from kfac_dist.errors import ModelError
from kfac_dist.hooks import before_forward
from kfac_dist.precision import widened


class NormBlock(Block):
    """F: one 2×2 matrix (1×1 without a shift) a unit; the gradient matrix has a row a unit.

    Attributes:
        unit_dims: The units' dimension in inputs of so many dimensions, where a subclass of the norm has it in another
            place than its type (images' channels in front, sequences' behind); found by trying it out.
    """

    def __init__(
        self, name: str, module: nn.Module, sharing: Sharing, *, parameters: dict[str, nn.Parameter] | None = None
    ) -> None:
        super().__init__(name, module, sharing, parameters=parameters)
        self.units = next(iter(self.parameters.values())).numel()
        width = len(self.parameters)
        self.unit_dims: dict[int, int] = {}
        self.factors = (dense(Side.F, width, self.units),)
        self.matrix_shape = (self.units, 1, width)

    def kept(self, inputs: Tensor) -> Tensor:
        """See `Block.kept`: autocast normalises in fp32, on a copy of an input of less."""
        return widened(inputs.detach()) if torch.is_autocast_enabled(inputs.device.type) else inputs

    @abstractmethod
    def normalized(self, inputs: Tensor) -> Tensor:
        """Return x̂ in the input's shape."""

    @abstractmethod
    def positions(self, tensor: Tensor, batch_size: int | None) -> Tensor:
        """Return a tensor of the input's shape as `[B, T, units]`."""

    def measure(
        self, calls: Sequence[LayerCall], batch: MicroBatch, sink: StatisticsSink, sides: frozenset[Side]
    ) -> None:
        """Add the second moments of the units' gradients; see `Block.measure`."""
        if Side.F not in sides:
            return
        parts: list[Tensor] = []
        factor = 1.0
        for call in calls:
            if call.grad is None:
                continue
            grad = self.positions(call.grad, batch.batch_size)
            shift, factor = unscale(widened(grad), batch)
            scale = shift * self.positions(self.normalized(widened(call.inputs)), batch.batch_size)
            columns = [scale, shift] if len(self.parameters) > 1 else [scale]
            token = batch.loss_terms is LossTerms.TOKEN
            parts.append(torch.stack([c.flatten(0, 1) if token else c.sum(dim=1) for c in columns]))
        if not parts:
            return
        # Calls of one sample add up; token losses keep every position of every call apart.
        if batch.loss_terms is LossTerms.SAMPLE and len({part.shape for part in parts}) == 1:
            parts = [torch.stack(parts).sum(0)]
        total = kept_total = 0
        for part in parts:
            kept = sample(part, batch)
            sink.add_values(self.name, Side.F, _moments(kept) * factor**2)
            total, kept_total = total + part.shape[1], kept_total + kept.shape[1]
        sink.add_count(self.name, Side.F, batch.terms * (kept_total / max(total, 1)))

    def project(self, call: LayerCall, batch_size: int | None, signs: Signs) -> tuple[Tensor, Tensor]:
        """See `Block.project`: the matrix is small enough to be made."""
        assert call.grad is not None
        shift = wide(self.positions(call.grad, batch_size)).flatten(0, 1)
        scale = shift * self.positions(self.normalized(wide(call.inputs)), batch_size).flatten(0, 1)
        columns = [scale, shift][: len(self.parameters)]
        matrix = torch.stack([column.sum(0) for column in columns], dim=-1)
        size = torch.stack([column.abs().sum(0) for column in columns], dim=-1)
        return signs.project(matrix[:, None]), size.double().sum().expand(PROJECTIONS)

    def parameter_views(self, matrix: Tensor) -> list[Tensor]:
        """See `Block.parameter_views`."""
        return [matrix[:, 0, column].view(shape) for column, shape in enumerate(self.own_shapes())]


def _moments(columns: Tensor) -> Tensor:
    """Return `Σ_m c_m c_mᵀ` `[units, width, width]` of gradients `[width, M, units]`.

    Products of whole columns: a batched product would first bring the few columns of every unit together.
    """
    width, _, units = columns.shape
    out = columns.new_empty(units, width, width)
    for i in range(width):
        for j in range(i, width):
            out[:, i, j] = out[:, j, i] = (columns[i] * columns[j]).sum(dim=0)
    return out


class LayerNormBlock(NormBlock):
    """`nn.LayerNorm` and `nn.RMSNorm`: units are the normalised elements.

    Subclasses that take images `[B, C, H, W]` or sequences `[B, C, T]` and normalise their channels (torchvision's and
    timm's `LayerNorm2d`, SqueezeBERT's) are measured channels last.
    """

    def normalized(self, inputs: Tensor) -> Tensor:
        """See `NormBlock.normalized`."""
        module, dim = self._norm, self._dim(inputs)
        rows = inputs.movedim(dim, -1)
        if isinstance(module, nn.RMSNorm):
            found = F.rms_norm(rows, self._shape, eps=module.eps)
        else:
            found = F.layer_norm(rows, self._shape, eps=module.eps)
        return found.movedim(-1, dim)

    def positions(self, tensor: Tensor, batch_size: int | None) -> Tensor:
        """See `NormBlock.positions`."""
        rows = tensor.movedim(self._dim(tensor), -1)
        return batch_first(rows, batch_size, feature_dims=len(self._shape)).flatten(2)

    def unbatched(self, inputs: Tensor) -> bool:
        """See `Block.unbatched`."""
        return inputs.ndim == len(self._shape)

    def leading(self, output: Sequence[int]) -> int:
        """See `Block.leading`."""
        last = list(output[-len(self._shape) :]) == self._shape and len(output) not in self.unit_dims
        return max(len(output) - len(self._shape), 1) if last else 1

    @property
    def _norm(self) -> nn.LayerNorm | nn.RMSNorm:
        return cast(nn.LayerNorm | nn.RMSNorm, self.module)

    @property
    def _shape(self) -> list[int]:
        return list(self._norm.normalized_shape)

    def _dim(self, tensor: Tensor) -> int:
        """Return the last of the dimensions that are normalised."""
        shape, dim = self._shape, self.unit_dims.get(tensor.ndim, -1)
        if list(tensor.shape[-len(shape) :] if dim == -1 else tensor.shape[dim : dim + 1]) == shape:
            return dim
        if len(shape) == 1 and tensor.ndim == 4 and tensor.shape[1] == shape[0]:
            return 1
        raise ModelError(
            f"layer {self.name} ({type(self._norm).__name__}) was given {list(tensor.shape)}, which doesn't end in "
            f"its normalized_shape {shape}: name it in kfac.curvature.exclude"
        )


class ChannelNormBlock(NormBlock):
    """Norms whose units are channels of `[B, C, *spatial]`, or of `[B, *spatial, C]` in subclasses that turn them."""

    def leading(self, output: Sequence[int]) -> int:
        """See `Block.leading`."""
        return 1

    def positions(self, tensor: Tensor, batch_size: int | None) -> Tensor:
        """See `NormBlock.positions`."""
        tensor = tensor.movedim(self.unit_dims.get(tensor.ndim, 1), 1)
        rows = tensor.reshape(*tensor.shape[:2], math.prod(tensor.shape[2:])).transpose(1, 2)
        return fold_samples(rows.unsqueeze(0), batch_size)[0]

    def normalized(self, inputs: Tensor) -> Tensor:
        """See `NormBlock.normalized`."""
        dim = self.unit_dims.get(inputs.ndim, 1)
        return self.channels_normalized(inputs.movedim(dim, 1)).movedim(1, dim)

    @abstractmethod
    def channels_normalized(self, inputs: Tensor) -> Tensor:
        """Return x̂ of `[B, C, *spatial]`."""


class GroupNormBlock(ChannelNormBlock):
    """`nn.GroupNorm`."""

    def channels_normalized(self, inputs: Tensor) -> Tensor:
        """See `ChannelNormBlock.channels_normalized`."""
        module = cast(nn.GroupNorm, self.module)
        return F.group_norm(inputs, module.num_groups, eps=module.eps)


class BatchNormBlock(ChannelNormBlock):
    """`nn.BatchNorm1d/2d/3d`.

    A sample's gradient through the batch's mean and variance is not its own; as usual, x̂ is taken as given.
    """

    def kept(self, inputs: Tensor) -> Tensor:
        """See `Block.kept`: autocast leaves batch norms alone."""
        return inputs

    def channels_normalized(self, inputs: Tensor) -> Tensor:
        """See `ChannelNormBlock.channels_normalized`.

        By the batch's statistics in training, by the running ones otherwise.
        """
        module = cast(nn.BatchNorm2d, self.module)
        own = module.training or module.running_mean is None
        mean, variance = (None, None) if own else (module.running_mean, module.running_var)
        return F.batch_norm(inputs, mean, variance, training=own, eps=module.eps)


class SyncBatchNormBlock(BatchNormBlock):
    """`nn.SyncBatchNorm` on one rank, or by its running statistics.

    Where it normalises over several ranks, no rank's input tells x̂, and the layer keeps its plain gradient.
    """

    def watch(self, recorder: Recorder) -> list[Handle]:
        """See `Block.watch`."""

        def runs(module: nn.SyncBatchNorm, args: tuple[object, ...]) -> None:
            if recorder.watching and (ranks := ranks_normalized_over(module)) > 1:
                recorder.refuse(
                    f"SyncBatchNorm normalises over all {ranks} ranks, so that no rank's input alone gives the "
                    "factor of its scale"
                )

        return [*(before_forward(module, runs) for module in self.modules), *super().watch(recorder)]
