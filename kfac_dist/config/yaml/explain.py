"""A refused value in one line: its place, the value found, the values allowed, and the probable correction."""

from __future__ import annotations

import difflib
import re

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kfac_dist.config.section import MOST, MOST_COUNT
from kfac_dist.config.yaml.document import MOST_PROBLEMS, Document, Origin, dotted, plain_value, reported, show
from kfac_dist.config.yaml.fields import Allowed, Path, all_paths, allowed_at
from kfac_dist.errors import ConfigError, did_you_mean


def config_error(error: ValidationError, document: Document) -> ConfigError:
    """Turn pydantic's findings into one error with a line for each mistake, in the order of the file."""
    found: dict[Path, tuple[Origin, ErrorDetails]] = {}
    for detail in error.errors():
        path = _path(detail, document)
        # A union reports each of its members: one line serves all, that of a number out of bounds if there is one.
        if path not in found or _beyond(detail):
            found[path] = (document.place(path), detail)
    ordered = sorted(found.items(), key=lambda entry: entry[1][0])
    # Only the first lines are read: a file may have thousands of unknown keys.
    lines = [f"{place}: {_explain(path, detail)}" for path, (place, detail) in ordered[:MOST_PROBLEMS]]
    return ConfigError(reported(lines, len(ordered)))


def _path(detail: ErrorDetails, document: Document) -> Path:
    """The key that a mistake is reported for."""
    path = _schema_path(detail["loc"])
    return _blamed(_message(detail), path, document) if detail["type"] == "value_error" else path


def _message(detail: ErrorDetails) -> str:
    return detail["msg"].removeprefix("Value error, ")


def _explain(path: Path, detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden":
        return f"{dotted(path)}: unknown key{meant_key(path)}"
    if detail["type"] == "value_error":
        message = _message(detail)
        word = message.split(maxsplit=1)[0]
        if dotted(path).endswith(word):
            return dotted(path) + message.removeprefix(word)
        return f"{dotted(path)}: {message}" if path else message
    allowed = allowed_at(path)
    expected = "" if allowed is None else f"expected {allowed}"
    if detail["type"] == "missing":
        return f"{dotted(path)}: missing; {expected}"
    found = detail["input"]
    return f"{dotted(path)}: found {show(found)}, {expected}{_beyond(detail)}{_meant_value(found, allowed)}"


def _beyond(detail: ErrorDetails) -> str:
    """Return the bound that was reached, if it is one that a description leaves out."""
    bounds = detail.get("ctx", {})
    match detail["type"]:
        case "less_than_equal" if bounds["le"] in (MOST, MOST_COUNT):
            return f", at most {bounds['le']:,}" if bounds["le"] == MOST_COUNT else f", at most {MOST:g}"
        case "greater_than_equal" if bounds["ge"] == -MOST_COUNT:
            return f", at least {-MOST_COUNT:,}"
        case "string_too_long":
            return f", at most {bounds['max_length']} characters"
    return ""


def _schema_path(loc: tuple[int | str, ...]) -> Path:
    """Drop pydantic's additions to a path for the members of a union; keep an unknown key at its end."""
    for length in range(len(loc) + 1):
        if allowed_at(loc[:length]) is None:
            parent = allowed_at(loc[: length - 1])
            keyed = parent is not None and (parent.section is not None and not parent.choices)
            return loc[:length] if keyed else loc[: length - 1]
    return loc


def _blamed(message: str, path: Path, document: Document) -> Path:
    """The first key that a section's own message names, so that its line is that of the key."""
    for word in re.findall(r"[a-z_][a-z0-9_.]*", message):
        below: Path = (*path, *word.split("."))
        if below in document.places:
            return below
    return path


def meant_key(path: Path) -> str:
    """Return the end of a message about an unknown key: the key probably meant, or the keys that exist."""
    key = str(path[-1])
    parent = allowed_at(path[:-1])
    own = list(parent.section.model_fields) if parent is not None and parent.section is not None else []
    if hint := did_you_mean(key, own):
        return hint
    elsewhere = {dotted(known): known[-1] for known in all_paths() if known[:-1] != path[:-1]}
    same = [known for known, name in elsewhere.items() if name == key]
    if not same:
        close = difflib.get_close_matches(key, set(elsewhere.values()), n=1, cutoff=0.8)
        same = [known for known, name in elsewhere.items() if name in close]
    if 0 < len(same) <= 3:
        return f"; did you mean {' or '.join(same)}? Here the keys are {', '.join(own)}"
    return f"; the keys here are {', '.join(own)}"


def _meant_value(found: object, allowed: Allowed | None) -> str:
    if allowed is None or not isinstance(found, str):
        return ""
    if allowed.takes_number() and isinstance(plain_value(found), int | float):
        return ": leave out the quotes"
    return did_you_mean(found, allowed.choices)
