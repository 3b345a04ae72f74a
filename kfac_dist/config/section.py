"""Base class of the sections of a configuration, and numbers and names with bounds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from kfac_dist.errors import ExtensionError

# No run has so many of anything. Float32 has numbers from 1e-38 to 3e38: beyond these little is left for products.
MOST_COUNT = 10**9
LEAST, MOST = 1e-30, 1e30
# A file name may have 255 bytes; some are left for suffixes.
MOST_NAME = 100
MOST_PATH = 1000


def can_be_path(text: str) -> bool:
    """Whether a text can be a path: of printable characters, and no part longer than a file's name may be."""
    parts = text.split("/")
    return text.isprintable() and len(text) <= MOST_PATH and all(len(part.encode()) <= 255 for part in parts)


def _checked_path(text: str) -> str:
    if not can_be_path(text):
        raise ValueError(f"found {text[:57]!r}, expected a path: printable, no name in it longer than 255 bytes")
    return text


def _not_lost(value: float) -> float:
    if value < LEAST:
        raise ValueError(f"found {value:g}, expected a number > 0, at least {LEAST:g}")
    return value


# Strict: neither "5" nor true is a number; a whole number is accepted as a float.
Fraction = Annotated[float, Field(gt=0, le=1, strict=True, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=MOST, strict=True, allow_inf_nan=False), AfterValidator(_not_lost)]
NonNegative = Annotated[float, Field(ge=0, le=MOST, strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=MOST_COUNT, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, le=MOST_COUNT, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Seconds = Annotated[float, Field(gt=0, le=1e7, strict=True, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=MOST_NAME)]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$", max_length=200)]
FilePath = Annotated[str, Field(max_length=MOST_PATH), AfterValidator(_checked_path)]
Flag = Annotated[bool, Field(strict=True)]
Pattern = Annotated[str, Field(min_length=1)]


def check_new_name(function: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name under which nothing can be registered.

    Args:
        function: The registering function, for the message.
        name: The name.
        known: Names that are taken.

    Raises:
        ExtensionError: It isn't lower-case letters, digits and '_', or it is taken.
    """
    if not (isinstance(name, str) and len(name) <= MOST_NAME and re.fullmatch(r"[a-z][a-z0-9_]*", name)):
        raise ExtensionError(f"{function}: found the name {name!r}; expected lower-case letters, digits and '_'")
    if name in (taken := sorted(known)):
        raise ExtensionError(f"{function}: the name {name!r} is taken, as are {', '.join(taken)}: choose another")


class OpenNames(StrEnum):
    """Names to which code outside of the package may add its own; those are members in all but the class's listing."""

    @classmethod
    def add(cls, name: str, function: str) -> Self:
        """Make a name known, and return it; `function` registers it.

        Raises:
            ExtensionError: See `check_new_name`.
        """
        check_new_name(function, name, cls.known())
        member = str.__new__(cls, name)
        member._name_ = member._value_ = name
        _ADDED.setdefault(cls, {})[name] = member
        return member

    @classmethod
    def known(cls) -> list[str]:
        """Return all names, the class's own first."""
        return [*(member.value for member in cls), *_ADDED.get(cls, {})]

    @property
    def added(self) -> bool:
        """Whether the name is one that was added."""
        return self.value in _ADDED.get(type(self), {})

    @classmethod
    def _missing_(cls, value: object) -> OpenNames | None:
        return _ADDED.get(cls, {}).get(str(value))


_ADDED: dict[type[OpenNames], dict[str, OpenNames]] = {}


@dataclass(frozen=True)
class Gone:
    """A key that a section had once.

    Attributes:
        default: Its default then. That value is accepted and dropped: saved configurations contain all defaults, and
            this one has the same meaning as no key.
        instead: Replacement for any other value, for the message.
    """

    default: Any
    instead: str


class Section(BaseModel):
    """A frozen section that refuses unknown keys and silent type coercion.

    Attributes:
        questions: Its keys by the question that they answer, where there are many; each key once.
        gone: Keys that it had once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)

    questions: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    gone: ClassVar[Mapping[str, Gone]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_gone(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        for key in cls.gone.keys() & data.keys():
            if data[key] != cls.gone[key].default:
                raise ValueError(f"{key} is gone: {cls.gone[key].instead}")
        return {key: value for key, value in data.items() if key not in cls.gone} if cls.gone else data


def check_one_in_k(name: str, share: float, consequence: str) -> None:
    """Refuse a share that takes no whole number of steps from one thing taken to the next.

    Raises:
        ValueError: It isn't 1/k.
    """
    k = 1 / share
    if abs(k - round(k)) > 0.02 * k:
        raise ValueError(f"{name} ({share}) must be 1/k for a whole k, such as 0.5 or 0.1: {consequence}")
