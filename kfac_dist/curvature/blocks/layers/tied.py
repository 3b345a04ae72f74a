"""An embedding and the head that is tied to it: one weight `W [V, d]`, one block.

The embedding adds the Fisher of gradients `e_v ĝᵀ` (v a token, ĝ at the embedding's output), the head that of `ĝ hᵀ`
(ĝ over the vocabulary, h the head's input). Their sum F is no Kronecker product; its two partial traces are exact sums:

    over the width        L_v = (1/n) Σ_t [token_t = v] ‖ĝ_t‖²  +  (1/n) Σ_t ĝ_t(v)² ‖h_t‖²      diagonal, [V]
    over the vocabulary   R   = (1/n) Σ_t ĝ_t ĝ_tᵀ              +  (1/n) Σ_t ‖ĝ_t‖² h_t h_tᵀ      [d]²

and `F ≈ L ⊗ R / tr F` with tr F = tr L = tr R: the product with F's own partial traces (positions and the two roles
taken as independent, L's diagonal kept). L and R are linear in the data, so ranks add theirs up as for any factor; the
division by the trace over all ranks comes with the refresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from kfac_dist.config.schema import Sharing
from kfac_dist.curvature.blocks.base import Block, StatisticsSink, as_autocast, dense
from kfac_dist.curvature.blocks.layer_calls import LayerCall
from kfac_dist.curvature.blocks.layers.embedding import project_lookup
from kfac_dist.curvature.blocks.projection import Signs
from kfac_dist.curvature.blocks.rows import MicroBatch, batch_first, unscale
from kfac_dist.curvature.factors import FactorKind, FactorSpec, Side
from kfac_dist.precision import widened

# Values of a temporary: the square of output gradients over a vocabulary is as large as the logits themselves.
_CHUNK = 2**24


class TiedBlock(Block):
    """A: L, a diagonal of length V; G: R, [d]². Always in the expand setting, as `EmbeddingBlock` is."""

    partial_traces = True

    def __init__(self, name: str, module: nn.Module, sharing: Sharing, *, also: Sequence[nn.Module] = ()) -> None:
        super().__init__(name, module, Sharing.EXPAND, also=also)
        # A bias belongs to the head alone.
        self.parameters = dict(list(self.parameters.items())[:1])
        vocabulary, width = cast(Tensor, module.weight).shape
        self.factors = (
            FactorSpec(Side.A, vocabulary, kind=FactorKind.DIAGONAL, traced=True),
            dense(Side.G, width),
        )
        self.matrix_shape = (1, width, vocabulary)

    def kept(self, inputs: Tensor) -> Tensor:
        """See `Block.kept`."""
        return as_autocast(inputs)

    def unbatched(self, inputs: Tensor) -> bool:
        """See `Block.unbatched`: a vector of tokens is a batch."""
        return inputs.ndim < (2 if inputs.is_floating_point() else 1)

    def measure(
        self, calls: Sequence[LayerCall], batch: MicroBatch, sink: StatisticsSink, sides: frozenset[Side]
    ) -> None:
        """Add both partial traces; see `Block.measure`. Either needs output gradients, so `sides` doesn't matter."""
        kept = total = 0
        for call in calls:
            if call.grad is None:
                continue
            grads = batch_first(call.grad, batch.batch_size)
            rows = slice(batch.first_row(grads.shape[1]), None, batch.stride)
            sampled = grads.flatten(0, 1)[rows]
            scaled, factor = unscale(widened(sampled), batch)
            if isinstance(call.source, nn.Embedding):
                tokens = batch_first(call.inputs.unsqueeze(-1), batch.batch_size).flatten()[rows]
                self._add_lookup(call.source, tokens, scaled, factor**2, sink)
            else:
                inputs = batch_first(call.inputs, batch.batch_size).flatten(0, 1)[rows]
                self._add_head(widened(inputs), scaled, factor**2, sink)
            kept, total = kept + sampled.shape[0], total + grads.shape[0] * grads.shape[1]
        if total:
            for side in (Side.A, Side.G):
                sink.add_count(self.name, side, batch.terms * (kept / total))

    def _add_lookup(
        self, module: nn.Embedding, tokens: Tensor, grads: Tensor, scale: float, sink: StatisticsSink
    ) -> None:
        if module.padding_idx is not None:  # the padding token's row gets no gradient
            grads = grads * (tokens != module.padding_idx)[:, None]
        weight = grads.new_zeros(1, module.num_embeddings)
        weight[0].index_add_(0, tokens, grads.square().sum(-1), alpha=scale)
        sink.add_values(self.name, Side.A, weight)
        sink.add_rows(self.name, Side.G, grads.unsqueeze(0), scale=scale, ones=False)

    def _add_head(self, inputs: Tensor, grads: Tensor, scale: float, sink: StatisticsSink) -> None:
        lengths = inputs.square().sum(-1) * scale
        weight = grads.new_zeros(1, grads.shape[1])
        step = max(1, _CHUNK // max(1, grads.shape[1]))
        for first in range(0, len(grads), step):
            weight[0].addmv_(grads[first : first + step].square().mT, lengths[first : first + step])
        sink.add_values(self.name, Side.A, weight)
        scaled = inputs * torch.linalg.vector_norm(grads, dim=-1, keepdim=True)
        sink.add_rows(self.name, Side.G, scaled.unsqueeze(0), scale=scale, ones=False)

    def project(self, call: LayerCall, batch_size: int | None, signs: Signs) -> tuple[Tensor, Tensor]:
        """See `Block.project`: the head's rows are the vocabulary's, which the matrix has as columns."""
        assert call.grad is not None
        if isinstance(call.source, nn.Embedding):
            return project_lookup(call, call.grad, signs)
        inputs, grads = (t.reshape(-1, t.shape[-1]) for t in (call.inputs, call.grad))
        return signs.project_rows(inputs[None], grads[None], ones=False)

    def parameter_views(self, matrix: Tensor) -> list[Tensor]:
        """See `Block.parameter_views`: width first."""
        return [matrix[0].mT]
