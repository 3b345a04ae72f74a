"""Measuring: from hooks that fire in backward to closed statistics, one optimizer step at a time.

Ordinary Fishers take their gradients from the user's backward. `mc` and `type2` run passes of their own from the
model's outputs; those carry neither the loss's divisor nor an AMP scale.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor

from kfac_dist.config.schema import CurvatureConfig, Fisher, LossTerms
from kfac_dist.curvature.block_tridiagonal_units import NeighbourMoments
from kfac_dist.curvature.blocks import Block, KroneckerBlock, LayerCall, MicroBatch
from kfac_dist.curvature.blocks.layer_calls import Batch
from kfac_dist.curvature.capture.arbiter import Arbiter, Mismatch
from kfac_dist.curvature.capture.capture import Capture, warn_of_accumulation
from kfac_dist.curvature.capture.provenance import readings_number, readings_of
from kfac_dist.curvature.capture.samples import TensorDim
from kfac_dist.curvature.capture.shared_outputs import Samples
from kfac_dist.curvature.class_conditional import Classes
from kfac_dist.curvature.factors import Side
from kfac_dist.curvature.statistics import RunningAverages
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.engines import Engine
from kfac_dist.errors import ModelError
from kfac_dist.preconditioner.invert.ekfac import SecondMoments
from kfac_dist.preconditioner.measure.loss_scale import LossScaleWatch, Outputs, time_dim, unscaling
from kfac_dist.preconditioner.measure.loss_terms import Counted, Description, TermCounter
from kfac_dist.preconditioner.measure.own_passes import ClassesOnly, OwnPasses, SumsOnly
from kfac_dist.preconditioner.measure.sampled_gradients import SampledLabelGradients
from kfac_dist.preconditioner.measure.scale import gradient_scale
from kfac_dist.preconditioner.phases import Phase, PhaseTimer
from kfac_dist.preconditioner.reduce.reduction import FactorReduction

_EVERY_SIDE = frozenset(Side)
PLACES = 8
"""Length of the numbers that `Measurement.places` makes of `Samples`."""


class Measurement:
    """Passes captured tensors to the blocks, and starts the reduction of complete blocks.

    Args:
        engine: The model, and the treatment of its losses.
        blocks: Its blocks.
        averages: The running averages of the statistics.
        reduction: Sends them.
        moments: EKFAC's, if there are any.
        config: Options of the measurement.
        communicator: The ranks; this one's number places its samples in the global batch.
        scaler: The AMP scaler whose scale output gradients carry, if any.
        phases: Records the time of measuring.
        sampled: Takes gradients at drawn labels, for parameters without a block.
        check_scale: Whether to compare the loss's gradient at the model's outputs with that of a plain mean.
        counter: Counts the loss's terms; by default a new one.
        arbiter: Compares captured rows with the blocks' gradients; by default a new one, of all blocks.

    Attributes:
        mismatches: Blocks that the last step has shown to be wrong, the same on every rank.
    """

    def __init__(
        self,
        engine: Engine,
        blocks: tuple[Block, ...],
        averages: RunningAverages,
        reduction: FactorReduction,
        moments: SecondMoments | None,
        config: CurvatureConfig,
        *,
        communicator: Communicator,
        scaler: torch.amp.GradScaler | None,
        phases: PhaseTimer,
        sampled: SampledLabelGradients | None = None,
        check_scale: bool = True,
        counter: TermCounter | None = None,
        arbiter: Arbiter | None = None,
    ) -> None:
        self._engine = engine
        self._blocks = blocks
        self._averages = averages
        self._reduction = reduction
        self._moments = moments
        self._factors = False
        self._config = config
        self._communicator = communicator
        self._scaler = scaler
        self._phases = phases
        self._sampled = sampled
        self._own_backward = config.fisher in (Fisher.MC, Fisher.TYPE2)
        self._own_passes = OwnPasses(config)
        self._sides = frozenset({Side.A}) if config.fisher is Fisher.INPUT_ONLY else _EVERY_SIDE
        self._terms = TermCounter(config.loss_terms) if counter is None else counter
        self._capture = Capture(
            engine.module,
            blocks,
            self._measure,
            own_backward=self._own_backward,
            find_samples=self._terms.find_samples,
        )
        self._neighbours = NeighbourMoments(blocks)
        self._scale = LossScaleWatch(
            engine.module, lambda: self._capture.batch, self._outputs_gradient_came, compare=check_scale
        )
        self._arbiter = Arbiter(blocks) if arbiter is None else arbiter
        self._judged_before = False
        self.mismatches: tuple[Mismatch, ...] = ()
        self._step = 0
        self._description: Description | None = None
        self._went_back = False
        self._unlabelled = False
        self._uncounted: ModelError | None = None
        self._unclear: str | None = None
        self._entered: set[Batch] = set()

    @property
    def active(self) -> bool:
        """Whether this step is measured."""
        return self._capture.active

    def begin(self, step: int, *, factors: bool, moments: bool) -> None:
        """Prepare for a step that measures factors, EKFAC's moments, both or nothing."""
        active = factors or moments
        # A step that measured only one of them has entered its terms in the other, too, where they aren't closed yet.
        for averages in (self._averages, *([] if self._moments is None else [self._moments.averages])):
            averages.end_step()
        self._factors = factors
        if self._moments is not None:
            self._moments.begin(active=moments)
        self._step = step
        self._description = None
        self._went_back = self._unlabelled = False
        self._uncounted = None
        self._entered.clear()
        self.mismatches = ()
        if self._sampled is not None:
            self._sampled.reset()
        self._capture.reset()
        self._neighbours.reset()
        self._capture.active = active
        self._capture.arbiter = self._arbiter if active and self._arbiter.open else None
        self._scale.begin(active=active)

    def samples(self) -> dict[str, int]:
        """Return how each block's output relates to the samples, a number of `broadcast.Samples`; 0 if not known."""
        known = self._capture.samples
        return {b.name: 0 if known is None else int(known.get(b.name, Samples.OWN)) for b in self._blocks}

    def places(self) -> dict[str, int]:
        """Return how each block's output relates to the samples and where these are in it, as a number; 0: not known.

        It is `Samples` + `PLACES` · `readings_number`.
        """
        found = {name: readings_number(readings) for name, readings in self._capture.readings.items()}
        if None in found.values():
            return dict.fromkeys(self.samples(), 0)  # a resumed run finds it out again
        return {name: known and known + PLACES * (found.get(name) or 0) for name, known in self.samples().items()}

    def load_places(self, values: Mapping[str, int]) -> None:
        """Load the result of `places`, so that a resumed run needn't determine it again."""
        known = all(values.get(block.name, 0) for block in self._blocks)
        self._capture.samples = {name: Samples(number % PLACES) for name, number in values.items()} if known else None
        self._capture.readings = {name: readings_of(number // PLACES) for name, number in values.items()}

    @property
    def judged(self) -> set[str]:
        """Blocks that the arbiter has judged."""
        return {block.name for block in self._blocks} - self._arbiter.open

    @property
    def checks_scale(self) -> bool:
        """Whether the loss's scale is still to be looked at."""
        return not self._scale.over

    @property
    def terms(self) -> float | Tensor:
        """Loss terms that this rank averages over in this step; 0 if unknown."""
        # DeepSpeed divides by the accumulated micro-batches itself: the mean runs over all of them.
        accumulated = self._engine.gradient_scale / self._engine.backward_pass().scale
        if self._description is not None and self._description.divisor is not None:
            return self._description.divisor * accumulated
        try:
            return self._count(self._capture.batch).terms * accumulated
        except ModelError:  # raised in `finish`, if anything was measured
            return 0.0

    def describe(self, description: Description) -> None:
        """Take the loop's description of its next micro-batch."""
        self._capture.describe(description)
        self._description = description

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context whose forward and backward passes are not measured."""
        before = self._capture.paused
        self._capture.paused = self._arbiter.paused = True
        try:
            with self._scale.unwatched():
                yield
        finally:
            self._capture.paused = self._arbiter.paused = before

    def fisher_backward(self, outputs: Tensor) -> None:
        """Measure by K-FAC's own passes from the model's outputs, if the Fisher needs them and this step measures."""
        if not self.active or not self._own_backward:
            return
        batch = self._capture.batch
        self._went_back = True
        try:
            dim, counted = self._count_outputs(outputs, batch)
        except ModelError as error:  # told in `finish`, on every rank
            self._uncounted = error
            return
        outputs = outputs.movedim(dim, 0)
        micro = self._micro_batch(batch, counted, own=True)
        by_column = list(self._own_passes.classes(outputs, self._step, micro.first_sample))
        # Consumed as columns are: each vector is measured before the next is made.
        classes = iter(by_column or itertools.repeat(None))
        current: Classes | None = None

        def columns() -> Iterator[Tensor]:
            nonlocal current
            for column in self._own_passes.columns(outputs, self._step, micro.first_sample):
                current = next(classes)
                yield column

        def measure(block: Block, calls: list[LayerCall], first: bool) -> None:
            calls = [call for call in calls if not call.empty]
            if not calls:
                return
            sizes = _of_rows(micro, calls)
            if self._moments is not None and isinstance(block, KroneckerBlock):
                self._moments.measure(block, calls, sizes, counted=first)
            if not self._factors or not self._reduction.accepts(block.name):
                return
            if block.by_class and current is not None:
                of_classes = self._averages if first else ClassesOnly(self._averages)
                block.measure(calls, replace(sizes, classes=current), of_classes, _EVERY_SIDE)
                return
            sink = self._averages if first else SumsOnly(self._averages)
            sides = _EVERY_SIDE if first else _EVERY_SIDE - {Side.A}
            block.measure(calls, sizes, sink, sides)
            self._neighbours.measure(block, calls, sizes, sink, sides)

        self._enter(batch, micro, by_column)
        with self._scale.unwatched(), self._phases(Phase.STATISTICS):
            if self._sampled is not None and self._factors:
                drawn = self._own_passes.drawn_labels(outputs, self._step, micro.first_sample)
                self._sampled.add(outputs, drawn, float(micro.terms))
            self._capture.backpropagate(outputs, self._engine.own_passes(columns()), measure)
        if self._last and self._factors:
            for block in self._blocks:
                self._reduction.completed(block.name)

    def finish(self, finite: Tensor, *, refreshes: bool) -> Tensor:
        """Close the step's statistics; returns whether all ranks take the step, see `FactorReduction.finish`.

        Args:
            finite: Whether this rank's gradients are finite, 0-dim bool.
            refreshes: Whether inverses are refreshed at this step, when blocks seen late are judged, too.

        Raises:
            ModelError: The Fisher needs `fisher_backward`, and it wasn't called; or the loss is no mean.
        """
        self._capture.flush()
        self._enter_unused()
        if self._own_backward and not self._went_back:
            self._close(torch.zeros_like(finite))  # the other ranks may be waiting there
            raise ModelError(
                f"kfac.curvature.fisher is {self._config.fisher}: call kfac.fisher_backward(outputs) after the forward "
                "pass, before loss.backward()"
            )
        if self._unlabelled:
            self._close(torch.zeros_like(finite))
            raise ModelError(
                "kfac.curvature.class_conditional keeps statistics apart by class: call kfac.micro_batch(classes="
                "labels) before each forward pass, with a label for each of its samples or tokens"
            )
        if self._uncounted is not None and self._scale.over:
            self._close(torch.zeros_like(finite))
            raise self._uncounted
        # Of the user's own backward: a look at the model that no backward follows is no accumulation.
        passes = self._capture.passes if self._own_backward else len(self._capture.passes_back)
        if passes > 1 and self._description is None and self._engine.backward_pass().last is None:
            warn_of_accumulation(passes)
        late = self._reduction.late
        taken = self._close(finite)
        if late:
            warnings.warn(
                f"{', '.join(sorted(late))} ran backward again after the micro-batch that kfac.micro_batch(last=True) "
                "had announced as the step's last; it was not measured",
                stacklevel=3,
            )
        if self._arbiter.open and (refreshes or not self._judged_before):
            self._judge()
        if not self._scale.over:
            self._terms.place = self._scale.judge(
                self._config.likelihood,
                self._communicator,
                passes=passes,
                scaled=self._scaler is not None,
                place=self._terms.place,
                uncounted=self._uncounted,
                unclear=self._unclear,
            )
        return taken

    def _judge(self) -> None:
        """Have the arbiter compare blocks with their gradients, and agree; collective.

        A block that any rank finds wrong is wrong. Blocks that no rank has seen stay open.
        """
        answers = self._communicator.gather_objects(self._arbiter.judge(), label="agreement")
        seen = set().union(*(judged for judged, _ in answers))
        self._arbiter.open -= seen
        self._judged_before |= bool(seen)
        worst: dict[str, Mismatch] = {}
        for mismatch in (found for _, wrong in answers for found in wrong):
            if mismatch.block not in worst or mismatch.off > worst[mismatch.block].off:
                worst[mismatch.block] = mismatch
        self.mismatches = tuple(worst[block.name] for block in self._blocks if block.name in worst)

    def discard(self) -> None:
        """Forget the step's measurements; collective if this step reduces."""
        self._capture.reset()
        self._arbiter.reset()
        self._close(torch.zeros((), dtype=torch.bool, device=self._averages.device))

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._capture.remove()
        self._scale.stop()

    def _close(self, taken: Tensor) -> Tensor:
        """Move all averages that this step has measured, if every rank takes it; returns whether they do."""
        if self._factors:
            taken = self._reduction.finish(taken)
        return taken if self._moments is None else self._moments.finish(taken)

    @property
    def awaits_more(self) -> bool:
        """Whether the loop has announced another micro-batch of this step."""
        return self._description is not None and not self._description.last

    @property
    def _last(self) -> bool:
        """Whether loop or engine has promised that no other backward of this step follows.

        Silence is no promise: a second loss, accumulation or an attack may follow, and what has been sent is closed.
        """
        if self._description is not None:
            return self._description.last
        return bool(self._engine.backward_pass().last)

    def _outputs_gradient_came(self, outputs: Outputs, batch: Batch) -> MicroBatch | None:
        """Let the loss say over how many terms it is a mean; return the micro-batch, None where its n isn't known.

        Waits for the device, in the first measured step.
        """
        said = _said(batch)
        if self._terms.place is None and said.divisor is None and said.terms is None:
            scale = gradient_scale(outputs.values, outputs.gradient, self._config.likelihood)
            raw = self._micro_batch(batch, Counted(None, 1.0), own=False)
            told = None if scale is None else 1 / (scale * unscaling(raw))
            self._terms.place = self._terms.settle(batch.shapes, told, outputs.read)
            if told is None:
                self._choose_dimension(outputs, self._terms.place, said)
        elif self._terms.place is None and isinstance(said.terms, int | float):
            self._choose_dimension(outputs, self._terms.find_samples(batch.shapes), said)
        with suppress(ModelError):  # raised in `finish`
            return self._micro_batch(batch, self._count(batch), own=False)
        return None

    def _choose_dimension(self, outputs: Outputs, place: TensorDim | None, said: Description) -> None:
        """Choose between samples and time where the model treats the first two dimensions of its outputs alike."""
        if self._capture.traced is None or self._config.loss_terms is LossTerms.TOKEN:
            return
        provenance, shapes = self._capture.traced
        [index, *others] = outputs.read
        if others or place != TensorDim("outputs", index) or not provenance.leaves_open(shapes, index):
            return
        sizes = shapes.outputs[index][:2]
        time = time_dim(outputs.gradient) if said.terms is None else None
        if said.terms is not None:
            time = 0 if sizes[0] != said.terms == sizes[1] else 1
        if time == 0:
            self._terms.place = TensorDim("outputs", index, 1)
        elif time is None and sizes[0] != sizes[1]:
            self._unclear = (
                f"the model returns {list(shapes.outputs[index])}, treats the first two dimensions alike, and nothing "
                f"tells which of them is the samples': {sizes[0]} samples are taken. Call kfac.micro_batch(terms="
                f"{sizes[0]}) before each forward pass if that is right, and with terms={sizes[1]} if time comes first"
            )

    def _measure(self, block: Block, calls: list[LayerCall]) -> None:
        calls = [call for call in calls if not call.empty]
        if not calls:
            return  # as if the layer hadn't been called
        batch = calls[0].batch
        try:
            micro = self._micro_batch(batch, self._count(batch), own=False)
        except ModelError as error:  # raised in `finish`, on every rank
            self._uncounted = error
            return
        self._enter(batch, micro)
        micro = _of_rows(micro, calls)
        if self._factors and not self._reduction.accepts(block.name):
            return
        if block.by_class and self._config.class_slots:
            if micro.classes is None:  # raised in `finish`, where no rank waits for another
                self._unlabelled = True
                return
        elif micro.classes is not None:
            micro = replace(micro, classes=None)
        with self._phases(Phase.STATISTICS):
            if self._factors:
                block.measure(calls, micro, self._averages, self._sides)
                self._neighbours.measure(block, calls, micro, self._averages, self._sides)
            if self._moments is not None and isinstance(block, KroneckerBlock):
                self._moments.measure(block, calls, micro, counted=True)
        if self._factors and self._last and not self._capture.waits_for(block.name):
            with self._phases(Phase.REDUCTION):
                self._reduction.completed(block.name)

    def _enter(self, batch: Batch, micro: MicroBatch, by_column: Sequence[Classes] = ()) -> None:
        """Count the terms of a micro-batch for every layer, also for those that it doesn't use.

        Args:
            batch: It.
            micro: Its sizes.
            by_column: The classes of the columns that K-FAC sends back itself.
        """
        kept = micro.terms / micro.stride
        given = by_column or ([] if micro.classes is None else [micro.classes])
        counts = [classes.counts(kept) for classes in given]
        by_class = torch.stack(counts).sum(0) if counts else None
        for averages in (self._averages, *([] if self._moments is None else [self._moments.averages])):
            averages.enter(batch, kept, by_class)
        self._entered.add(batch)

    def _enter_unused(self) -> None:
        """Count the terms of micro-batches that have used no covered layer of this rank at all.

        Where the loop doesn't describe them, a forward pass may also have been a mere look at the model.
        """
        for batch in self._capture.batches:
            sure = batch.description is not None or self._capture.passes == 1
            if sure and batch not in self._entered and batch.shapes.inputs:
                with suppress(ModelError):  # nothing is measured by it
                    self._enter(batch, self._micro_batch(batch, self._count(batch), own=False))

    def _given_classes(self, said: Description) -> Classes | None:
        config = self._config
        if said.classes is None or config.class_conditional is None or config.class_conditional.classes is None:
            return None
        return Classes.of(said.classes, config.class_conditional.classes, config.class_slots)

    def _count(self, batch: Batch) -> Counted:
        """Return the sizes of a micro-batch.

        Raises:
            ModelError: Nothing tells its number of terms.
        """
        return self._terms.count(batch.shapes, _said(batch), round(batch.positions))

    def _count_outputs(self, outputs: Tensor, batch: Batch) -> tuple[int, Counted]:
        """Return the samples' dimension of the outputs that labels are drawn for, and the sizes of their pass.

        No position of them is ignored. What isn't the model's own outputs has its samples first.

        Raises:
            ModelError: Nothing tells the samples.
        """
        place, said = self._terms.find_samples(batch.shapes), _said(batch).terms
        own = [number for number, shape in enumerate(batch.shapes.outputs) if shape == tuple(outputs.shape)]
        dim = place.dim if place is not None and place.kind == "outputs" and place.tensor in own else 0
        samples = outputs.shape[dim]
        if self._config.loss_terms is LossTerms.TOKEN:
            return dim, Counted(samples, outputs.numel() / max(outputs.shape[-1], 1))
        if own and place is None:
            samples = round(float(said)) if said is not None else self._count(batch).samples or samples
        return dim, Counted(samples, float(samples))

    def _micro_batch(self, batch: Batch, counted: Counted, *, own: bool) -> MicroBatch:
        """Return the sizes and scales of a micro-batch; K-FAC's `own` gradients carry no divisor and no loss scale."""
        said = _said(batch)
        done = self._engine.backward_pass()
        batch_size, comm = counted.samples, self._communicator
        first_sample = (done.index * comm.size + comm.rank) * (batch_size or 0)
        stride = round(1 / self._config.sample_fraction)
        return MicroBatch(
            terms=counted.terms,
            loss_terms=self._config.loss_terms,
            batch_size=batch_size,
            first_sample=first_sample if said.first_sample is None else said.first_sample,
            divisor=1.0 if own else said.divisor,
            inverse_scale=None if own else self._inverse_scale(done.scale),
            stride=stride,
            phase=self._step // self._config.factor_every % stride,
            classes=None if own else self._given_classes(said),
        )

    def _inverse_scale(self, scale: float) -> float | Tensor | None:
        """Return the inverse of an AMP loss scale, or of the engine's own; None if there is none."""
        if self._scaler is not None:
            return self._scaler.scale(torch.ones((), device=self._averages.device, dtype=torch.float32)).reciprocal()
        return None if scale == 1.0 else 1.0 / scale


def _of_rows(micro: MicroBatch, calls: Sequence[LayerCall]) -> MicroBatch:
    """Return a micro-batch without its number of samples for calls whose rows were picked one by one."""
    picked = all(call.reading is not None and call.reading.picked for call in calls)
    return replace(micro, batch_size=None) if picked else micro


def _said(batch: Batch) -> Description:
    return batch.description if isinstance(batch.description, Description) else Description()
