"""`nn.ConvTranspose1d/2d/3d`: an ordinary convolution of the input with zeros between its pixels.

    input            a b c
    zeros between    a 0 b 0 c            stride 2
    zeros around   0 a 0 b 0 c 0          dilation·(kernel − 1) − padding; output_padding more behind
    patches        under the flipped kernel, so that their columns match the weight as it is stored

So A = [c_in/groups · kernel (+1)]² over output positions and G = [c_out/groups]², as in KFC (Grosse & Martens 2016).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist.curvature.blocks.layer_calls import LayerCall
from kfac_dist.curvature.blocks.layers.convolution import ConvolutionBlock, unfold
from kfac_dist.curvature.blocks.rows import fold_samples

TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class TransposedConvolutionBlock(ConvolutionBlock):
    """A and G as of a convolution; the weight is stored input first, `[c_in, c_out/groups, *kernel]`."""

    def use_rows(self, call: LayerCall, batch_size: int | None) -> Tensor:
        """Return the patches `[groups, B, T, c_in/groups · kernel]`; T is the output's, which a call may choose."""
        module = cast(TransposedConvolution, self.module)
        inputs = call.inputs.unsqueeze(0) if call.inputs.ndim == self._spatial + 1 else call.inputs
        spread = _spread(inputs, module.stride)
        around: list[int] = []
        for size, out, kernel, dilation, padding in zip(
            spread.shape[2:],
            call.shape[-self._spatial :],
            module.kernel_size,
            module.dilation,
            cast(tuple[int, ...], module.padding),
            strict=True,
        ):
            reach = dilation * (kernel - 1)
            before = reach - padding
            around = [before, out + reach - size - before, *around]  # F.pad names the last dimension first
        patches = unfold(F.pad(spread, around), module.kernel_size, (1,) * self._spatial, module.dilation)
        patches = patches.flip(tuple(range(2 + self._spatial, 2 + 2 * self._spatial)))
        return fold_samples(self._rows_of(patches), batch_size)

    def parameter_views(self, matrix: Tensor) -> list[Tensor]:
        """See `Block.parameter_views`."""
        shapes = self.own_shapes()
        c_in, _, *kernel = shapes[0]
        fan_in = c_in // self.groups
        weight = matrix[:, :, : fan_in * math.prod(kernel)].unflatten(2, (fan_in, *kernel))
        turned = weight.transpose(1, 2)  # [groups, c_in/groups, c_out/groups, *kernel]
        bias = matrix.view(-1, matrix.shape[-1])[:, -1]
        return [turned if self.groups > 1 else turned[0], bias][: len(shapes)]

    def _correlates(self, images: Tensor) -> bool:
        """Never: the shifted images are mostly zeros."""
        return False


def _spread(inputs: Tensor, stride: Sequence[int]) -> Tensor:
    """Return `[B, C, *spatial]` with `stride − 1` zeros between neighbours."""
    if math.prod(stride) == 1:
        return inputs
    sizes = [(size - 1) * step + 1 for size, step in zip(inputs.shape[2:], stride, strict=True)]
    spread = inputs.new_zeros(*inputs.shape[:2], *sizes)
    view = spread
    for dim, step in enumerate(stride, start=2):
        view = view[(slice(None),) * dim + (slice(None, None, step),)]
    view.copy_(inputs)
    return spread
