"""A parallel corpus that ships in Python packages: strings of user interfaces, and names of things in the world.

    Django   its translation catalogues (`locale/<language>/LC_MESSAGES/*.mo`), read by gettext: "Save" → "Sichern"
    Babel    names and patterns of the Unicode CLDR: "Peruvian Sol" → "Peruanischer Sol"

What a catalogue holds is kept as it is, placeholders (`%(name)s`, `{0}`) and markup included; white space at the ends
is cut off. A message with plural forms becomes two pairs, English one and other with the translations for one and five.
Dropped are pairs whose two sides have different placeholders, those of several lines or without a letter, and all but
the first translation of a string.
"""

from __future__ import annotations

import gettext
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfac_dist.errors import DataError

ENGLISH = "en"
_PLACEHOLDER = re.compile(r"%\([^)]*\)[a-z]|%[sd]|\{[^{}]*\}")
# Numbers whose forms stand for English singular and plural, in languages of up to three forms.
_ONE, _OTHER = 1, 5


@dataclass(frozen=True, order=True)
class Pair:
    """A string and its translation.

    Attributes:
        source: English.
        language: Of the translation, such as `de`.
        target: The translation.
    """

    source: str
    language: str
    target: str


def read_pairs(languages: tuple[str, ...]) -> list[Pair]:
    """Return every pair of the installed catalogues, sorted.

    Args:
        languages: Languages to translate into.

    Raises:
        DataError: A package is missing, or has no such language.
    """
    try:
        import django
        from babel import localedata
    except ImportError as error:
        raise DataError(
            f"translations are read from packages of which {error.name} is missing: pip install 'kfac_dist[language]'"
        ) from error
    if unknown := sorted({*languages} & {ENGLISH} | {key for key in languages if not localedata.exists(key)}):
        raise DataError(
            f"languages: no translations from English into {', '.join(unknown)}; choose among Babel's, "
            "such as de, fr, ja"
        )
    pairs: dict[tuple[str, str], Pair] = {}
    for language in languages:
        for source, target in (*_messages(Path(django.__file__).parent, language), *_names(language)):
            pair = Pair(source.strip(), language, target.strip())
            if pair.source and pair.target and _fits(pair.source, pair.target):
                pairs.setdefault((pair.source, language), pair)
    return sorted(pairs.values())


def _fits(source: str, target: str) -> bool:
    text = "\n" not in source and "\n" not in target and any(map(str.isalpha, source))
    return text and sorted(_PLACEHOLDER.findall(source)) == sorted(_PLACEHOLDER.findall(target))


def _messages(package: Path, language: str) -> Iterator[tuple[str, str]]:
    """Yield the translations of a package's catalogues; both forms of a message with a plural."""
    from babel.messages.mofile import read_mo

    files = [
        path for place in ("conf", "contrib/*") for path in package.glob(f"{place}/locale/{language}/LC_MESSAGES/*.mo")
    ]
    for path in sorted(files):
        with path.open("rb") as file:
            translations = gettext.GNUTranslations(file)
            file.seek(0)
            messages = list(read_mo(file))  # gettext itself forgets the English plural
        for message in messages:
            context = message.context
            if isinstance(message.id, str):
                if message.id:  # else the catalogue's own header
                    text = message.id
                    yield text, translations.gettext(text) if context is None else translations.pgettext(context, text)
                continue
            one, other = message.id
            for number, form in ((_ONE, one), (_OTHER, other)):
                if context is None:
                    yield form, translations.ngettext(one, other, number)
                else:
                    yield form, translations.npgettext(context, one, other, number)


def _names(language: str) -> Iterator[tuple[str, str]]:
    """Yield CLDR's names of languages, countries, scripts, currencies, units and time zones."""
    from babel.localedata import LocaleDataDict, load

    def names_of(language: str) -> LocaleDataDict:
        values: dict[Any, Any] = load(language)
        return LocaleDataDict(values)

    english, other = map(names_of, (ENGLISH, language))
    for kind in ("languages", "territories", "scripts", "variants", "currency_names"):
        yield from _common(english[kind], other[kind])
    for key, forms in english["unit_display_names"].items():
        yield from _common(forms, other["unit_display_names"].get(key, {}))
    for kind in ("unit_patterns", "meta_zones"):
        for key, forms in english[kind].items():
            yield from _common(forms.get("long", {}), other[kind].get(key, {}).get("long", {}))
    for key, zone in english["time_zones"].items():
        yield from _common({"city": zone.get("city")}, {"city": other["time_zones"].get(key, {}).get("city")})


def _common(english: Mapping[Any, Any], other: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    for key, source in english.items():
        if isinstance(source, str) and isinstance(target := other.get(key), str):
            yield source, target
