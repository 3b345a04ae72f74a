"""A small causal transformer over bytes (GPT-2's layout: pre-LayerNorm, learned positions), with an untied head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[batch, tokens, width]` to the same shape."""
        batch, tokens, width = hidden.shape
        split = self.qkv(hidden).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: Tensor = self.projection(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class TransformerBlock(nn.Module):
    """Attention and a four times wider MLP, each behind a LayerNorm and beside a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[batch, tokens, width]` to the same shape."""
        hidden = hidden + self.attention(self.norm1(hidden))
        contracted: Tensor = self.contract(functional.gelu(self.expand(self.norm2(hidden))))
        return hidden + contracted


class ByteGPT(nn.Module):
    """Predicts each next byte from those before it."""

    def __init__(self, layers: int, width: int, heads: int, context: int, vocabulary: int) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._initialize(layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map byte values `[batch, tokens]` to logits `[batch, tokens, vocabulary]`."""
        # Expanded over the batch, so that each sequence's uses of a position count in the embedding's statistics.
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = self.tokens(tokens) + self.positions(positions)
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits

    def _initialize(self, layers: int) -> None:
        """GPT-2's: normal(0.02), and residual branches scaled so that their sum over 2·layers keeps its variance."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith((".projection", ".contract"))
                nn.init.normal_(module.weight, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def byte_gpt(layers: int = 4, width: int = 128, heads: int = 4, context: int = 128, vocabulary: int = 256) -> ByteGPT:
    """Build the model.

    Args:
        layers: Transformer blocks.
        width: Width of the residual stream; a multiple of `heads`.
        heads: Attention heads.
        context: Longest sequence, in bytes.
        vocabulary: Symbols: 256 byte values.

    Raises:
        ValueError: `width` isn't a multiple of `heads`.
    """
    if width % heads:
        raise ValueError(f"width ({width}) must be a multiple of heads ({heads})")
    return ByteGPT(layers, width, heads, context, vocabulary)
