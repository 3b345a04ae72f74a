"""n of a micro-batch: the terms of its loss on this rank, from the loop, the loss's gradient or the shapes.

    micro_batch(terms=…)          takes precedence
    the loss's gradient           c = 1/n at the model's outputs, read once (`loss_scale`)
    the model's outputs, inputs   see `curvature.samples`

The place in the shapes in which n was found in the first measured step is kept for all that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kfac_dist.config.schema import LossTerms
from kfac_dist.curvature.capture.samples import (
    PassShapes,
    TensorDim,
    find_number,
    find_positions,
    find_samples,
    folded_samples,
    is_unbatched,
)
from kfac_dist.errors import ModelError

# Tolerance of the number of terms from a half-precision gradient.
_ROUNDING = 0.02


@dataclass(frozen=True)
class Description:
    """The loop's description of its next micro-batch; see `KFAC.micro_batch`."""

    first_sample: int | None = None
    divisor: float | Tensor | None = None
    terms: float | Tensor | None = None
    last: bool = True
    classes: Tensor | None = None


@dataclass(frozen=True)
class Counted:
    """Sizes of one micro-batch.

    Attributes:
        samples: B, the number of samples in layers' rows; None if it is unknown.
        terms: n.
    """

    samples: int | None
    terms: float | Tensor


class TermCounter:
    """Counts the loss's terms of forward passes.

    Args:
        loss_terms: Terms of the loss's mean.

    Attributes:
        place: Place of the number of samples in the shapes, once it is settled.
    """

    def __init__(self, loss_terms: LossTerms) -> None:
        self.place: TensorDim | None = None
        self._loss_terms = loss_terms

    def find_samples(self, shapes: PassShapes) -> TensorDim | None:
        """Return where a pass shows its number of samples, as far as its shapes tell."""
        if self.place is not None and shapes.read(self.place) is not None:
            return self.place
        folded = folded_samples(shapes) if self._loss_terms is LossTerms.TOKEN else None
        return folded or find_samples(shapes)

    def samples(self, shapes: PassShapes) -> int | None:
        """Return B of a pass, as far as its shapes tell."""
        place = self.find_samples(shapes)
        return None if place is None else shapes.read(place)

    def count(self, shapes: PassShapes, said: Description, nearest: int | None) -> Counted:
        """Return the sizes of a micro-batch.

        Args:
            shapes: Its forward pass.
            said: The loop's description of it.
            nearest: Rows of the layer nearest to the loss.

        Raises:
            ModelError: Nothing tells n.
        """
        samples = self.samples(shapes)
        if samples is None:
            samples = _among(shapes, said.terms) or _among(shapes, said.divisor)
        if said.terms is not None:
            return Counted(samples, said.terms)
        if self._loss_terms is LossTerms.TOKEN and (shapes.outputs or nearest):
            return Counted(samples, float(find_positions(shapes, samples, nearest)))
        if samples is None:
            raise ModelError(
                f"{shapes.describe()}: the number of {self._loss_terms}s that the loss is a mean over can't be told "
                "from that. Call kfac.micro_batch(terms=...) before each forward pass with that number on this rank, "
                "and with divisor=... where the sum of their losses is divided by another one"
            )
        return Counted(samples, float(samples))

    def settle(self, shapes: PassShapes, terms: float | None, read: Sequence[int] = ()) -> TensorDim | None:
        """Return where n stands, by the number of terms that the loss has shown if it has, or else by the shapes.

        Args:
            shapes: A pass.
            terms: The loss's terms by its gradient; None if that doesn't tell.
            read: Numbers of the outputs that the loss reads; none of it is known.
        """
        numbers = [number for number in read if number < len(shapes.outputs)]
        differ = len({shape[0] for shape in shapes.outputs}) > 1
        if differ and 0 < len(numbers) < len(shapes.outputs):
            seen = replace(shapes, outputs=tuple(shapes.outputs[number] for number in numbers))
            found = self.settle(seen, terms)
            if found is None or found.kind != "outputs":
                return found
            return replace(found, tensor=numbers[found.tensor])
        # A single term is a loss that isn't divided at all.
        unknown = terms is None or terms < 1.5 or is_unbatched(shapes) or self._loss_terms is LossTerms.TOKEN
        told = None if unknown else find_number(shapes, terms or 0.0, _ROUNDING)
        return self.find_samples(shapes) if told is None else told


def _among(shapes: PassShapes, number: float | Tensor | None) -> int | None:
    """Return a number that the host knows if it is a size by which a pass's samples may be counted."""
    if number is None or isinstance(number, Tensor) or find_number(shapes, number) is None:
        return None
    return int(number)
