"""Hooks that bring each block its inputs and output gradients, and that cost nothing on steps that don't measure.

A block watches its layer and records each call's input and output; the output is asked for its gradient, and when
backward has brought the gradients of all uses of the layer, the block measures at once and the tensors are let go. The
gradient is asked of the output *tensor*, so that an in-place activation behind the layer doesn't matter.

    plain                     forward: input, output              backward: gradient → measure
    checkpoint, non-entrant   forward: output only                backward: gradient; input, as it is computed again
    checkpoint, re-entrant    forward: nothing (no gradients)     backward: input, output, gradient → measure

Several backward passes through one graph (`retain_graph=True`) add up: a call is measured once its graph is freed, or
at the end of the step. Only gradients of the loss count, which reach the layer's parameters: passes of
`torch.autograd.grad` to other tensors, and passes that are themselves differentiated, are not measured.

An input is held only as long as autograd holds it, too: under activation checkpointing not at all, under autocast in
the precision that autograd keeps, and no longer than the graph, so that a forward pass whose outputs are dropped leaves
nothing behind.

K-FAC's own backward passes (`mc`, `type2`) ask autograd for the gradients at the outputs only: no parameter gradient is
ever computed for them, so nothing has to be thrown away. They hold inputs from forward to `fisher_backward`.
"""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils.rnn import PackedSequence

from kfac_dist.compat.torch import break_graph, eagerly, is_batched, of_the_loop
from kfac_dist.config.schema import Sharing
from kfac_dist.curvature.blocks import Block, LayerCall
from kfac_dist.curvature.blocks.layer_calls import Batch, Handle, Pending
from kfac_dist.curvature.blocks.layers.norm import NormBlock
from kfac_dist.curvature.capture.arbiter import Arbiter
from kfac_dist.curvature.capture.autograd import (
    Purpose,
    Retention,
    accumulators,
    after_backward,
    backward_pass_id,
    below_view,
    checkpointed_region,
    compile_anew,
    differentiated,
    in_backward,
    purpose,
)
from kfac_dist.curvature.capture.call_mode import leave_ended_calls
from kfac_dist.curvature.capture.constants import Constants
from kfac_dist.curvature.capture.provenance import Provenance, Reading, Readings
from kfac_dist.curvature.capture.samples import UNBATCHED, PassShapes, TensorDim, find_samples, shapes_of
from kfac_dist.curvature.capture.shared_outputs import Samples, consumers_of, expand, samples_of
from kfac_dist.errors import ModelError
from kfac_dist.hooks import after_forward, before_forward

_NO_FULL_GRAPH = (
    "K-FAC measures a layer between two compiled pieces of the model: leave out fullgraph=True, or compile only "
    "modules without K-FAC blocks (kfac.curvature.exclude)"
)


class _BackwardPass:
    """One run of autograd's engine: the calls to which it brought gradients, and whether it keeps its graph."""

    def __init__(self) -> None:
        self.retention: Retention | None = Retention()
        self.freed = False
        self.reached: list[tuple[Block, Batch, LayerCall]] = []

    def look(self) -> bool:
        """Return whether the graph is known to be freed as the pass goes on."""
        if self.retention is not None and self.retention.freed:
            self.freed, self.retention = True, None
        return self.freed


class _Graph:
    """Held by the graph of one call and by nothing else: when it goes, no gradient can come any more."""

    def __init__(self, forward_pass: int, shapes: PassShapes) -> None:
        self.forward_pass = forward_pass
        self.shapes = shapes


