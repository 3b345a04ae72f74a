"""Sequences of tokens: nothing is lost at the seams, and masks are the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kfac_dist.errors import DataError
from kfac_dist.tasks.bert import bert
from kfac_dist.tasks.tokens import IGNORED, random_tokens, token_file


def test_a_file_is_cut_into_sequences_and_the_next_tokens(tmp_path: Path) -> None:
    np.arange(41, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    splits = token_file(str(tmp_path / "tokens.bin"), context=4, test_fraction=0.2)
    train, test = ([dataset[i] for i in range(len(dataset))] for dataset in (splits.train, splits.test))  # type: ignore[arg-type]
    assert (len(train), len(test)) == (8, 2)
    inputs, targets = (torch.cat(parts) for parts in zip(*train, *test, strict=True))
    assert inputs.tolist() == list(range(40))
    assert targets.tolist() == list(range(1, 41))


def test_masked_tokens_are_the_targets() -> None:
    splits = random_tokens(context=200, vocabulary=50, sequences=10, mask=60)
    inputs, targets = splits.train[3]
    hidden = inputs == 60
    assert 10 < int(hidden.sum()) < 60
    assert torch.equal(targets != IGNORED, hidden)
    assert int(targets[hidden].max()) < 50
    assert torch.equal(splits.train[3][0], inputs)


def test_a_missing_or_short_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data token_file: .*none\.bin"):
        token_file(str(tmp_path / "none.bin"), context=4)
    np.arange(11, dtype=np.uint16).tofile(tmp_path / "short.bin")
    with pytest.raises(DataError, match=r"11 tokens are too few for sequences of 8 tokens of which 0\.1 are tested"):
        token_file(str(tmp_path / "short.bin"), context=8, test_fraction=0.1)


def test_bert_sees_both_sides() -> None:
    torch.manual_seed(0)
    model = bert(layers=1, width=8, heads=2, context=6, vocabulary=11).eval()
    tokens = torch.arange(6).view(1, 6)
    logits = model(tokens)
    assert logits.shape == (1, 6, 11)
    changed = model(tokens.masked_fill(tokens == 5, 9))
    assert not torch.allclose(logits[0, 0], changed[0, 0]), "the first position sees the last"
    with pytest.raises(ValueError, match=r"width \(8\) must be a multiple of heads \(3\)"):
        bert(width=8, heads=3)
