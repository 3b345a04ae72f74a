"""What every section of a configuration is made of: its base class, and numbers with bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Strict: neither "5" nor true is a number, whatever Python thinks; a whole number is still a fine float.
Fraction = Annotated[float, Field(gt=0, le=1, strict=True, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1, strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Seconds = Annotated[float, Field(gt=0, le=1e7, strict=True, allow_inf_nan=False)]
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
