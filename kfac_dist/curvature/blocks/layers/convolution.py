"""`nn.Conv1d/2d/3d`: rows are the input patches under the kernel (KFC, Grosse & Martens 2016), a group at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.config.schema import Sharing
from kfac_dist.curvature.blocks.base import KroneckerBlock, StatisticsSink, dense, weight_and_bias_views
from kfac_dist.curvature.blocks.layer_calls import LayerCall
from kfac_dist.curvature.blocks.layers.patch_gram import correlation_is_cheaper, patch_gram
from kfac_dist.curvature.blocks.projection import Signs, sum_of
from kfac_dist.curvature.blocks.rows import MicroBatch, fold_samples
from kfac_dist.curvature.factors import Side
from kfac_dist.precision import widened

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

# Values of a temporary: unfolded patches.
_PATCH_VALUES = 2**24


class ConvolutionBlock(KroneckerBlock):
    """A: [c_in/groups · kernel (+1)]², G: [c_out/groups]², one pair for each group.

    The Kronecker product equals KFC's Ω ⊗ Γ: A averages over samples and output positions, G sums over positions.
    """

    def __init__(self, name: str, module: nn.Module, sharing: Sharing) -> None:
        super().__init__(name, module, sharing)
        self.has_bias = len(self.parameters) > 1
        layer = cast(Convolution, module)
        self.groups = layer.groups
        width = layer.in_channels // self.groups * math.prod(layer.kernel_size) + self.has_bias
        outputs = layer.out_channels // self.groups
        self.factors = (dense(Side.A, width, self.groups), dense(Side.G, outputs, self.groups))
        self.matrix_shape = (self.groups, outputs, width)
        self._spatial = len(layer.kernel_size)

    def unbatched(self, inputs: Tensor) -> bool:
        """See `Block.unbatched`."""
        return inputs.ndim == self._spatial + 1

    def leading(self, output: Sequence[int]) -> int:
        """See `Block.leading`."""
        return 1

    def input_rows(self, inputs: Tensor, batch_size: int | None) -> Tensor:
        """Return the patches `[groups, B, T, c_in/groups · kernel]` for T output positions."""
        module = cast(Convolution, self.module)
        if inputs.ndim == self._spatial + 1:
            inputs = inputs.unsqueeze(0)
        patches = unfold(pad(inputs, module), module.kernel_size, module.stride, module.dilation)
        return fold_samples(self._rows_of(patches), batch_size)

    def _rows_of(self, patches: Tensor) -> Tensor:
        """Return patches `[B, C, *out, *kernel]` as `[groups, B, T, C/groups · kernel]`."""
        samples, channels = patches.shape[:2]
        out, kernel = patches.shape[2 : 2 + self._spatial], patches.shape[2 + self._spatial :]
        grouped = torch.unflatten(patches, 1, (self.groups, channels // self.groups))
        # [B, groups, c, *out, *kernel] → [groups, B, *out, c, *kernel]
        behind = range(3 + self._spatial, 3 + 2 * self._spatial)
        rows = grouped.permute(1, 0, *range(3, 3 + self._spatial), 2, *behind)
        return rows.reshape(self.groups, samples, math.prod(out), channels // self.groups * math.prod(kernel))

    def output_rows(self, grad: Tensor, batch_size: int | None) -> Tensor:
        """Return `[groups, B, T, c_out/groups]`."""
        if grad.ndim == self._spatial + 1:
            grad = grad.unsqueeze(0)
        rows = torch.unflatten(grad.flatten(2), 1, (self.groups, -1)).permute(1, 0, 3, 2)
        return fold_samples(rows, batch_size)

    def _measure_inputs(self, calls: Sequence[LayerCall], batch: MicroBatch, sink: StatisticsSink) -> None:
        inputs = (call.inputs for call in calls)
        images = [tensor.unsqueeze(0) if tensor.ndim == self._spatial + 1 else tensor for tensor in inputs]
        whole = batch.stride == 1 or all(len(image) == batch.batch_size for image in images)
        rows = batch.classes is not None  # by class, which correlation has none of
        if rows or not whole or self.sharing is not Sharing.EXPAND or not all(map(self._correlates, images)):
            super()._measure_inputs(calls, batch, sink)
            return
        for image in images:
            # Correlation has no rows to choose from: sampling takes whole images.
            gram, positions = self._correlate(image[batch.first_row(1) :: batch.stride])
            sink.add_values(self.name, Side.A, gram)
            sink.add_count(self.name, Side.A, float(positions))

    def _correlates(self, images: Tensor) -> bool:
        """Whether A is quicker by correlating shifted images than by unfolding them."""
        module = cast(Convolution, self.module)
        plain = module.padding_mode == "zeros" and set(module.stride) == set(module.dilation) == {1}
        if self._spatial != 2 or not plain or math.prod(module.kernel_size) == 1:
            return False
        fits = all(max(pair) < size for pair, size in zip(padding_of(module), module.kernel_size, strict=True))
        return fits and correlation_is_cheaper(images.shape[2:], module.kernel_size)

    def _correlate(self, images: Tensor) -> tuple[Tensor, int]:
        """Return `Σ a aᵀ` `[groups, n, n]` and its number of terms, without making the patches."""
        module = cast(nn.Conv2d, self.module)
        (vertical, horizontal), kernel = padding_of(module), module.kernel_size
        grouped = torch.unflatten(images, 1, (self.groups, -1)).permute(1, 2, 0, 3, 4)
        gram = patch_gram(grouped, (kernel[0], kernel[1]), (vertical, horizontal))
        total = F.pad(widened(grouped).sum(dim=2), (*horizontal, *vertical))
        outputs = (total.shape[-2] - kernel[0] + 1) * (total.shape[-1] - kernel[1] + 1)
        if self.has_bias:
            border = F.unfold(total, kernel).sum(dim=-1)
            gram = F.pad(gram, (0, 1, 0, 1))
            gram[:, :-1, -1] = border
            gram[:, -1, :-1] = border
            gram[:, -1, -1] = images.shape[0] * outputs
        return gram, images.shape[0] * outputs

    def project(self, call: LayerCall, batch_size: int | None, signs: Signs) -> tuple[Tensor, Tensor]:
        """See `Block.project`: a few images at a time, since their patches are many times their size."""
        if call.inputs.ndim == self._spatial + 1:
            return super().project(call, batch_size, signs)
        patches = math.prod(call.shape[2:]) * self.matrix_shape[2] * self.groups
        few = max(1, _PATCH_VALUES // max(1, patches))
        parts = [
            super(ConvolutionBlock, self).project(call.part(slice(first, first + few)), None, signs)
            for first in range(0, max(1, len(call.inputs)), few)
        ]
        return sum_of(parts)

    def parameter_views(self, matrix: Tensor) -> list[Tensor]:
        """See `Block.parameter_views`."""
        return weight_and_bias_views(self.own_shapes(), matrix)


def padding_of(module: Convolution) -> list[tuple[int, int]]:
    """Return the convolution's padding before and after each spatial dimension: numbers, 'same' or 'valid'."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        # An odd total puts the larger half behind, as the convolution itself does.
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(p), int(p)) for p in module.padding]


def pad(inputs: Tensor, module: Convolution) -> Tensor:
    """Pad `[B, C, *spatial]` as the convolution does, in its padding mode."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    sides = padding_of(module)
    if not any(before or after for before, after in sides):
        return inputs
    # F.pad names the last dimension first.
    return F.pad(inputs, [width for pair in reversed(sides) for width in pair], mode=mode)


def unfold(inputs: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Return the strided view `[B, C, *out, *kernel]` of every patch of `[B, C, *spatial]`; nothing is copied."""
    spatial = inputs.shape[2:]
    steps = inputs.stride()[2:]
    out = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(spatial, kernel, stride, dilation, strict=True)]
    return inputs.as_strided(
        (*inputs.shape[:2], *out, *kernel),
        (
            *inputs.stride()[:2],
            *(step * s for step, s in zip(steps, stride, strict=True)),
            *(step * d for step, d in zip(steps, dilation, strict=True)),
        ),
        inputs.storage_offset(),
    )
