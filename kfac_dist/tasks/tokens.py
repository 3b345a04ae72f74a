"""Sequences of tokens for language models at scale: out of a file that isn't read into memory, or drawn at random.

next token    input t₀ … tₙ₋₁, target t₁ … tₙ
masked        input with some tokens replaced by the mask, target those tokens, and `IGNORED` elsewhere
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from kfac_dist.errors import DataError
from kfac_dist.tasks.data import DataSplits

IGNORED = -100


class TokenSequences(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive sequences of a long text.

    Args:
        tokens: The text, `[length]`; a memory-mapped file will do.
        context: Tokens of a sequence.
        mask: The token that replaces masked ones; None predicts each next token.
        masked: Share of masked tokens.
    """

    def __init__(
        self, tokens: NDArray[np.unsignedinteger], context: int, mask: int | None = None, masked: float = 0.15
    ) -> None:
        self.tokens = tokens
        self.context = context
        self.mask = mask
        self.masked = masked

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a sequence and its targets, both `[context]`; a sequence is masked the same way every time."""
        start = index * self.context
        values = torch.from_numpy(self.tokens[start : start + self.context + 1].astype(np.int64))
        if self.mask is None:
            return values[:-1], values[1:]
        inputs = values[:-1]
        chosen = torch.rand(self.context, generator=torch.Generator().manual_seed(index)) < self.masked
        return inputs.masked_fill(chosen, self.mask), inputs.masked_fill(~chosen, IGNORED)


def token_file(path: str, context: int, mask: int | None = None, test_fraction: float = 0.001) -> DataSplits:
    """Read a file of tokens, each an unsigned 16-bit number; every rank maps it and reads what it needs.

    Args:
        path: The file, such as the `.bin` files that GPT training codes prepare.
        context: Tokens of a sequence.
        mask: The token that replaces masked ones; left out, each next token is predicted.
        test_fraction: Share of the text, at its end, to test on.

    Raises:
        DataError: The file can't be read, or is too short.
    """
    try:
        tokens: NDArray[np.unsignedinteger] = np.memmap(Path(path), dtype=np.uint16, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"data token_file: {path}: {error}") from error
    return _splits(tokens, context, mask, test_fraction)


def random_tokens(
    context: int, vocabulary: int, sequences: int = 1000, mask: int | None = None, test_fraction: float = 0.1
) -> DataSplits:
    """Draw tokens, with which to measure speed and memory: nothing can be learned from them.

    Args:
        context: Tokens of a sequence.
        vocabulary: Tokens to draw from, at most 65,536.
        sequences: How many, together.
        mask: The token that replaces masked ones; left out, each next token is predicted.
        test_fraction: Share of them to test on.
    """
    tokens = np.random.default_rng(0).integers(vocabulary, size=sequences * context + 1, dtype=np.uint16)
    return _splits(tokens, context, mask, test_fraction)


def _splits(tokens: NDArray[np.unsignedinteger], context: int, mask: int | None, test_fraction: float) -> DataSplits:
    cut = round((len(tokens) - 1) // context * (1 - test_fraction)) * context
    if not 0 < cut < len(tokens) - context:
        raise DataError(
            f"{len(tokens)} tokens are too few for sequences of {context} tokens of which {test_fraction:g} are tested"
        )
    # A sequence's last target is the first token of the next one.
    return DataSplits(TokenSequences(tokens[: cut + 1], context, mask), TokenSequences(tokens[cut:], context, mask))
