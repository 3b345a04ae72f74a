"""YAML text as plain values that know where they were written.

    text ─ compose ─ nodes ─ Document(values, places) ─ merge: includes, then the file, then overrides ─ validation

Scalars follow YAML 1.2, whose rules have no surprises: `1e-3` is a number, `no` and `012` are text, booleans are
`true` and `false`. A key given twice, which YAML readers resolve silently, is refused; and so is, before any of it is
expanded, a text of too many values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from kfac_dist.config.yaml.fields import Path, expand_shorthand, may_be_list
from kfac_dist.errors import ConfigError

# The largest of the shipped runs has 60 values, nested 6 deep; a resolved one has 200.
MOST_VALUES = 20_000
MOST_DEPTH = 50
# Mistakes that are reported of one file.
MOST_PROBLEMS = 10
_TOO_MANY = f"more than {MOST_VALUES:,} values, with aliases written out: no configuration has so many"
_TOO_DEEP = f"nested too deeply to be a configuration: more than {MOST_DEPTH} levels, with aliases written out"

_TAG = "tag:yaml.org,2002:"
_MERGE_KEY = _TAG + "merge"
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:\.[0-9]+|(?:0|[1-9][0-9_]*)\.[0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|(?:0|[1-9][0-9_]*)[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),
)


class _TooLargeError(Exception):
    """A YAML text with values that no configuration may have."""

    def __init__(self, problem: str, mark: yaml.Mark) -> None:
        super().__init__(problem)
        self.mark = mark


class _Loader(yaml.SafeLoader):
    """SafeLoader's grammar with YAML 1.2's scalars, and bounds on the expanded text.

    An alias counts as all that it stands for, before anything is made of it: a few lines of aliases of aliases can
    stand for more values than there is memory.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  pyyaml's own mutable class attribute

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open = 0
        self._made = 0
        # Of each node: how many values it stands for, and how deeply they are nested.
        self._extents: dict[yaml.Node, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._made += 1
        self._open += 1
        if self._open > MOST_DEPTH:
            raise _TooLargeError(_TOO_DEEP, self.get_mark())
        if self._made > MOST_VALUES:
            raise _TooLargeError(_TOO_MANY, self.get_mark())
        node: yaml.Node | None = super().compose_node(parent, index)
        self._open -= 1
        if node is not None and node not in self._extents:
            self._extents[node] = self._extent(node)
        return node

    def _extent(self, node: yaml.Node) -> tuple[int, int]:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        # An unknown alias refers to a node that contains it, and is refused later.
        extents = [self._extents.get(part, (0, 0)) for part in parts]
        values = 1 + sum(values for values, _ in extents)
        depth = 1 + max((depth for _, depth in extents), default=0)
        if values > MOST_VALUES:
            raise _TooLargeError(_TOO_MANY, node.start_mark)
        if depth > MOST_DEPTH:
            raise _TooLargeError(_TOO_DEEP, node.start_mark)
        return values, depth


class Dumper(yaml.SafeDumper):
    """Quotes every text that readers of YAML 1.1 or 1.2 would take for something else."""


for _name, _pattern, _first in _RESOLVERS:
    _regexp = re.compile(f"(?:{_pattern})$")
    _Loader.add_implicit_resolver(_TAG + _name, _regexp, _first)
    Dumper.add_implicit_resolver(_TAG + _name, _regexp, _first)


@dataclass(frozen=True, order=True)
class Origin:
    """The origin of a value: a line of a file, or an argument on the command line (line 0)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Document:
    """Values of a configuration, and the place of each of their paths.

    Attributes:
        values: The mapping of its top level.
        places: Place of each path in its file.
        path: Of a document of one value, an override: where that value goes. A number in it counts into a list.
    """

    values: dict[str, Any]
    places: dict[Path, Origin] = field(default_factory=dict)
    path: tuple[str, ...] = ()

    def place(self, path: Path) -> Origin:
        """Return the origin of the value at a path, or else of the nearest value around it."""
        while path not in self.places and path:
            path = path[:-1]
        return self.places[path]

    def merged_with(self, top: Document) -> Document:
        """Lay another document over this one: mappings merge key by key, everything else is replaced.

        Raises:
            ConfigError: An override goes into a list that has no such entry, or that isn't there.
        """
        if top.path:
            top = _counted(self.values, top)
        places = dict(self.places)
        values = _merge(self.values, top.values, (), places, top.places)
        return Document(values, places)


def parse(text: str, source: str) -> Document:
    """Read the text of one YAML file whose top level is a mapping.

    Raises:
        ConfigError: Bad YAML, a repeated or non-text key, a tag, an empty text, another top level than a mapping.
    """
    reader = _Reader(source)
    values = reader.read(text)
    if values is None:
        reader.problems.append(f"{source}: the file is empty; a run needs the sections run, model, data, loss, …")
    elif not isinstance(values, dict):
        reader.problems.append(f"{source}: the top level is {show(values)}, expected a mapping of sections")
    if reader.problems:
        raise ConfigError(reported(reader.problems))
    return Document(values, reader.places)


def parse_override(argument: str) -> Document:
    """Read one `section.key=value` of the command line; the value is YAML.

    Raises:
        ConfigError: No `=`, an empty part in the dotted key, or a value that isn't YAML.
    """
    key, equals, text = argument.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path) or key != key.strip() or len(path) > MOST_DEPTH:
        raise ConfigError(f"command line: found {show(argument)}, expected key=value such as train.steps=100")
    if path[0] == "include":
        raise ConfigError(f"command line: found {show(argument)}; an include belongs in a file, by itself if need be")
    return override(path, text, f"command line ({_short(argument, 120)})")


def override(path: tuple[str, ...], text: str, source: str) -> Document:
    """Make a document of one value, given as YAML text, at a path.

    Raises:
        ConfigError: The text isn't YAML.
    """
    reader = _Reader(source, numbered=False)
    values = reader.read(text, path)
    if reader.problems:
        raise ConfigError(reported(reader.problems))
    for depth in range(len(path)):
        reader.places[path[:depth]] = Origin(source)
    for key in reversed(path):
        values = {key: values}
    return Document(values, reader.places, path)


def plain_value(text: str) -> Any:
    """Read a text as YAML reads it without quotes; return the text itself if that isn't YAML."""
    reader = _Reader("")
    value = reader.read(text)
    return text if reader.problems else value


def show(value: Any) -> str:
    """Write a value as a message quotes it: as YAML spells it, and short."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return repr(value if len(value) <= 60 else value[:57] + "...")
        case Mapping():
            return "a mapping"
        case list() | tuple():
            text = "[" + ", ".join(map(show, value)) + "]"
            return text if len(text) <= 60 else f"a list of {len(value)}"
    return _short(repr(value))


class _Reader:
    """Turns nodes into values, and records their places and all mistakes."""

    def __init__(self, source: str, *, numbered: bool = True) -> None:
        self.source = source
        self.numbered = numbered
        self.places: dict[Path, Origin] = {}
        self.problems: list[str] = []
        self._open: list[yaml.Node] = []

    def read(self, text: str, path: Path = ()) -> Any:
        try:
            node = yaml.compose(text, Loader=_Loader)
        except yaml.YAMLError as error:
            self.problems.append(self._bad_yaml(error, text))
            return {}
        except _TooLargeError as error:
            self.problems.append(f"{self._at(error.mark.line)}: {error}")
            return {}
        if node is None:
            self.places[path] = Origin(self.source)
            return None
        return self._value(node, path)

    def _place(self, node: yaml.Node) -> Origin:
        return self._at(node.start_mark.line)

    def _at(self, line: int) -> Origin:
        return Origin(self.source, line + 1 if self.numbered else 0)

    def _value(self, node: yaml.Node, path: Path) -> Any:
        if any(node is parent for parent in self._open):
            self.problems.append(f"{self._place(node)}: this alias refers to the value that it is part of")
            return None
        # The line of a key's value is that of the key: `_mapping` has noted it already.
        self.places.setdefault(path, self._place(node))
        self._open.append(node)
        try:
            match node:
                case yaml.MappingNode(tag="tag:yaml.org,2002:map"):
                    return self._mapping(node, path)
                case yaml.SequenceNode(tag="tag:yaml.org,2002:seq"):
                    return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]
                case yaml.ScalarNode():
                    return self._scalar(node)
            return self._unsupported(node)
        finally:
            self._open.pop()

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        inherited: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE_KEY:
                for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    values = self._value(source, path)
                    if isinstance(values, dict):
                        inherited = values | inherited
                    else:
                        self.problems.append(f"{self._place(source)}: << merges mappings, found {show(values)}")
                continue
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                found = getattr(key_node, "value", None) if isinstance(key_node, yaml.ScalarNode) else "a collection"
                self.problems.append(f"{self._place(key_node)}: keys are text, found {_short(str(found))}: quote it")
                continue
            below = (*path, key)
            if key in own:
                first = self.places[below]
                self.problems.append(
                    f"{self._place(key_node)}: {dotted(below)}: given twice, first in line {first.line or 1}: keep one"
                )
            self.places[below] = self._place(key_node)
            own[key] = self._value(value_node, below)
        return inherited | own

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text = str(node.value)
        try:
            match node.tag.removeprefix(_TAG):
                case "str":
                    return text
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    return int(text.replace("_", ""))
                case "float":
                    return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text.lower().replace("_", "")))
        except (KeyError, ValueError):
            self.problems.append(f"{self._place(node)}: {show(text)} is no value of its tag {_short(node.tag)}")
            return None
        return self._unsupported(node)

    def _unsupported(self, node: yaml.Node) -> None:
        tag = _short(node.tag.replace(_TAG, "!!"))
        self.problems.append(f"{self._place(node)}: the YAML tag {tag} is not supported: write plain values")

    def _bad_yaml(self, error: yaml.YAMLError, text: str) -> str:
        mark = getattr(error, "problem_mark", None)
        place = self._at(mark.line) if mark is not None else Origin(self.source)
        if isinstance(error, yaml.reader.ReaderError):
            place = self._at(text.count("\n", 0, error.position))
        problem = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
        if r"'\t'" in problem:
            problem = "found a tab: indent with spaces"
        return f"{place}: not valid YAML: {_short(problem, 200)}"


def dotted(path: Sequence[str | int]) -> str:
    """Write a path as the command line spells it, in one line."""
    return ".".join(_short(str(key)) for key in path)


def reported(problems: Sequence[str], total: int | None = None) -> str:
    """Return the mistakes, one line each, up to a readable number; of `total` mistakes these may be the first."""
    shown = problems[:MOST_PROBLEMS]
    hidden = (total or len(problems)) - len(shown)
    return "\n".join([*shown, *([f"… and {hidden} more"] if hidden else [])])


def _short(text: str, most: int = 60) -> str:
    """Write a text in one line, and not at length."""
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text if text.isprintable() else repr(text)[1:-1]


def _counted(base: Any, top: Document) -> Document:
    """Return an override whose path has numbers where the values below it have lists."""
    place = top.place(top.path)
    found, value = base, top.values
    path: Path = ()
    for key in top.path:
        value = value[key]
        if isinstance(found, list):
            if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < len(found)):
                entries = f"entries 0 to {len(found) - 1}" if found else "no entries"
                raise ConfigError(f"{place}: {dotted(path)} is a list, which has {entries}, not {_short(key)}")
            path, found = (*path, int(key)), found[int(key)]
            continue
        if key.isdecimal() and not isinstance(found, dict) and may_be_list(path):
            raise ConfigError(
                f"{place}: there is no list at {dotted(path)} whose entry {_short(key)} could be set: give the whole "
                f"list, {dotted(path)}=[…]"
            )
        found = expand_shorthand(path, found)
        path, found = (*path, key), found.get(key) if isinstance(found, dict) else None
    places = {(*path[: len(old)], *old[len(path) :]): where for old, where in top.places.items()}
    values: Any = value
    for part in reversed(path):
        values = {part: values}
    return Document(values, places, top.path)


def _merge(base: Any, top: Any, path: Path, places: dict[Path, Origin], top_places: dict[Path, Origin]) -> Any:
    if isinstance(base, list) and isinstance(top, dict) and top and all(isinstance(key, int) for key in top):
        entries = list(base)
        for index, value in top.items():
            entries[index] = _merge(base[index], value, (*path, index), places, top_places)
        return entries
    if isinstance(top, dict) and not isinstance(base, dict):
        base = expand_shorthand(path, base)
    if isinstance(top, dict) and isinstance(base, dict):
        merged = dict(base)
        for key, value in top.items():
            below = (*path, key)
            merged[key] = _merge(base.get(key), value, below, places, top_places)
        places.setdefault(path, top_places.get(path, Origin("command line")))
        return merged
    if isinstance(base, dict | list):
        for old in [old for old in places if old[: len(path)] == path]:
            del places[old]
    if isinstance(top, dict | list):
        places.update({new: place for new, place in top_places.items() if new[: len(path)] == path})
    elif path in top_places:
        places[path] = top_places[path]
    return top
