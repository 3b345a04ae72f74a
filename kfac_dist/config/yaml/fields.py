"""The values that the schema allows at a path, in words: read from the types, so that messages agree with the check.

A path is a tuple of keys and list indices, such as `("kfac", "inversion", "damping", "value")`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from kfac_dist.config.schema import Config, Schedule, Section, Target
from kfac_dist.config.section import MOST, MOST_COUNT, OpenNames

Path = tuple[str | int, ...]
# Bounds that only a slip or malice reaches.
_BEYOND_USE = (MOST, MOST_COUNT, -MOST_COUNT)


@dataclass(frozen=True)
class Allowed:
    """A type of the schema with its constraints (`annotated_types` and pydantic's own)."""

    annotation: Any
    constraints: tuple[Any, ...] = ()

    @property
    def section(self) -> type[Section] | None:
        """The section that may stand here, if one may."""
        for option in self._options():
            if isinstance(option.annotation, type) and issubclass(option.annotation, Section):
                return option.annotation
        return None

    @property
    def choices(self) -> list[str]:
        """The names among which the value must be, if it is an enum or a literal."""
        found: list[str] = []
        for option in self._options():
            if isinstance(option.annotation, type) and issubclass(option.annotation, OpenNames):
                found += option.annotation.known()
            elif isinstance(option.annotation, type) and issubclass(option.annotation, Enum):
                found += [str(member.value) for member in option.annotation]
            elif get_origin(option.annotation) is Literal:
                found += [str(value) for value in get_args(option.annotation)]
        return found

    def takes_number(self) -> bool:
        """Whether a number may stand here."""
        return self.section is Schedule or any(option.annotation in (int, float) for option in self._options())

    def below(self, key: str | int) -> Allowed | None:
        """Return the values allowed one step further down; None where there is none."""
        for option in self._options():
            if (section := option.section) is not None:
                field = section.model_fields.get(str(key))
                return None if field is None else _unwrap(field.annotation, field.metadata)
            arguments = get_args(option.annotation)
            if get_origin(option.annotation) is dict and isinstance(key, str):
                return _unwrap(arguments[1])
            if get_origin(option.annotation) is tuple and isinstance(key, int):
                if arguments[-1] is Ellipsis:
                    return _unwrap(arguments[0])
                return _unwrap(arguments[key]) if key < len(arguments) else None
        return None

    def _options(self) -> list[Allowed]:
        if get_origin(self.annotation) in (Union, types.UnionType):
            return [_unwrap(option) for option in get_args(self.annotation)]
        return [self]

    def __str__(self) -> str:
        return " or ".join(_describe(option) for option in self._options())


def allowed_at(path: Path) -> Allowed | None:
    """Return the values that `Config` allows at a path; None if the schema has no such path."""
    allowed: Allowed | None = Allowed(Config)
    for key in path:
        if allowed is None:
            return None
        allowed = allowed.below(key)
    return allowed


def may_be_list(path: Path) -> bool:
    """Whether a list may stand at a path: if the schema says so, or doesn't restrict the value."""
    allowed = allowed_at(path)
    if allowed is None or allowed.annotation is Any:
        return True
    return any(get_origin(option.annotation) is tuple for option in allowed._options())


def all_paths() -> Iterator[tuple[str, ...]]:
    """Every path of the schema that leads to a key with a fixed name."""

    def walk(section: type[Section], prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name in section.model_fields:
            yield (*prefix, name)
            below = Allowed(section).below(name)
            # A schedule's keys are the same wherever one stands: naming them would only drown the section's own.
            if below is not None and below.section not in (None, Schedule):
                yield from walk(below.section, (*prefix, name))

    return walk(Config, ())


def expand_shorthand(path: Path, value: Any) -> Any:
    """Write a shorthand out (a schedule's number, a target's name), so that an override can reach inside it."""
    allowed = allowed_at(path)
    if allowed is None or isinstance(value, Mapping):
        return value
    if allowed.section is Schedule and isinstance(value, int | float):
        return {"value": value}
    if allowed.section is Target and isinstance(value, str):
        return {"name": value}
    return value


def _unwrap(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> Allowed:
    constraints = list(metadata)
    while get_origin(annotation) is Annotated:
        annotation, *extra = get_args(annotation)
        for item in extra:
            constraints += item.metadata if isinstance(item, FieldInfo) else [item]
    return Allowed(annotation, tuple(constraints))


def _describe(allowed: Allowed) -> str:
    annotation = allowed.annotation
    if allowed.choices:
        return "one of " + ", ".join(allowed.choices) if len(allowed.choices) > 1 else allowed.choices[0]
    if (section := allowed.section) is not None:
        keys = "a mapping with keys among " + ", ".join(section.model_fields)
        if section is Schedule:
            return f"a number > 0 or {keys}"
        return f"a name or {keys}" if section is Target else keys
    if annotation in (int, float):
        return _number(allowed)
    match get_origin(annotation) or annotation:
        case types.NoneType:
            return "null"
        case kind if kind is bool:
            return "true or false"
        case kind if kind is str:
            return _text(allowed)
        case kind if kind is dict:
            return f"a mapping whose values are each {_unwrap(get_args(annotation)[1])}"
        case kind if kind is tuple:
            elements = get_args(annotation)
            if elements[-1] is Ellipsis:
                return f"a list of {_unwrap(elements[0])}"
            return f"a list of {len(elements)}, each {_unwrap(elements[0])}"
    return "any value"


def _number(allowed: Allowed) -> str:
    bounds = []
    for constraint in allowed.constraints:
        match constraint:
            case annotated_types.Ge(ge=bound) | annotated_types.Le(le=bound) if bound in _BEYOND_USE:
                continue  # reported where they are reached
            case annotated_types.Gt(gt=bound):
                bounds.append(f"> {bound:g}")
            case annotated_types.Ge(ge=bound):
                bounds.append(f">= {bound:g}")
            case annotated_types.Lt(lt=bound):
                bounds.append(f"< {bound:g}")
            case annotated_types.Le(le=bound):
                bounds.append(f"<= {bound:g}")
    kind = "a whole number" if allowed.annotation is int else "a number"
    return " ".join([kind, " and ".join(bounds)]).rstrip()


def _text(allowed: Allowed) -> str:
    for constraint in allowed.constraints:
        if pattern := getattr(constraint, "pattern", None):
            return f"text that matches {pattern}"
        if isinstance(constraint, annotated_types.MinLen):
            return "non-empty text"
    return "text"
