"""A shipped run as one file to begin with: its includes merged in, and each key's meaning above it.

The comments are those of the schema's docstrings, so that they can't disagree with the reference.
"""

from __future__ import annotations

import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from kfac_dist.config.schema import Config, Schedule, Section, Target
from kfac_dist.config.yaml.document import Dumper
from kfac_dist.config.yaml.fields import Path as KeyPath
from kfac_dist.config.yaml.fields import allowed_at
from kfac_dist.config.yaml.load import read_document

WIDTH = 110
_ENTRY = re.compile(r"    (\w+): (.*)")


def commented_yaml(shipped: Path, target: Path) -> str:
    """Return the text of a file that has all that a shipped one says and includes.

    Args:
        shipped: The shipped file.
        target: Path of the text, for the commands in its head.
    """
    values = read_document(shipped).values
    lines = [
        *(f"# {line}".rstrip() for line in head_comment(shipped)),
        "#",
        f"#   kfac-dist train {target} --check                        check this file, and train nothing",
        f"#   kfac-dist train {target}                                train on one rank",
        f"#   kfac-dist launch --with torchrun {target} --nproc-per-node 2    train on two",
        "#",
        "# Keys that are left out keep their defaults; config.yaml in the run's directory, runs/NAME, has all of them.",
    ]
    for key in Config.model_fields:
        if key in values:
            lines += ["", *_entry((key,), values[key])]
    return "\n".join(lines) + "\n"


def meaning(path: KeyPath) -> str:
    """Return the schema's description of a key, one or several sentences; empty if it has none."""
    parent = allowed_at(path[:-1])
    if parent is None or parent.section is None:
        return ""
    own = _attributes(parent.section).get(str(path[-1]), "")
    below = allowed_at(path)
    if own or below is None or below.section in (None, Schedule, Target):
        return own
    return (inspect.getdoc(below.section) or "").partition("\n\n")[0]


def _attributes(section: type[Section]) -> dict[str, str]:
    """Return the descriptions of keys in a section's docstring."""
    found: dict[str, str] = {}
    _, _, listed = (inspect.getdoc(section) or "").partition("Attributes:\n")
    name = ""
    for line in listed.splitlines():
        if match := _ENTRY.fullmatch(line):
            name = match[1]
            found[name] = match[2]
        elif name and line.startswith("        "):
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return found


def head_comment(file: Path) -> list[str]:
    """Return the lines of the comment that a file begins with, without their #."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return [line.removeprefix("#").strip() for line in lines]


def _entry(path: KeyPath, value: Any) -> Iterator[str]:
    """Yield the lines of a key and all below it."""
    indent = "  " * (len(path) - 1)
    if text := meaning(path):
        yield from textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    key = flow(str(path[-1]))
    if isinstance(value, Mapping) and value and _opens(path):
        yield f"{indent}{key}:"
        for inner in _ordered(path, value):
            yield from _entry((*path, inner), value[inner])
    else:
        yield f"{indent}{key}: {flow(value)}"


def _ordered(path: KeyPath, value: Mapping[str, Any]) -> list[str]:
    """Return keys in the schema's order; those of a mapping by names as they are written."""
    allowed = allowed_at(path)
    known = list(allowed.section.model_fields) if allowed is not None and allowed.section is not None else []
    return sorted(value, key=lambda key: known.index(key) if key in known else len(known))


def _opens(path: KeyPath) -> bool:
    """Whether a mapping gets a line for each key: sections do, and mappings of several names."""
    allowed = allowed_at(path)
    if allowed is None:
        return False
    if path[0] == "compare":
        return len(path) == 1
    return allowed.section not in (None, Schedule)


def flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    text = yaml.dump([value], Dumper=Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.strip()[1:-1]
