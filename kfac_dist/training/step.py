"""The passes of one step: micro-batches forward and back, with the loss divided over all of them.

How the loss is divided: engines average gradients over W ranks with equal weights, yet ranks may have unequal parts of
a batch. Each rank therefore backpropagates `Σℓ · W / n`, with n the terms of the whole step over all ranks and
micro-batches; the average is then the gradient of the mean over n, for any W and number of micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.inputs import each
from kfac_dist.training.data.batches import LoadedBatch, StepBatch
from kfac_dist.training.data.batches import TermCounts as TermCounts
from kfac_dist.training.game.players import PlayersKFAC
from kfac_dist.training.passes import explained, forward, loss_total, refuse_unused
from kfac_dist.training.records.window import Window
from kfac_dist.training.recovery.divergence import Guard
from kfac_dist.training.setup import RunParts

# Of the collectives by which an engine averages gradients; K-FAC sends gradients of its own.
AVERAGING = "averaged gradients"


class Passes:
    """Runs the passes of a run's steps.

    Args:
        parts: Model, loss, preconditioner.
        communicator: The ranks.
        guard: Tells all ranks of a loss that isn't finite.
        window: Takes the losses.
    """

    def __init__(self, parts: RunParts, communicator: Communicator, guard: Guard, window: Window) -> None:
        assert not isinstance(parts.kfac, PlayersKFAC)
        self._parts = parts
        self._kfac = parts.kfac
        self._communicator = communicator
        self._guard = guard
        self._window = window
        self._averaging_bytes = parts.engine.averaging_bytes(communicator.size)

    def run(self, batch: StepBatch, step: int) -> TermCounts:
        """Pass the micro-batches of a step through the model, forward and back; collective.

        Args:
            batch: This rank's part.
            step: Steps done before.

        Returns:
            The step's loss terms; the averaged gradients are in the engine.
        """
        counts, where = self._count_terms(batch), f"step {step + 1}"
        for micro, terms in zip(batch.micro_batches, counts.here, strict=True):
            last = micro is batch.micro_batches[-1]
            with self._parts.engine.synchronize(last):
                self._forward_backward(micro, terms, counts.everywhere / self._communicator.size, last, where)
        if self._averaging_bytes:  # the engine's own collectives, counted as one
            self._communicator.traffic.count(AVERAGING, self._averaging_bytes)
        return counts

    def figures(self) -> dict[str, float]:
        """Return numbers of the last step worth logging beside its loss; collective."""
        return {}

    def _forward_backward(
        self, micro: LoadedBatch, terms: Tensor | None, divisor: float | Tensor, last: bool, where: str
    ) -> None:
        kfac, engine = self._kfac, self._parts.engine
        if kfac is not None:
            by_class = kfac.solver_access.config.curvature.class_conditional is not None
            classes = self._parts.loss.labels(micro.targets) if by_class else None
            kfac.micro_batch(
                first_sample=micro.first_sample,
                divisor=divisor,
                terms=float(len(micro.targets)) if terms is None else terms,
                last=last,
                classes=classes,
            )
        module = engine.module
        inputs = each(engine.prepared, micro.inputs)
        if self._parts.stepper is not None:
            self._parts.stepper.micro_batch(inputs, micro.targets, micro.first_sample)
        with explained(where, module, micro.inputs, micro.targets):
            outputs = forward(engine.model, inputs)
            if kfac is not None:
                kfac.fisher_backward(outputs)
            total = loss_total(self._parts.loss, outputs, micro.targets, module)
            engine.backward(total / divisor * self._guard.poison(total))
        if last:
            refuse_unused(where, engine.unused())
        self._window.add_loss(total)

    def _count_terms(self, batch: StepBatch) -> TermCounts:
        """Count the step's loss terms; ranks add theirs up only where shapes don't tell them."""
        micro, loss = batch.micro_batches, self._parts.loss
        if not loss.counts_on_device:
            return TermCounts([None] * len(micro), batch.samples)
        here = [loss.count(part.targets) for part in micro]
        everywhere = torch.stack(here).sum()
        self._communicator.all_reduce(everywhere, label="loss terms").wait()
        return TermCounts(here, everywhere.clamp_(min=1).to(torch.get_default_dtype()))
