"""chrF of decoded translations (Popović 2015), by sacreBLEU: character n-grams, so that no language needs words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kfac_dist.errors import DataError
from kfac_dist.tasks.decoding import decode
from kfac_dist.tasks.scores import IGNORED, Score

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TranslationScore(Score):
    """Decodes held-out sources and compares with their translations.

    Args:
        tokenizer: Knows the subwords.
        end: Token that ends a translation.
        length: Most tokens of a translation.
        beams: Hypotheses that the search follows.

    Raises:
        DataError: sacreBLEU is missing.
    """

    def __init__(self, tokenizer: Tokenizer, end: int, length: int, beams: int) -> None:
        try:
            from sacrebleu.metrics.chrf import CHRF
        except ImportError as error:
            raise DataError("chrF needs the package sacrebleu: pip install 'kfac_dist[language]'") from error
        self._chrf = CHRF()
        self.tokenizer = tokenizer
        self.end = end
        self.length = length
        self.beams = beams

    def judge(self, model: nn.Module, inputs: Any, targets: Tensor, outputs: Tensor) -> list[Any]:
        """Return language, translation and reference of each sample."""
        source, prefix = inputs
        found = decode(model, source, prefix[:, 0], end=self.end, length=self.length, beams=self.beams)
        return self.beside(found, prefix, targets)

    def beside(self, found: Tensor, prefix: Tensor, targets: Tensor) -> list[Any]:
        """Return language, text and reference of each sample, for any tokens that are put forward as translations."""
        languages = [str(self.tokenizer.id_to_token(start)).strip("<>") for start in prefix[:, 0].tolist()]
        references = targets.masked_fill(targets == IGNORED, self.end)
        return list(zip(languages, self._texts(found), self._texts(references), strict=True))

    def summarize(self, findings: Sequence[Any]) -> dict[str, float]:
        """Return chrF of each language over its whole corpus, and their mean."""
        by_language: dict[str, list[tuple[str, str]]] = {}
        for language, text, reference in findings:
            by_language.setdefault(language, []).append((text, reference))
        scores = {f"chrF {language}": self.chrf(pairs) for language, pairs in sorted(by_language.items())}
        return {"chrF": sum(scores.values()) / len(scores), **scores}

    def chrf(self, pairs: Sequence[tuple[str, str]]) -> float:
        """Return the corpus chrF of `(translation, reference)` pairs, from 0 to 100."""
        texts, references = zip(*pairs, strict=True)
        return float(self._chrf.corpus_score(list(texts), [list(references)]).score)

    def _texts(self, tokens: Tensor) -> list[str]:
        texts: list[str] = self.tokenizer.decode_batch(tokens.tolist(), skip_special_tokens=True)
        return texts
