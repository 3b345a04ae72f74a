"""`nn.Linear`: rows are what the layer was given, position by position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from kfac_dist.config.schema import Sharing
from kfac_dist.curvature.blocks.base import KroneckerBlock, batch_first, dense, weight_and_bias_views
from kfac_dist.curvature.factors import Side


class LinearBlock(KroneckerBlock):
    """A: [d_in(+1)]², G: [d_out]²; the gradient matrix is the weight with the bias as its last column."""

    def __init__(self, name: str, module: nn.Module, sharing: Sharing) -> None:
        super().__init__(name, module, sharing)
        self.has_bias = len(self.parameters) > 1
        layer = cast(nn.Linear, module)
        width = layer.in_features + self.has_bias
        self.factors = (dense(Side.A, width), dense(Side.G, layer.out_features))
        self.matrix_shape = (1, layer.out_features, width)

    def input_rows(self, inputs: Tensor, batch_size: int | None) -> Tensor:
        """Return `[1, B, T, d_in]`."""
        return batch_first(inputs, batch_size).unsqueeze(0)

    def output_rows(self, grad: Tensor, batch_size: int | None) -> Tensor:
        """Return `[1, B, T, d_out]`."""
        return batch_first(grad, batch_size).unsqueeze(0)

    def matrix_views(self, tensors: Sequence[Tensor], matrix: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """See `Block.matrix_views`."""
        return weight_and_bias_views(tensors, matrix)
