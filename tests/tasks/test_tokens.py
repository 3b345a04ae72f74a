"""Sequences of tokens: nothing is lost at the seams, and masks are the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kfac_dist.errors import DataError
from kfac_dist.tasks.data import byte_text
from kfac_dist.tasks.models.bert import bert
from kfac_dist.tasks.scores import MaskedAccuracy
from kfac_dist.tasks.tokens import BYTES, IGNORED, masked_text, random_tokens, token_file


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


def test_chosen_bytes_are_masked_replaced_or_kept_as_bert_does() -> None:
    splits = masked_text(context=100, copies=2)
    inputs, targets = splits.train.tensors  # type: ignore[attr-defined]
    plain, _ = byte_text(context=100).train.tensors  # type: ignore[attr-defined]
    plain = plain.repeat(2, 1)
    chosen = targets != IGNORED
    assert chosen.float().mean() == pytest.approx(0.15, abs=0.003)
    assert torch.equal(targets[chosen], plain[chosen])
    assert torch.equal(inputs[~chosen], plain[~chosen])
    masked = inputs[chosen] == BYTES
    kept = inputs[chosen] == targets[chosen]
    assert masked.float().mean() == pytest.approx(0.8, abs=0.01)
    assert kept.float().mean() == pytest.approx(0.1 + 0.1 / 256, abs=0.01)
    drawn = inputs[chosen][~masked & ~kept]
    assert torch.bincount(drawn, minlength=256).min() > 0, "any byte"
    assert int(drawn.max()) < BYTES
    half = len(plain) // 2
    assert not torch.equal(chosen[:half], chosen[half:]), "every copy has masks of its own"
    again = masked_text(context=100, copies=2)
    assert torch.equal(again.train.tensors[0], inputs)  # type: ignore[attr-defined]
    assert isinstance(splits.score, MaskedAccuracy)


def test_a_file_may_be_masked_as_bert_does(tmp_path: Path) -> None:
    np.random.default_rng(0).integers(50, size=4001, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    splits = token_file(str(tmp_path / "tokens.bin"), context=2000, mask=60, test_fraction=0.5, vocabulary=50)
    inputs, targets = splits.train[0]
    chosen = targets != IGNORED
    assert 0.6 < (inputs[chosen] == 60).float().mean() < 0.95
    assert 0 < (inputs[chosen] == targets[chosen]).float().mean() < 0.25


def test_masked_accuracy_counts_masked_tokens_alone() -> None:
    outputs = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3], [1, 1, 1]]), 5).float()
    targets = torch.tensor([[1, IGNORED, 2], [IGNORED, 1, IGNORED]])
    score = MaskedAccuracy()
    found = score.judge(torch.nn.Identity(), targets, targets, outputs)
    assert found == [(2, 1), (1, 1)]
    assert score.summarize(found) == {"masked accuracy": 2 / 3}


@pytest.mark.parametrize("arguments", [{"copies": 0}, {"masked": 1.0}])
def test_bad_masks_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(DataError, match=r"data masked_text: copies .*expected at least 1, and 0 < masked < 1"):
        masked_text(**arguments)  # type: ignore[arg-type]


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
    tied = bert(layers=1, width=8, heads=2, context=6, vocabulary=11, tied=True)
    assert tied.head.weight is tied.tokens.weight
    with pytest.raises(ValueError, match=r"width \(8\) must be a multiple of heads \(3\)"):
        bert(width=8, heads=3)
