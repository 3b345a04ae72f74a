"""Every key of a run's file: all of them as one commented file, or one of them explained.

Meanings come from the schema's docstrings, types and defaults from the schema, and values of required keys from a
shipped run: the printed file trains.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from kfac_dist.config.schema import Config, Schedule, Section
from kfac_dist.config.yaml.commented import WIDTH, flow, meaning
from kfac_dist.config.yaml.document import dotted
from kfac_dist.config.yaml.explain import meant_key
from kfac_dist.config.yaml.fields import Allowed, Path, allowed_at
from kfac_dist.config.yaml.load import load_config
from kfac_dist.errors import ConfigError

EXAMPLE = "digits_autoencoder"
_HEAD = f"""\
# All keys of a run's file. Values are the defaults; keys without a default have the values of the shipped run
# {EXAMPLE}. Sections that a run leaves out unless it needs them are commented out. Schedules (lr, damping)
# take a number, or {{value, kind, final, steps, warmup_steps, warmup_from}}.
#
#   kfac-dist config KEY    explains one key, such as kfac.inversion.damping
#   kfac-dist init [NAME]   writes a shipped run to begin with
"""


def reference_yaml() -> str:
    """Return a file with every key of the schema, and its meaning and type above it."""
    return "\n".join([_HEAD.rstrip(), *_section((), Config, load_config(EXAMPLE))]) + "\n"


def explain_key(key: str) -> str:
    """Return the explanation of a key: its type, default and meaning; of a section, all of its keys.

    Args:
        key: Dotted, as on the command line.

    Raises:
        ConfigError: There is no such key: names the nearest.
    """
    path = find_path(key)
    allowed = allowed_at(path)
    assert allowed is not None
    if (section := allowed.section) is None or not _opens(allowed):
        return _leaf(path, allowed)
    left_out = ", null by default" if _default(path) is None else ""
    head = [f"{dotted(path)}: a section{left_out}", "", *_wrapped(_description(section) or meaning(path)), ""]
    return "\n".join([*head, textwrap.dedent("\n".join(_section(path, section, None))).strip("\n")])


def find_path(key: str) -> Path:
    """Return the path of a dotted key.

    Raises:
        ConfigError: The schema has none.
    """
    path: Path = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    for length in range(1, len(path) + 1):
        if allowed_at(path[:length]) is not None:
            continue
        known = path[: length - 1]
        parent = allowed_at(known)
        assert parent is not None
        if parent.section is None:
            raise ConfigError(f"{dotted(path[:length])}: unknown key; {dotted(known)} has no keys, it is {parent}")
        name = str(path[length - 1])
        if name in parent.section.gone:
            raise ConfigError(f"{dotted(path[:length])} is gone: {parent.section.gone[name].instead}")
        raise ConfigError(f"{dotted(path[:length])}: unknown key{meant_key(path[:length])}")
    return path


def _leaf(path: Path, allowed: Allowed) -> str:
    lines = [f"{dotted(path)}: {allowed}"]
    default = _default(path)
    if default is not _NONE:
        lines += [f"default: {flow(_plain(default))}"]
    elif _is_own(path):
        lines += ["default: none, it must be given"]
    return "\n".join([*lines, *(["", *_wrapped(text)] if (text := meaning(path)) else [])])


_NONE = object()


def _default(path: Path) -> Any:
    """Return the default of a section's key; `_NONE` where it has none, or is no section's."""
    parent = allowed_at(path[:-1])
    if parent is None or parent.section is None or path[-1] not in parent.section.model_fields:
        return _NONE
    field = parent.section.model_fields[str(path[-1])]
    return _NONE if field.is_required() else field.get_default(call_default_factory=True)


def _is_own(path: Path) -> bool:
    parent = allowed_at(path[:-1])
    return parent is not None and parent.section is not None and path[-1] in parent.section.model_fields


def _section(path: Path, section: type[Section], example: Section | None) -> Iterator[str]:
    """Yield the lines of a section's keys, under the questions that it groups them by."""
    questions = section.questions or {"": tuple(section.model_fields)}
    for question, names in questions.items():
        if question:
            yield f"{_indent(path)}# ---- {question}"
        for name in names:
            yield from _key((*path, name), getattr(example, name, None))


def _key(path: Path, example: Any) -> Iterator[str]:
    allowed, default, indent, name = allowed_at(path), _default(path), _indent(path[:-1]), path[-1]
    assert allowed is not None
    if len(path) == 1:
        yield ""
    if example is not None and (default in (_NONE, None) or name == "args"):  # those that go with the name
        default = example
    text = meaning(path)
    section = allowed.section
    if section is None or not _opens(allowed):
        yield from _wrapped(f"{text} [{_kind(allowed)}]", f"{indent}# ")
        yield f"{indent}{name}:" + (" # must be given" if default is _NONE else f" {flow(_plain(default))}")
        return
    yield from _wrapped(text, f"{indent}# ")
    below = list(_section(path, section, example if isinstance(example, Section) else None))
    if default is None:  # left out, and ready to be taken in
        begin = len(indent)
        yield f"{indent}# {name}:"
        yield from (f"{indent}# {line[begin:]}" for line in below)
    else:
        yield f"{indent}{name}:"
        yield from below


def _opens(allowed: Allowed) -> bool:
    return allowed.section not in (None, Schedule)


def _indent(path: Path) -> str:
    return "  " * len(path)


def _kind(allowed: Allowed) -> str:
    """Return the type of a key's value; schedules are explained at the head."""
    text = str(allowed)
    if allowed.section is Schedule:
        return "a number or a schedule" + (" or null" if text.endswith("null") else "")
    return text


def _plain(value: Any) -> Any:
    """Return a value as YAML has it; a schedule that is one number as that."""
    if isinstance(value, Schedule):
        said = value.model_dump(mode="json", exclude_defaults=True)
        return said["value"] if set(said) == {"value"} else said
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return str(value) if isinstance(value, str) else value


def _description(section: type[Section]) -> str:
    """Return a section's docstring without the descriptions of its keys."""
    return (inspect.getdoc(section) or "").partition("Attributes:\n")[0].strip()


def _wrapped(text: str, prefix: str = "") -> Iterator[str]:
    for number, paragraph in enumerate(text.split("\n\n")):
        if number:
            yield prefix.rstrip()
        yield from textwrap.wrap(
            " ".join(paragraph.split()), WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False
        )
