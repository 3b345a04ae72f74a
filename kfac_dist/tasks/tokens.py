"""Sequences of tokens for language models at scale: out of a file that isn't read into memory, or drawn at random.

next token    input t₀ … tₙ₋₁, target t₁ … tₙ
masked        some tokens are chosen: they are the target, and `IGNORED` elsewhere. The input has the mask in place of
              each; or, where the vocabulary is told, as BERT does (Devlin et al. 2019 §3.1), of 80 % of them, any token
              in place of 10 %, and 10 % as they were
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from kfac_dist.errors import DataError
from kfac_dist.tasks.data import DataSplits, byte_text
from kfac_dist.tasks.scores import IGNORED as IGNORED
from kfac_dist.tasks.scores import MaskedAccuracy

# The token after all bytes, and the treatment of selected tokens: the rest is replaced by random ones.
BYTES = 256
_MASKED, _KEPT = 0.8, 0.1


class TokenSequences(Dataset[tuple[Tensor, Tensor]]):
    """Consecutive sequences of a long text.

    Args:
        tokens: The text, `[length]`; a memory-mapped file will do.
        context: Tokens of a sequence.
        mask: The token that replaces masked ones; None predicts each next token.
        masked: Share of masked tokens.
        vocabulary: Tokens to draw from in place of a chosen one; None has the mask in place of each.
    """

    def __init__(
        self,
        tokens: NDArray[np.unsignedinteger],
        context: int,
        mask: int | None = None,
        masked: float = 0.15,
        vocabulary: int | None = None,
    ) -> None:
        self.tokens = tokens
        self.context = context
        self.mask = mask
        self.masked = masked
        self.vocabulary = vocabulary

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a sequence and its targets, both `[context]`; a sequence is masked the same way every time."""
        start = index * self.context
        values = torch.from_numpy(self.tokens[start : start + self.context + 1].astype(np.int64))
        if self.mask is None:
            return values[:-1], values[1:]
        inputs = values[:-1]
        return mask_tokens(inputs, self.mask, self.masked, self.vocabulary, torch.Generator().manual_seed(index))


def mask_tokens(
    tokens: Tensor, mask: int, masked: float, vocabulary: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a masked language model, both of the tokens' shape.

    Args:
        tokens: A text.
        mask: The token that replaces.
        masked: Share of tokens that are chosen.
        vocabulary: Tokens to draw from; None replaces every chosen token by the mask.
        generator: Draws.
    """
    chosen = torch.rand(tokens.shape, generator=generator) < masked
    targets = tokens.masked_fill(~chosen, IGNORED)
    if vocabulary is None:
        return tokens.masked_fill(chosen, mask), targets
    fate = torch.rand(tokens.shape, generator=generator)
    drawn = torch.randint(vocabulary, tokens.shape, generator=generator)
    inputs = tokens.masked_fill(chosen & (fate < _MASKED), mask)
    return torch.where(chosen & (fate >= _MASKED + _KEPT), drawn, inputs), targets


def masked_text(context: int = 128, masked: float = 0.15, copies: int = 4, test_fraction: float = 0.1) -> DataSplits:
    """The help topics of the running CPython, byte by byte, with bytes to guess: 257 tokens, of which 256 is the mask.

    Args:
        context: Length of a sequence, in bytes.
        masked: Share of the bytes that are chosen; of them 80 % are masked, 10 % any byte, 10 % as they were.
        copies: Copies of each sequence in an epoch, each with other bytes selected.
        test_fraction: Share of the text, at its end, to test on.

    Raises:
        DataError: An argument is out of range.
    """
    if copies < 1 or not 0 < masked < 1:
        raise DataError(f"data masked_text: copies {copies}, masked {masked}; expected at least 1, and 0 < masked < 1")
    text = byte_text(context, test_fraction)

    def part(dataset: Dataset[Any], copies: int, seed: int) -> TensorDataset:
        assert isinstance(dataset, TensorDataset)
        sequences = dataset.tensors[0].repeat(copies, 1)
        return TensorDataset(*mask_tokens(sequences, BYTES, masked, BYTES, torch.Generator().manual_seed(seed)))

    return DataSplits(part(text.train, copies, 0), part(text.test, 1, 1), MaskedAccuracy())


def token_file(
    path: str, context: int, mask: int | None = None, test_fraction: float = 0.001, vocabulary: int | None = None
) -> DataSplits:
    """Read a file of tokens, each an unsigned 16-bit number; every rank maps it and reads what it needs.

    Args:
        path: The file, such as the `.bin` files that GPT training codes prepare.
        context: Tokens of a sequence.
        mask: The token that replaces masked ones; left out, each next token is predicted.
        test_fraction: Share of the text, at its end, to test on.
        vocabulary: With it, 80 % of the chosen tokens are masked, 10 % are any token of so many, 10 % as they were.

    Raises:
        DataError: The file can't be read, or is too short.
    """
    try:
        tokens: NDArray[np.unsignedinteger] = np.memmap(Path(path), dtype=np.uint16, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"data token_file: {path}: {error}") from error
    return _splits(tokens, context, mask, test_fraction, vocabulary)


def random_tokens(
    context: int, vocabulary: int, sequences: int = 1000, mask: int | None = None, test_fraction: float = 0.1
) -> DataSplits:
    """Draw tokens, with which to measure speed and memory: nothing can be learned from them.

    Args:
        context: Tokens of a sequence.
        vocabulary: Tokens to draw from, at most 65,536.
        sequences: Their total number.
        mask: The token that replaces masked ones; left out, each next token is predicted.
        test_fraction: Share of them to test on.
    """
    tokens = np.random.default_rng(0).integers(vocabulary, size=sequences * context + 1, dtype=np.uint16)
    return _splits(tokens, context, mask, test_fraction)


def _splits(
    tokens: NDArray[np.unsignedinteger],
    context: int,
    mask: int | None,
    test_fraction: float,
    vocabulary: int | None = None,
) -> DataSplits:
    cut = round((len(tokens) - 1) // context * (1 - test_fraction)) * context
    if not 0 < cut < len(tokens) - context:
        raise DataError(
            f"{len(tokens)} tokens are too few for sequences of {context} tokens of which {test_fraction:g} are tested"
        )
    # A sequence's last target is the first token of the next one.
    train, test = (
        TokenSequences(part, context, mask, vocabulary=vocabulary) for part in (tokens[: cut + 1], tokens[cut:])
    )
    return DataSplits(train, test, None if mask is None else MaskedAccuracy())
