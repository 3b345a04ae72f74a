"""The parallel corpus as subwords: split by source, nothing lost on the way, and scored as sacreBLEU does."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist.errors import DataError
from kfac_dist.tasks.catalogues import Pair, read_pairs
from kfac_dist.tasks.data import DataSplits
from kfac_dist.tasks.models.translator import PAD
from kfac_dist.tasks.scores import IGNORED
from kfac_dist.tasks.translation import END, encode, learn_subwords, part_of, translations
from kfac_dist.tasks.translation_score import TranslationScore

for package in ("django", "babel", "tokenizers", "sacrebleu"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'kfac_dist[language]'")

LANGUAGES = ("de", "fr", "ja")


@pytest.fixture(scope="module")
def splits() -> dict[str, DataSplits]:
    return {held_out: translations(held_out=held_out) for held_out in ("test", "dev")}  # type: ignore[arg-type]


def texts(dataset: Any, score: TranslationScore, column: int = 0) -> list[str]:
    return [score.tokenizer.decode(row) for row in dataset.tensors[column].tolist()]


def test_no_source_is_trained_on_and_held_out(splits: dict[str, DataSplits]) -> None:
    score = splits["test"].score
    assert isinstance(score, TranslationScore)
    train, test, short_train, dev = (
        set(texts(dataset, score))
        for dataset in (splits["test"].train, splits["test"].test, splits["dev"].train, splits["dev"].test)
    )
    assert not train & test
    assert not short_train & dev
    assert not short_train & test
    assert not dev & test
    assert train == short_train | dev
    assert 0.08 < len(test) / len(train | test) < 0.12
    assert {part_of(source) for source in test} == {"test"}


def test_strings_that_hardly_differ_stay_together() -> None:
    for one, other in [("Add %s", "add %s"), ("{0} kilometer per hour", "{0} kilometers per hour"), ("Save", "Save…")]:
        assert part_of(one) == part_of(other)


def test_what_is_encoded_can_be_read_again(splits: dict[str, DataSplits]) -> None:
    score = splits["test"].score
    assert isinstance(score, TranslationScore)
    known = {(pair.source, pair.language): pair.target for pair in read_pairs(LANGUAGES)}
    source, prefix, target = splits["test"].test.tensors  # type: ignore[attr-defined]
    assert (source.shape[1], prefix.shape[1], target.shape[1]) == (16, 20, 20)
    found = score.beside(target.masked_fill(target == IGNORED, PAD), prefix, target)
    for text, (language, translated, reference) in zip(texts(splits["test"].test, score), found, strict=True):
        assert translated == reference == known[text, language]
    shifted = prefix[:, 1:].masked_fill(prefix[:, 1:] == PAD, IGNORED)
    ends = target == END
    assert (ends.sum(1) == 1).all()
    assert torch.equal(shifted, target[:, :-1].masked_fill(ends[:, :-1], IGNORED)), "the prefix is the target, shifted"


def test_subwords_are_the_same_in_every_process_and_know_every_character() -> None:
    pairs = [pair for pair in read_pairs(("ja",)) if part_of(pair.source) == "train"][:400]
    one, other = (learn_subwords(pairs, 400, ["ja"]) for _ in range(2))
    assert one.to_str() == other.to_str()
    assert one.decode(one.encode("鰯の{0}🙂").ids) == "鰯の{0}🙂"
    [tensor, *_] = encode([Pair("x" * 30, "ja", "短い")], one, 4, 9).tensors
    assert len(tensor) == 0, "what is too long is left out"


class Repeats(nn.Module):
    """A translator that says the source again: what follows the n-th token of the prefix is the source's n-th."""

    def forward(self, source: Tensor, prefix: Tensor, cache: Any) -> Tensor:
        place, cache.length = cache.length, cache.length + 1
        tokens = source[:, place] if place < source.shape[1] else torch.full_like(source[:, 0], PAD)
        tokens = tokens.masked_fill(tokens == PAD, END)
        return nn.functional.one_hot(tokens, 1000).unsqueeze(1) * 50.0


def test_chrf_is_what_sacrebleu_says(splits: dict[str, DataSplits]) -> None:
    score = splits["test"].score
    assert isinstance(score, TranslationScore)
    source, prefix, target = splits["test"].test.tensors  # type: ignore[attr-defined]
    findings = score.judge(Repeats(), (source, prefix), target, torch.empty(0))
    assert [text for _, text, _ in findings] == texts(splits["test"].test, score)
    figures = score.summarize(findings)
    chrf = pytest.importorskip("sacrebleu.metrics").CHRF()
    for language in LANGUAGES:
        found, references = zip(*[(t, r) for key, t, r in findings if key == language], strict=True)
        expected = chrf.corpus_score(list(found), [list(references)]).score
        assert figures[f"chrF {language}"] == pytest.approx(expected)
    assert figures["chrF"] == pytest.approx(sum(figures[f"chrF {key}"] for key in LANGUAGES) / 3)
    assert figures["chrF de"] > figures["chrF ja"], "names are often the same in German, never in Japanese"
    right = score.summarize(score.beside(target.masked_fill(target == IGNORED, PAD), prefix, target))
    assert right["chrF"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": 100}, "vocabulary 100, .*expected at least 300"),
        ({"target_length": 1}, "target_length 1; expected at least"),
        ({"held_out": "train"}, "held_out is 'train'; expected test or dev"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        translations(**arguments)


@pytest.mark.parametrize("package", ["tokenizers", "sacrebleu.metrics.chrf"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{package.split('.')[0]}: pip install 'kfac_dist\[language\]'"):
        translations(vocabulary=300, languages=("de",))
