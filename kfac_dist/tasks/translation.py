"""Translation between the languages of `catalogues`, as sequences of subwords.

    input    (source, prefix)   [pairs, source_length], [pairs, target_length]; prefix: <language> y₀ y₁ … <pad>
    target   y₀ y₁ … <end>, and `IGNORED` where there is only padding

The language to translate into is the decoder's first token, so that one model learns all of them. Subwords are byte
pairs (Sennrich et al. 2016) over UTF-8, learnt from the training pairs: no character is unknown to them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from kfac_dist.errors import DataError
from kfac_dist.tasks.catalogues import Pair, read_pairs
from kfac_dist.tasks.data import DataSplits
from kfac_dist.tasks.models.translator import PAD
from kfac_dist.tasks.scores import IGNORED
from kfac_dist.tasks.translation_score import TranslationScore

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = 1
_SMALLEST_VOCABULARY = 300  # the bytes, and the tokens above them


def translations(
    languages: Sequence[str] = ("de", "fr", "ja"),
    vocabulary: int = 1000,
    source_length: int = 16,
    target_length: int = 20,
    held_out: Literal["test", "dev"] = "test",
    beams: int = 1,
) -> DataSplits:
    """About 9,000 short strings of user interfaces and names, with their translations from English.

    A hash of the source string says whether it is trained on, so that it is, in all languages, or in none. 80 % of the
    strings are trained on whatever `held_out` is, 10 % with `test` alone.

    Args:
        languages: Languages to translate into.
        vocabulary: Subwords, as many as the model has.
        source_length: Longest source, in subwords; longer ones are left out.
        target_length: Longest translation with its end, in subwords.
        held_out: Tenth of the strings that is tested on: `test`, or `dev`, with which to choose settings and by which
            the strings of `test` aren't seen at all.
        beams: Hypotheses that decoding follows; 1 is greedy.

    Raises:
        DataError: A package is missing, or an argument is out of range.
    """
    if vocabulary < _SMALLEST_VOCABULARY or min(source_length, target_length) < 2:
        raise DataError(
            f"data translations: vocabulary {vocabulary}, source_length {source_length}, target_length "
            f"{target_length}; expected at least {_SMALLEST_VOCABULARY}, 2 and 2"
        )
    if held_out not in ("test", "dev"):
        raise DataError(f"data translations: held_out is {held_out!r}; expected test or dev")
    pairs = read_pairs(tuple(languages))
    parts = {part: [pair for pair in pairs if part_of(pair.source) == part] for part in ("train", "dev", "test")}
    tokenizer = learn_subwords(parts["train"], vocabulary, languages)
    trained = parts["train"] + (parts["dev"] if held_out == "test" else [])
    lengths = (source_length, target_length)
    train, test = (encode(part, tokenizer, *lengths) for part in (trained, parts[held_out]))
    return DataSplits(train, test, TranslationScore(tokenizer, END, target_length, beams))


def part_of(source: str) -> Literal["train", "dev", "test"]:
    """Return where a string belongs: the same for strings that differ in case, punctuation and plural s alone."""
    words = [word.removesuffix("s") for word in re.findall(r"\w+", source.casefold())]
    share = int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=4).digest()) / 2**32
    return "test" if share < 0.1 else "dev" if share < 0.2 else "train"


def learn_subwords(pairs: Sequence[Pair], vocabulary: int, languages: Sequence[str]) -> Tokenizer:
    """Learn byte pairs; the same on every rank.

    Raises:
        DataError: The package `tokenizers` is missing.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise DataError("translations need the package tokenizers: pip install 'kfac_dist[language]'") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<end>", *map(language_token, languages)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for pair in pairs for text in (pair.source, pair.target)], trainer)
    return tokenizer


def language_token(language: str) -> str:
    """Return the token that asks for a language."""
    return f"<{language}>"


def encode(pairs: Sequence[Pair], tokenizer: Tokenizer, source_length: int, target_length: int) -> TensorDataset:
    """Return sources, prefixes and targets of the pairs that are short enough."""
    sources = [coded.ids for coded in tokenizer.encode_batch([pair.source for pair in pairs])]
    targets = [coded.ids for coded in tokenizer.encode_batch([pair.target for pair in pairs])]
    starts = [tokenizer.token_to_id(language_token(pair.language)) for pair in pairs]
    kept = [
        (source, [start, *target], [*target, END])
        for source, target, start in zip(sources, targets, starts, strict=True)
        if len(source) <= source_length and len(target) < target_length
    ]
    columns = list(zip(*kept, strict=True)) or [(), (), ()]
    return TensorDataset(
        _padded(columns[0], source_length, PAD),
        _padded(columns[1], target_length, PAD),
        _padded(columns[2], target_length, IGNORED),
    )


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    padded = torch.full((len(rows), length), value)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return padded
