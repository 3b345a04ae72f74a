"""`nn.Linear`, and transformers' `Conv1D`: the same layer with its weight stored input first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from kfac_dist.config.schema import Sharing
from kfac_dist.curvature.blocks.base import KroneckerBlock, dense, weight_and_bias_views
from kfac_dist.curvature.blocks.rows import batch_first
from kfac_dist.curvature.factors import Side


class LinearBlock(KroneckerBlock):
    """A: [d_in(+1)]², G: [d_out]²; the gradient matrix is the weight with the bias as its last column."""

    def __init__(self, name: str, module: nn.Module, sharing: Sharing, *, also: Sequence[nn.Module] = ()) -> None:
        super().__init__(name, module, sharing, also=also)
        self.has_bias = len(self.parameters) > 1
        outputs, inputs = self.shape_of(cast(Tensor, getattr(module, self.parameter_names[0])))
        self.factors = (dense(Side.A, inputs + self.has_bias), dense(Side.G, outputs))
        self.matrix_shape = (1, outputs, inputs + self.has_bias)

    def shape_of(self, weight: Tensor) -> tuple[int, int]:
        """Return `(d_out, d_in)`."""
        return weight.shape[0], weight.shape[1]

    def input_rows(self, inputs: Tensor, batch_size: int | None) -> Tensor:
        """Return `[1, B, T, d_in]`."""
        return batch_first(inputs, batch_size).unsqueeze(0)

    def output_rows(self, grad: Tensor, batch_size: int | None) -> Tensor:
        """Return `[1, B, T, d_out]`."""
        return batch_first(grad, batch_size).unsqueeze(0)

    def parameter_views(self, matrix: Tensor) -> list[Tensor]:
        """See `Block.parameter_views`."""
        return weight_and_bias_views(self.own_shapes(), matrix)


class InputFirstLinearBlock(LinearBlock):
    """`transformers.pytorch_utils.Conv1D`, of GPT and GPT-2: weight `[d_in, d_out]`."""

    def shape_of(self, weight: Tensor) -> tuple[int, int]:
        """Return `(d_out, d_in)`."""
        return weight.shape[1], weight.shape[0]

    def parameter_views(self, matrix: Tensor) -> list[Tensor]:
        """See `Block.parameter_views`."""
        weight, *bias = self.own_shapes()
        turned, *rest = weight_and_bias_views([weight[::-1], *bias], matrix)
        return [turned.mT, *rest]
