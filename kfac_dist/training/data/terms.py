"""The number of terms in a step's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TermCounts:
    """Loss terms of a step.

    Attributes:
        here: Of each of this rank's micro-batches, on the device; None where the number of samples says it.
        everywhere: Of all ranks and micro-batches together; at least 1.
    """

    here: Sequence[Tensor | None]
    everywhere: int | Tensor
