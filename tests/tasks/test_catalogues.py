"""Pairs out of the installed catalogues are real translations, clean, and the same every time."""

from __future__ import annotations

import re
import sys

import pytest

from kfac_dist.errors import DataError
from kfac_dist.tasks.catalogues import Pair, read_pairs

for package in ("django", "babel"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'kfac_dist[language]'")


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return read_pairs(("de", "fr", "ja"))


@pytest.mark.parametrize(
    "pair",
    [
        Pair("Password", "de", "Passwort"),  # Django's interface
        Pair("Password", "ja", "パスワード"),
        Pair("%(num)d year", "fr", "%(num)d année"),  # both forms of a message with a plural
        Pair("%(num)d years", "fr", "%(num)d ans"),
        Pair("%(num)d years", "de", "%(num)d Jahre"),
        Pair("Germany", "fr", "Allemagne"),  # CLDR's names
        Pair("Germany", "ja", "ドイツ"),
        Pair("{0} kilometers per hour", "de", "{0} Kilometer pro Stunde"),
        Pair("Central European Standard Time", "de", "Mitteleuropäische Normalzeit"),
        Pair("Swiss Franc", "fr", "franc suisse"),
    ],
)
def test_known_translations_are_there(pair: Pair, pairs: list[Pair]) -> None:
    assert pair in pairs


def test_what_is_kept_is_clean(pairs: list[Pair]) -> None:
    assert len(pairs) > 8000
    assert {pair.language for pair in pairs} == {"de", "fr", "ja"}
    assert len({(pair.source, pair.language) for pair in pairs}) == len(pairs), "one translation of each string"
    for pair in pairs:
        for text in (pair.source, pair.target):
            assert text == text.strip()
            assert text
            assert "\n" not in text
        names = [sorted(re.findall(r"%\(\w+\)[sd]", text)) for text in (pair.source, pair.target)]
        assert names[0] == names[1], pair
    assert sum("%(" in pair.source for pair in pairs) > 100
    assert pairs == sorted(pairs)


def test_unknown_languages_are_refused() -> None:
    with pytest.raises(DataError, match="no translations from English into en, xx; choose among Babel's"):
        read_pairs(("de", "xx", "en"))


@pytest.mark.parametrize("package", ["django", "babel"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{package} is missing: pip install 'kfac_dist\[language\]'"):
        read_pairs(("de",))
