"""What every section of a configuration is made of: its base class, and numbers and names with bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# No run has so many of anything. Float32 has numbers from 1e-38 to 3e38: beyond these little is left for products.
MOST_COUNT = 10**9
LEAST, MOST = 1e-30, 1e30
# Of the longest name that a file may have (255 bytes) some is left for what is put behind it.
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


# Strict: neither "5" nor true is a number, whatever Python thinks; a whole number is still a fine float.
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


class Section(BaseModel):
    """A frozen section that refuses unknown keys and silent type coercion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)


def check_one_in_k(name: str, share: float, consequence: str) -> None:
    """Refuse a share that takes no whole number of steps from one thing taken to the next.

    Raises:
        ValueError: It isn't 1/k.
    """
    k = 1 / share
    if abs(k - round(k)) > 0.02 * k:
        raise ValueError(f"{name} ({share}) must be 1/k for a whole k, such as 0.5 or 0.1: {consequence}")
