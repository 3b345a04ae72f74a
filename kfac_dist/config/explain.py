"""A refused value in one line: where it was written, what was found, what is allowed, what was probably meant."""

from __future__ import annotations

import difflib
import re

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kfac_dist.config.document import Document, Place, dotted, plain_value, show
from kfac_dist.config.fields import Allowed, Path, all_paths, allowed_at
from kfac_dist.config.spelling import did_you_mean
from kfac_dist.errors import ConfigError

MOST = 10


def config_error(error: ValidationError, document: Document) -> ConfigError:
    """Gather what pydantic found into one error with a line for each mistake, in the order of the file."""
    lines: dict[Path, tuple[Place, str]] = {}
    for detail in error.errors():
        path, line = _explain(detail, document)
        # A union reports each of its members: one line serves all.
        lines.setdefault(path, (document.place(path), line))
    ordered = [f"{place}: {line}" for place, line in sorted(lines.values(), key=lambda entry: entry[0])]
    if len(ordered) > MOST:
        ordered[MOST:] = [f"… and {len(ordered) - MOST} more"]
    return ConfigError("\n".join(ordered))


def _explain(detail: ErrorDetails, document: Document) -> tuple[Path, str]:
    path = _schema_path(detail["loc"])
    if detail["type"] == "extra_forbidden":
        return path, f"{dotted(path)}: unknown key{_meant_key(path)}"
    if detail["type"] == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        path = _blamed(message, path, document)
        word = message.split(maxsplit=1)[0]
        if dotted(path).endswith(word):
            return path, dotted(path) + message.removeprefix(word)
        return path, f"{dotted(path)}: {message}" if path else message
    allowed = allowed_at(path)
    expected = "" if allowed is None else f"expected {allowed}"
    if detail["type"] == "missing":
        return path, f"{dotted(path)}: missing; {expected}"
    found = detail["input"]
    return path, f"{dotted(path)}: found {show(found)}, {expected}{_meant_value(found, allowed)}"


def _schema_path(loc: tuple[int | str, ...]) -> Path:
    """Drop what pydantic adds to a path for the members of a union; keep an unknown key at its end."""
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


def _meant_key(path: Path) -> str:
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
