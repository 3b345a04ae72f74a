"""An encoder-decoder transformer (Vaswani et al. 2017), with LayerNorm before each branch (pre-norm).

    source ─ embed ─ [ attention · MLP ] × layers ─ norm ─▶ memory
                                                              │
    prefix ─ embed ─ [ causal attention · attention to memory · MLP ] × layers ─ norm ─ head ─▶ logits

Padding, token 0, is no key of any attention, and its positions are zero between branches: it then adds next to nothing
to the inputs' second moments. One table embeds source and prefix, and is the head's weight unless `tied` is off.

A `DecodingCache` keeps keys and values of earlier positions, so that decoding a position costs one position. All
calls go through `forward`: engines that gather weights for a forward pass see nothing but the model being called.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

PAD = 0


@dataclass
class DecodingCache:
    """Keys and values of the positions that were decoded, and of the source.

    Attributes:
        visible: Whether a position of the source is a token, `[batch, 1, 1, positions]`; None before the first call.
        past: By attention module, its keys and values `[batch, heads, positions, width / heads]`.
        length: Positions decoded.
    """

    visible: Tensor | None = None
    past: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    length: int = 0

    def reorder(self, rows: Tensor) -> None:
        """Continue from these rows of the batch, `[batch]`: the prefixes that a beam search continues with."""
        assert self.visible is not None
        self.visible = self.visible[rows]
        self.past = {module: (keys[rows], values[rows]) for module, (keys, values) in self.past.items()}


class Attention(nn.Module):
    """Multi-head attention of positions to those of a memory, which may be themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, width)

    def forward(
        self,
        hidden: Tensor,
        memory: Tensor | None,
        visible: Tensor | None = None,
        *,
        causal: bool = False,
        cache: DecodingCache | None = None,
    ) -> Tensor:
        """Map `[batch, positions, width]` to the same shape.

        Args:
            hidden: Positions that ask.
            memory: Positions that answer, `[batch, memory, width]`; None takes those of the cache alone.
            visible: Whether each is a token, boolean, broadcast to `[batch, heads, positions, memory]`.
            causal: Whether a position sees itself and those before it only.
            cache: Keys and values of earlier calls, to which those of this one are added.
        """
        query = self._split(self.query(hidden))
        past = None if cache is None else cache.past.get(self)
        if memory is None:
            assert past is not None
            key, value = past
        else:
            key, value = (self._split(part) for part in self.key_value(memory).chunk(2, dim=-1))
            if past is not None:
                key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        if cache is not None:
            cache.past[self] = key, value
        # With a cache the only query is the newest position, which sees all others.
        mixed = functional.scaled_dot_product_attention(query, key, value, visible, is_causal=causal and cache is None)
        projected: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return projected

    def _split(self, tensor: Tensor) -> Tensor:
        heads: Tensor = tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads


class MLP(nn.Module):
    """Four times wider inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map `[batch, positions, width]` to the same shape."""
        contracted: Tensor = self.contract(functional.gelu(self.expand(hidden)))
        return contracted


class EncoderBlock(nn.Module):
    """Attention over the source and an MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, tokens: Tensor, visible: Tensor) -> Tensor:
        """Map `[batch, positions, width]` to the same shape; `tokens` is 1 where there is one, 0 at padding."""
        normed = self.norm1(hidden)
        hidden = hidden + tokens * self.dropout(self.attention(normed, normed, visible))
        passed: Tensor = hidden + tokens * self.dropout(self.mlp(self.norm2(hidden)))
        return passed


class DecoderBlock(nn.Module):
    """Causal attention over the prefix, attention to the source's memory, and an MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.cross = nn.LayerNorm(width), Attention(width, heads)
        self.norm3, self.mlp = nn.LayerNorm(width), MLP(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden: Tensor, tokens: Tensor, memory: Tensor | None, visible: Tensor, cache: DecodingCache | None
    ) -> Tensor:
        """Map `[batch, positions, width]` to the same shape."""
        normed = self.norm1(hidden)
        hidden = hidden + tokens * self.dropout(self.attention(normed, normed, causal=True, cache=cache))
        hidden = hidden + tokens * self.dropout(self.cross(self.norm2(hidden), memory, visible, cache=cache))
        passed: Tensor = hidden + tokens * self.dropout(self.mlp(self.norm3(hidden)))
        return passed


class Translator(nn.Module):
    """Predicts each next token of a translation from the source and the tokens before it."""

    def __init__(
        self, layers: int, width: int, heads: int, context: int, vocabulary: int, *, tied: bool, dropout: float
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.source_positions = nn.Embedding(context, width)
        self.target_positions = nn.Embedding(context, width)
        self.encoder = nn.ModuleList(EncoderBlock(width, heads, dropout) for _ in range(layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(DecoderBlock(width, heads, dropout) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith((".projection", ".contract"))
                nn.init.normal_(module.weight, std=width**-0.5 / ((3 * layers) ** 0.5 if residual else 1.0))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.tokens, self.source_positions, self.target_positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, source: Tensor, prefix: Tensor, cache: DecodingCache | None = None) -> Tensor:
        """Return logits `[batch, positions, vocabulary]` of the token that follows each of the prefix's.

        Args:
            source: Tokens to translate, `[batch, source positions]`, 0 at padding.
            prefix: Tokens of the translation, `[batch, positions]`, the language's first. With a cache, the newest of
                them alone, `[batch, 1]`.
            cache: Empty at first; afterwards the source isn't looked at any more.
        """
        memory = None
        if cache is None or cache.visible is None:
            visible = (source != PAD)[:, None, None, :]
            memory = self._encode(source, visible)
            if cache is not None:
                cache.visible = visible
        else:
            visible = cache.visible
        tokens = (prefix != PAD).unsqueeze(-1)
        first = 0 if cache is None else cache.length
        hidden = tokens * self._embed(prefix, self.target_positions, first)
        for block in self.decoder:
            hidden = block(hidden, tokens, memory, visible, cache)
        if cache is not None:
            cache.length += prefix.shape[1]
        logits: Tensor = self.head(self.decoder_norm(hidden))
        return logits

    def _encode(self, source: Tensor, visible: Tensor) -> Tensor:
        tokens = (source != PAD).unsqueeze(-1)
        hidden = tokens * self._embed(source, self.source_positions, 0)
        for block in self.encoder:
            hidden = block(hidden, tokens, visible)
        memory: Tensor = tokens * self.encoder_norm(hidden)
        return memory

    def _embed(self, tokens: Tensor, positions: nn.Module, first: int) -> Tensor:
        # Expanded over the batch, so that each sequence's uses of a position count in the embedding's statistics.
        places = torch.arange(first, first + tokens.shape[1], device=tokens.device).expand_as(tokens)
        embedded: Tensor = self.tokens(tokens) + positions(places)
        return embedded


def translator(
    layers: int = 2,
    width: int = 96,
    heads: int = 4,
    context: int = 32,
    vocabulary: int = 1000,
    tied: bool = True,
    dropout: float = 0.0,
) -> Translator:
    """Build the model.

    Args:
        layers: Blocks of the encoder, and of the decoder.
        width: Width of the residual stream; a multiple of `heads`.
        heads: Attention heads.
        context: Longest source or translation, in tokens.
        vocabulary: Tokens.
        tied: Whether the head's weight is the table that embeds tokens.
        dropout: Share of each branch's outputs that is dropped while training.

    Raises:
        ValueError: `width` isn't a multiple of `heads`.
    """
    if width % heads:
        raise ValueError(f"width ({width}) must be a multiple of heads ({heads})")
    return Translator(layers, width, heads, context, vocabulary, tied=tied, dropout=dropout)