class _Recorder:
    """The records of one block; see `blocks.layer_calls.Recorder`."""

    def __init__(self, capture: Capture, block: Block) -> None:
        self._capture = capture
        self._block = block
        self._record = eagerly(capture.record)

    @property
    def watching(self) -> bool:
        """Whether forward passes are measured now."""
        watching = self._capture.watching
        if not watching and self._capture.active:
            self._capture.note_unobserved(self._block)
        return watching

    def refuse(self, cause: str) -> None:
        """See `blocks.calls.Recorder.refuse`."""
        self._capture.refuse(self._block, cause)

    def record(
        self,
        inputs: Tensor,
        output: Tensor | None,
        *,
        source: nn.Module,
        arrange: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """See `blocks.calls.Recorder.record`."""
        if not self.watching:
            return None
        if torch.compiler.is_dynamo_compiling():
            break_graph(_NO_FULL_GRAPH)
        replaced: Tensor | None = self._record(self._block, inputs, output, source, arrange)
        return replaced


class Capture:
    """Collects uses of blocks between forward and backward.

    Args:
        model: The bare model; its own call marks where a forward pass begins.
        blocks: The blocks to watch.
        completed: Called with a block and its calls as soon as all their gradients are there.
        own_backward: The gradients come from `backpropagate`, not from the user's backward.
        find_samples: Returns where a pass's shapes show the number of samples, as far as they tell.

    Attributes:
        active: Whether forward passes are being watched; the owner sets it once a step.
        paused: Whether to ignore the passes that run now, forward and back.
        passes: Forward passes of the model since `reset`.
        passes_back: Those of them that the user's backward has come back to, by number.
        samples: Blocks whose outputs all samples share; None until a forward pass has shown which.
        readings: Position of the samples in the tensors of each block's layer, as found in that pass.
        arbiter: Compares uses with the gradients that autograd makes of them, while it is set.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        completed: Callable[[Block, list[LayerCall]], None],
        *,
        own_backward: bool,
        find_samples: Callable[[PassShapes], TensorDim | None] = find_samples,
    ) -> None:
        self.active = False
        self.paused = False
        self.passes = 0
        self.passes_back: set[int] = set()
        self.arbiter: Arbiter | None = None
        self._completed = completed
        self._own_backward = own_backward
        self._find_samples = find_samples
        self._ahead: TensorDim | None = None
        self._batch_size: int | None = None
        self.samples: dict[str, Samples] | None = None
        self.readings: dict[str, Readings] = {}
        self._traced: tuple[Provenance, PassShapes] | None = None  # not read yet: the loss may say where samples are
        self._untold: set[str] = set()
        self._nodes: list[tuple[str, Any, Any]] = []
        self._constants: list[Constants | None] = []  # of the forward passes that are under way
        self._blocks = {block.name: block for block in blocks}
        self._description: object | None = None
        self._batches: list[Batch] = []
        # Blocks seen in a forward pass proper since `reset`: their calls during backward are activation checkpointing
        # computing them again. Those of others are their first with gradients (re-entrant kind).
        self._ran_forward: set[str] = set()
        # Blocks reached by `backward` since `reset`: gradients queried of them are no part of the loss.
        self._of_the_loss: set[str] = set()
        self._backward_passes: dict[int, _BackwardPass] = {}
        self._handles: list[Handle] = [
            before_forward(model, self._forward_begins, with_kwargs=True),
            after_forward(model, self._forward_ended, always_call=True),
            *(handle for block in blocks for handle in block.watch(_Recorder(self, block))),
            *(before_forward(layer, self._note_time_first, with_kwargs=True) for layer in _time_first_layers(model)),
        ]
        compile_anew()

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.reset()
        if self.arbiter is not None:
            self.arbiter.remove()

    def reset(self) -> None:
        """Forget uses whose gradients never came, and begin a new optimizer step."""
        for batch in self._batches:
            for pending in batch.pending.values():
                pending.clear()
        self._batches.clear()
        self._backward_passes.clear()
        self._ran_forward.clear()
        self._of_the_loss.clear()
        self._description = None
        self.passes = 0
        self.passes_back.clear()
        self._batch_size = None
        self._nodes.clear()
        self._traced = None

    @property
    def watching(self) -> bool:
        """Whether forward passes that run now are measured."""
        return self.active and not self.paused and torch.is_grad_enabled() and of_the_loop()

    @property
    def batch(self) -> Batch:
        """The micro-batch of the forward passes that run now."""
        if not self._batches:
            self._batches.append(Batch(self._description, self._count_samples))
        return self._batches[-1]

    @property
    def batches(self) -> Sequence[Batch]:
        """All micro-batches of this step."""
        return self._batches

    @property
    def batch_size(self) -> int | None:
        """Samples of the last forward pass, None if nothing tells."""
        return self._batches[-1].batch_size if self._batches else None

    @property
    def traced(self) -> tuple[Provenance, PassShapes] | None:
        """The forward pass whose dimensions have been followed, with its shapes, until its first gradient comes."""
        return self._traced

    def note_unobserved(self, block: Block) -> None:
        """Take note of a call that is not measured: its gradient may still come with the loss's."""
        if self.arbiter is None or torch.compiler.is_dynamo_compiling() or not torch.is_grad_enabled():
            return
        if not of_the_loop():
            self.arbiter.transformed.add(block.name)
        elif self.paused:
            self.arbiter.unobserved.add(block.name)

    def describe(self, description: object) -> None:
        """Begin a micro-batch of which the loop says something."""
        self._flush_settled()  # open calls belong to the last micro-batch
        self._description = description
        self._batches.append(Batch(description, self._count_samples))

    def waits_for(self, block: str) -> bool:
        """Whether uses of a block are still to be measured, in any micro-batch of this step."""
        return any(batch.waits_for(block) for batch in self._batches)

    def flush(self) -> None:
        """Measure all uses that have their gradient, whether or not others of their block will ever get one."""
        for batch in self._batches:
            for name, pending in batch.pending.items():
                for call in pending.calls:
                    if name not in self._of_the_loss:
                        call.take_queried()
                    self._note_positions(self._blocks[name], call)
                if any(call.measurable for call in pending.calls):
                    self._finish(self._blocks[name], pending)

    def _flush_settled(self) -> None:
        """Measure blocks of which some uses got their last gradient and others none (outputs that no loss reads)."""
        for batch in self._batches:
            for name, pending in batch.pending.items():
                ready = [call.settled for call in pending.calls if call.measurable]
                if ready and all(ready):
                    self._finish(self._blocks[name], pending)

    def backpropagate(
        self, outputs: Tensor, columns: Iterable[Tensor], measure: Callable[[Block, list[LayerCall], bool], None]
    ) -> None:
        """Send vectors back from the model's outputs to the blocks' outputs, and measure after each.

        Args:
            outputs: The model's outputs, still attached to their graph.
            columns: Vectors of the outputs' shape; one backward pass each.
            measure: Called with a block, its calls and whether this is the first column.
        """
        live = [(name, call) for batch in self._batches for name, own in batch.pending.items() for call in own.calls]
        for name, call in live:
            self._read(self._blocks[name], call)
        edges = [call.edge for _, call in live if call.edge is not None]
        first = True
        for column in columns if edges else ():
            grads = torch.autograd.grad(outputs, edges, column, retain_graph=True, allow_unused=True)
            reached: dict[str, list[LayerCall]] = {}
            for (name, call), grad in zip(live, grads, strict=True):
                if grad is not None:
                    reached.setdefault(name, []).append(call.with_gradient(grad))
            for name, calls in reached.items():
                block = self._blocks[name]
                self._check_untouched(block, calls)
                with _full_precision(calls):
                    if not first or self.arbiter is None or self.arbiter.captured(block, calls, Purpose.OTHER):
                        measure(block, calls, first)
            first = False
        for batch in self._batches:
            for pending in batch.pending.values():
                pending.clear()

    def _count_samples(self, shapes: PassShapes) -> int | None:
        place = self._find_samples(shapes)
        return None if place is None else shapes.read(place)

    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._note_pass(args, kwargs)
        if torch.compiler.is_dynamo_compiling():
            return
        leave_ended_calls()
        self._constants = [mode for mode in self._constants if mode is None or not mode.over]
        looks = self.watching and self.samples is None and self.batch_size != 1
        self._constants.append(Constants(module, (args, kwargs)) if looks else None)
        if (constants := self._constants[-1]) is not None:
            constants.begin()

    def _note_time_first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.watching or in_backward():
            return
        shapes = shapes_of((args, kwargs))[:1]
        if args and isinstance(args[0], PackedSequence):
            shapes = ((len(args[0].batch_sizes), int(args[0].batch_sizes[0]), 1),)  # on the host
        # Without a batch, `[T, d]` is all that such a layer is given.
        self.batch.shapes.time_first += [shape for shape in shapes if len(shape) > 2]

    def _note_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.watching or (self.passes and in_backward()):
            return
        if self.batch.went_back:
            self._flush_settled()  # open calls belong to an earlier micro-batch, not to this one
            self._batches.append(Batch(self._description, self._count_samples))
        self.batch.shapes = shapes = PassShapes(shapes_of((args, kwargs)))
        # Known before the outputs are: by the place at which the inputs of an earlier pass had it.
        ahead = None if self._ahead is None else shapes.read(self._ahead)
        self._batch_size = self._count_samples(shapes) if ahead is None else ahead
        self.passes += 1

    def _forward_ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Complete the pass's shapes; find, once, the layers whose outputs all samples share, see `broadcast`."""
        constants = None
        if not torch.compiler.is_dynamo_compiling() and self._constants:
            constants = self._constants.pop()
        if constants is not None:
            constants.end()
        if output is None or not self.watching or in_backward():
            return  # without an output, an exception has ended the pass
        shapes = self.batch.shapes
        shapes.outputs = shapes_of(output, trained=True)
        if constants is not None:
            constants.provenance.ended(output)
            self._traced = constants.provenance, shapes
        batch_size = self._count_samples(shapes)
        firsts = [shape[0] for shape in shapes.inputs]
        self._ahead = TensorDim("inputs", firsts.index(batch_size)) if batch_size in firsts else None
        nodes, self._nodes = self._nodes, []
        if not nodes or batch_size is None or batch_size == 1:
            return
        consumers = consumers_of(output)
        sizes = {size for shape in shapes.inputs if batch_size not in shape[:2] for size in shape}
        self.samples = {}
        for name, own, below in nodes:
            node = own if own in consumers else below  # an activation in place takes a view's own node out of the graph
            samples = samples_of(node, consumers, batch_size, () if constants is None else constants, sizes)
            if self._ahead is None and samples in (Samples.EXPAND, Samples.PREPEND):
                samples = Samples.SHARED  # no input tells how often to expand
            if samples is not Samples.OWN and self.samples.get(name) is not Samples.SHARED:
                self.samples[name] = samples
                self.batch.of(name).clear()  # the calls of this pass are of no use
                if self.arbiter is not None:
                    self.arbiter.postpone(name)
        if left := [name for name, samples in self.samples.items() if samples is Samples.SHARED]:
            warnings.warn(
                f"the outputs of {', '.join(left)} are shared by all samples of a batch, so that no sample has a "
                "gradient of its own there: these layers keep their plain gradient. Expand their inputs over the batch "
                "to have them preconditioned, or name them in kfac.curvature.exclude",
                stacklevel=2,
            )

    def record(
        self,
        block: Block,
        inputs: Tensor,
        output: Tensor | None,
        source: nn.Module,
        arrange: Callable[[Tensor], Tensor] | None,
    ) -> Tensor | None:
        """Take note of one call of a block's layer; see `blocks.calls.Recorder.record`."""
        samples = Samples.OWN if self.samples is None else self.samples.get(block.name, Samples.OWN)
        if samples is Samples.OWN:
            self._take_note(block, inputs, output, source, arrange)
            return None
        if samples is Samples.SHARED or self._batch_size is None:
            return None
        inputs = expand(inputs, self._batch_size, samples)
        output = None if output is None else expand(output, self._batch_size, samples)
        self._take_note(block, inputs, output, source, arrange)
        return output

    def _take_note(
        self,
        block: Block,
        inputs: Tensor,
        output: Tensor | None,
        source: nn.Module,
        arrange: Callable[[Tensor], Tensor] | None,
    ) -> None:
        region = checkpointed_region()
        if not in_backward():
            self._ran_forward.add(block.name)
        elif block.name in self._ran_forward:
            # Computed again for backward: nothing new, except for inputs that were not held the first time.
            if region is not None:
                self._provide(region, inputs, block)
            return
        if output is None or not output.requires_grad:
            return
        if self._constants and (constants := self._constants[-1]) is not None:
            constants.provenance.called(block.name, inputs)
        batch = self.batch
        batch.shapes.layers.append(UNBATCHED if block.unbatched(inputs) else tuple(inputs.shape))
        batch.shapes.nearest = output.numel()
        pending = batch.of(block.name)
        arranged = arrange is not None
        written, arrange = below_view(output, arrange)
        if self.samples is None and not in_backward():
            self._nodes.append((block.name, output.grad_fn, written.grad_fn))
        own = block.own_tensors(source)
        found = accumulators(written, own)
        call = LayerCall(source, output.shape, arrange=arrange, owners=tuple(found.values()), batch=batch)
        call.arranged, call.number = arranged, pending.seen
        pending.seen += 1
        call.leading = max(inputs.ndim - 1, 1) if arranged else block.leading(output.shape)
        later = region is not None and not self._own_backward
        if not later:
            call.keep(block.kept(inputs))
        pending.calls.append(call)
        pending.regions.append(weakref.ref(region) if later else None)
        if self.arbiter is not None:
            self.arbiter.watch(block, found)
            if any(tensor.grad_fn is not None for tensor in own.values()):
                self.arbiter.replaced.add(block.name)
            if self._own_backward:
                written.register_hook(functools.partial(self._judge, block, copy.copy(call)))
        if self._own_backward:
            call.edge = get_gradient_edge(written)
        else:
            # The graph may outlive backward; the measured tensors must not.
            graph, reference = _Graph(self.passes, batch.shapes), weakref.ref(call)
            weakref.finalize(graph, _graph_went, pending, reference).atexit = False
            written.register_hook(functools.partial(self._gradient_came, block, pending, reference, graph))

    def _provide(self, region: object, inputs: Tensor, block: Block) -> None:
        for batch in self._batches:
            pending = batch.of(block.name)
            if pending.provide(region, inputs, block.kept):
                if pending.complete:
                    self._finish(block, pending)
                return

    def _gradient_came(
        self, block: Block, pending: Pending, reference: weakref.ref[LayerCall], graph: _Graph, grad: Tensor
    ) -> None:
        if self.arbiter is not None and differentiated():
            self.arbiter.differentiated = True
        call = reference()
        if self.paused or call is None or not any(call is other for other in pending.calls):
            return
        if is_batched(grad):
            return
        match purpose(call.owners):
            case Purpose.OTHER:
                pass
            case Purpose.QUERY:
                self._read(block, call)
                call.take_query(grad.detach())
            case Purpose.LOSS:
                self.passes_back.add(graph.forward_pass)
                self._of_the_loss.add(block.name)
                if not call.batch.went_back:
                    call.batch.went_back, call.batch.shapes = True, graph.shapes
                self._read(block, call)
                call.take(grad.detach())
                if call.measurable:
                    self._check_untouched(block, [call])
                self._note_positions(block, call)
                self._note(block, call)

    def _read(self, block: Block, call: LayerCall) -> None:
        """Settle, before a call's first gradient is taken, where the samples lie in it."""
        if call.grad is not None or call.queried:
            return
        if self._traced is not None:
            (provenance, shapes), self._traced = self._traced, None
            self.readings |= provenance.readings(self._find_samples(shapes))
        readings = self.readings.get(block.name)
        call.reading = readings[call.number % len(readings)] if readings else None
        lead = call.shape[: call.leading]
        if call.reading is not None or call.arranged or len(lead) < 2:
            return
        size = call.batch.batch_size
        if not size or lead[1] != size or lead[0] == size or lead[0] % size:
            return
        # [k·B, B, d]: time first, or samples folded into the first dimension.
        place = self._find_samples(call.batch.shapes)
        if call.batch.shapes.time_first or (place is not None and place.dim == 1):
            return
        call.reading = Reading(0, last=False)
        if block.name not in self._untold and (block.sharing is Sharing.REDUCE or isinstance(block, NormBlock)):
            self._untold.add(block.name)
            warnings.warn(
                f"layer {block.name} gives {list(call.shape)} for {size} samples, and nothing tells which of the first "
                "two dimensions has them: they are taken to be folded into the first. If it is time, turn its input "
                "(x.transpose(0, 1)), set kfac.curvature.sharing: expand, or name it in kfac.curvature.exclude",
                stacklevel=2,
            )

    def _note_positions(self, block: Block, call: LayerCall) -> None:
        """Take the positions of a micro-batch from the layer nearest to the loss, whose gradient comes first."""
        if not call.batch.positions and call.grad is not None:
            call.batch.positions = call.grad.numel() / (block.matrix_shape[0] * block.matrix_shape[1])

    def _note(self, block: Block, call: LayerCall) -> None:
        """Measure complete calls, or wait until it is known whether another backward pass may follow."""
        number = backward_pass_id()
        running = self._backward_passes.get(number)
        if running is None:
            running = self._backward_passes[number] = _BackwardPass()
            after_backward(functools.partial(self._backward_ended, number))
        running.reached.append((block, call.batch, call))
        call.settled = False
        if running.look():
            self._settle(running)

    def _backward_ended(self, number: int) -> None:
        running = self._backward_passes.pop(number, None)
        if running is not None and running.look():
            self._settle(running)

    def _settle(self, running: _BackwardPass) -> None:
        reached, running.reached = running.reached, []
        for _, _, call in reached:
            call.settled = True
        for block, batch, _ in reached:
            pending = batch.of(block.name)
            if pending.complete:
                self._finish(block, pending)

    def _judge(self, block: Block, call: LayerCall, grad: Tensor) -> None:
        """Show the arbiter the loss's gradient where K-FAC's own passes take theirs."""
        if self.arbiter is None or self.paused or is_batched(grad):
            return
        asked = purpose(call.owners)
        if asked is not Purpose.OTHER:
            self._read(block, call)
            with _full_precision([call]):
                self.arbiter.captured(block, [call.with_gradient(grad.detach())], asked)

    def _finish(self, block: Block, pending: Pending) -> None:
        calls = [call for call in pending.calls if call.measurable]
        pending.clear()
        self._check_untouched(block, calls)
        with _full_precision(calls):
            asked = Purpose.QUERY if all(call.queried for call in calls) else Purpose.LOSS
            if self.arbiter is None or self.arbiter.captured(block, calls, asked):
                self._completed(block, calls)

    def refuse(self, block: Block, cause: str) -> None:
        """Leave a block out; see `blocks.calls.Recorder.refuse`."""
        if self.arbiter is None or not self.arbiter.refuse(block, cause):
            raise ModelError(f"layer {block.name}: {cause}; name it in kfac.curvature.exclude")

    def _check_untouched(self, block: Block, calls: Sequence[LayerCall]) -> None:
        if not all(call.untouched for call in calls):
            raise ModelError(
                f"the input of layer {block.name} was modified in place after the layer had run, so that its factor A "
                "can't be measured: make the operation that follows it out of place (x = x + y instead of x += y), or "
                "name the layer in kfac.curvature.exclude"
            )


def _graph_went(pending: Pending, reference: weakref.ref[LayerCall]) -> None:
    call = reference()
    if call is not None:
        pending.forget(call)


@contextmanager
def _full_precision(calls: Sequence[LayerCall]) -> Iterator[None]:
    """Measure without autograd, and without the autocast that a loop's backward may run in: it would round products."""
    with torch.no_grad(), torch.autocast(calls[0].inputs.device.type, enabled=False):
        yield


def warn_of_accumulation(passes: int) -> None:
    """Tell a loop that seems to accumulate gradients how to say so; the scale of G depends on it."""
    warnings.warn(
        f"the model ran {passes} forward passes since the last kfac.step(). If you accumulate gradients, call "
        "kfac.micro_batch(...) before each forward pass, so that the output gradients are scaled right",
        stacklevel=3,
    )


def _time_first_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that take time, not samples, for the first dimension."""
    kinds = (nn.RNNBase, nn.MultiheadAttention)
    return [layer for layer in model.modules() if isinstance(layer, kinds) and not layer.batch_first]
