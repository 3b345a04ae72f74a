"""The order of calls: one step for one backward, and none between micro-batches.

Determined from torch's own counters: writing into a tensor raises its version, and a new gradient is another tensor.
Without hooks, and without asking the device.

    backward   step   step                       refused: K-FAC's gradients are still as it left them
    backward   step   optimizer   step           allowed: a replayed graph, say, leaves no trace in its gradients
    micro_batch(last=False)   step               nothing; refused later, if the optimizer turns out to have stepped
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass

from torch import Tensor

from kfac_dist.engines import Engine
from kfac_dist.errors import ModelError

# Gradients whose identity is kept; the versions of all are.
_KNOWN = 4


@dataclass(frozen=True)
class _Left:
    """Gradients and parameters as a step has left them.

    Attributes:
        gradients: The first gradients.
        number: Their number.
        versions: Of all gradients together.
        parameter: The place of the first parameter with a gradient, and its version; None if there is none.
    """

    gradients: tuple[weakref.ref[Tensor], ...]
    number: int
    versions: int
    parameter: tuple[int, int] | None

    @classmethod
    def of(cls, engine: Engine) -> _Left:
        """Take note of an engine's."""
        trained = list(engine.trained())
        present = [grad for p in trained if (grad := p.grad) is not None]
        return cls(
            tuple(weakref.ref(grad) for grad in present[:_KNOWN]),
            len(present),
            engine.times_written(present),
            next(((place, engine.times_written([p])) for place, p in enumerate(trained) if p.grad is not None), None),
        )

    def same(self, other: _Left) -> bool:
        """Whether no gradient has changed in between."""
        return (self.number, self.versions) == (other.number, other.versions) and all(
            own() is now() for own, now in zip(self.gradients, other.gradients, strict=True)
        )

    def stepped(self, engine: Engine) -> bool:
        """Whether the optimizer has stepped since."""
        if self.parameter is None:
            return False
        place, version = self.parameter
        parameter = next(itertools.islice(engine.trained(), place, None), None)
        return parameter is None or engine.times_written([parameter]) != version


class Turns:
    """Refuses steps out of turn, on every rank alike.

    Args:
        engine: The engine, which holds the gradients and doesn't drive its optimizer.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._left: _Left | None = None
        self._waited: _Left | None = None

    def check(self) -> None:
        """Look at the gradients that a step is about to precondition.

        Raises:
            ModelError: They are the gradients that the last step made.
        """
        left = self._left
        if left is None or not left.number or left.stepped(self._engine):
            return
        if left.same(_Left.of(self._engine)):
            raise ModelError(
                "kfac.step() was called again, and no backward has come since the last one: the same gradients would "
                "be preconditioned twice. Call it once before each optimizer.step(), after backward"
            )

    def taken(self) -> None:
        """Record the gradients that a step has made."""
        self._left = _Left.of(self._engine)
        self._waited = None

    def passed_over(self) -> None:
        """Take note of a step that did nothing, since more micro-batches were announced."""
        if self._waited is None:
            self._waited = _Left.of(self._engine)

    def check_waited(self) -> None:
        """Look whether a step that did nothing was the optimizer's turn.

        Raises:
            ModelError: The optimizer has stepped.
        """
        if self._waited is not None and self._waited.stepped(self._engine):
            self._waited = None
            raise ModelError(
                "the optimizer has stepped after kfac.micro_batch(last=False), which says that another micro-batch "
                "comes first, so that kfac.step() did nothing: say last=True before the last micro-batch of a step"
            )
