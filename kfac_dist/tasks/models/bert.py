"""A masked language model in BERT's layout (Devlin et al. 2019): bidirectional, LayerNorm after each branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class EncoderLayer(nn.Module):
    """Attention over all positions and a four times wider MLP, each with a LayerNorm behind its residual sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[batch, tokens, width]` to the same shape."""
        batch, tokens, width = hidden.shape
        split = self.qkv(hidden).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        attended = self.projection(mixed.transpose(1, 2).reshape(batch, tokens, width))
        hidden = self.norm1(hidden + attended)
        normed: Tensor = self.norm2(hidden + self.contract(functional.gelu(self.expand(hidden))))
        return normed


class Bert(nn.Module):
    """Predicts tokens that were masked from those around them."""

    def __init__(self, layers: int, width: int, heads: int, context: int, vocabulary: int, *, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))
        self.transform = nn.Linear(width, width)
        self.transform_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        if tied:
            self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[batch, positions]` to logits `[batch, positions, vocabulary]`."""
        # Expanded over the batch, so that each sequence's uses of a position count in the embedding's statistics.
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = self.norm(self.tokens(tokens) + self.positions(positions))
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(self.transform_norm(functional.gelu(self.transform(hidden))))
        return logits


def bert(
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    context: int = 128,
    vocabulary: int = 30522,
    tied: bool = False,
) -> Bert:
    """Build the model.

    Args:
        layers: Encoder layers.
        width: Width of the residual stream; a multiple of `heads`.
        heads: Attention heads.
        context: Longest sequence.
        vocabulary: Tokens.
        tied: Whether the head's weight is the table that embeds tokens.

    Raises:
        ValueError: `width` isn't a multiple of `heads`.
    """
    if width % heads:
        raise ValueError(f"width ({width}) must be a multiple of heads ({heads})")
    return Bert(layers, width, heads, context, vocabulary, tied=tied)
