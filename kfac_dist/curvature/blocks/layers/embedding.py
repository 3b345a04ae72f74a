"""`nn.Embedding`: a linear layer on one-hot rows, so that A is the diagonal of token frequencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from kfac_dist.config.schema import Sharing
from kfac_dist.curvature.blocks.base import Block, StatisticsSink, dense
from kfac_dist.curvature.blocks.layer_calls import LayerCall
from kfac_dist.curvature.blocks.projection import Signs
from kfac_dist.curvature.blocks.rows import MicroBatch, batch_first, unscale
from kfac_dist.curvature.class_conditional import Members
from kfac_dist.curvature.factors import FactorKind, FactorSpec, Side


class EmbeddingBlock(Block):
    """A: diagonal of length `num_embeddings`, G: [embedding_dim]².

    Always in the expand setting: one-hot rows are orthogonal, a sample's mean of them is not, so that only expand has a
    diagonal A. The padding token has no gradient and therefore no frequency.
    """

    by_class = True

    def __init__(self, name: str, module: nn.Module, sharing: Sharing, *, also: Sequence[nn.Module] = ()) -> None:
        super().__init__(name, module, Sharing.EXPAND, also=also)
        layer = cast(nn.Embedding, module)
        self.factors = (
            FactorSpec(Side.A, layer.num_embeddings, kind=FactorKind.DIAGONAL),
            dense(Side.G, layer.embedding_dim),
        )
        self.matrix_shape = (1, layer.embedding_dim, layer.num_embeddings)

    def unbatched(self, inputs: Tensor) -> bool:
        """See `Block.unbatched`: a vector of tokens is a batch."""
        return not inputs.ndim

    def measure(
        self, calls: Sequence[LayerCall], batch: MicroBatch, sink: StatisticsSink, sides: frozenset[Side]
    ) -> None:
        """Add token frequencies and output gradients; see `Block.measure`."""
        kept = total = 0
        by_class: list[Tensor] = []
        for call in calls:
            tokens = batch_first(call.inputs.unsqueeze(-1), batch.batch_size)
            rows = slice(batch.first_row(tokens.shape[1]), None, batch.stride)
            if Side.A in sides:
                drawn, members = tokens.flatten()[rows], batch.members(self.name, tokens.numel(), inputs=True)
                sink.add_values(self.name, Side.A, _frequencies(drawn, cast(nn.Embedding, call.source), members))
                counts = None if members is None else members.counts(drawn.device)
                sink.add_count(self.name, Side.A, float(drawn.shape[0]), counts)
            if Side.G in sides and call.grad is not None:
                grads = batch_first(call.grad, batch.batch_size)
                sampled = grads.flatten(0, 1)[rows]
                scaled, factor = unscale(sampled, batch)
                members = batch.members(self.name, grads.shape[0] * grads.shape[1], inputs=False)
                sink.add_rows(self.name, Side.G, scaled.unsqueeze(0), scale=factor**2, ones=False, members=members)
                by_class += [] if members is None else [members.counts(grads.device)]
                kept, total = kept + sampled.shape[0], total + grads.shape[0] * grads.shape[1]
        if Side.G in sides and total:
            counts = torch.stack(by_class).sum(0) * (batch.terms / total) if by_class else None
            sink.add_count(self.name, Side.G, batch.terms * (kept / total), counts)

    def project(self, call: LayerCall, batch_size: int | None, signs: Signs) -> tuple[Tensor, Tensor]:
        """See `Block.project`."""
        assert call.grad is not None
        return project_lookup(call, call.grad, signs)

    def parameter_views(self, matrix: Tensor) -> list[Tensor]:
        """See `Block.parameter_views`: the table is stored input first."""
        return [matrix[0].mT]


def project_lookup(call: LayerCall, grad: Tensor, signs: Signs) -> tuple[Tensor, Tensor]:
    """Project the gradient that one call of an embedding gives its table."""
    padding = cast(nn.Embedding, call.source).padding_idx
    tokens, grads = call.inputs.flatten(), grad.reshape(-1, grad.shape[-1])  # of one token: [d]
    if padding is not None:
        grads = grads * (tokens != padding)[:, None]
    return signs.project_lookup(grads, tokens)


def _frequencies(tokens: Tensor, module: nn.Embedding, members: Members | None) -> Tensor:
    if members is not None:
        counts = members.frequencies(tokens, module.num_embeddings)
    else:
        counts = torch.zeros(1, module.num_embeddings, device=tokens.device, dtype=torch.float32)
        counts[0].index_add_(0, tokens, torch.ones_like(tokens, dtype=counts.dtype))
    if module.padding_idx is not None:
        counts[:, module.padding_idx] = 0
    return counts
