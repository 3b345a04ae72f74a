"""Hooks that bring each block its inputs and output gradients, and that cost nothing on steps that don't measure.

A block watches its layer and records each call's input and output; the output is asked for its gradient, and when
backward has brought the gradients of all uses of the layer in this forward pass, the block measures at once and the
tensors are let go. The gradient is asked of the output *tensor*, so that an in-place activation behind the layer
doesn't matter.

    plain                     forward: input, output              backward: gradient → measure
    checkpoint, non-entrant   forward: output only                backward: gradient; input, as it is computed again
    checkpoint, re-entrant    forward: nothing (no gradients)     backward: input, output, gradient → measure

An input is held only as long as autograd holds it, too: under activation checkpointing not at all, under autocast in
the precision that autograd keeps, and no longer than the graph, so that a forward pass whose outputs are dropped leaves
nothing behind.

K-FAC's own backward passes (`mc`, `type2`) ask autograd for the gradients at the outputs only: no parameter gradient is
ever computed for them, so nothing has to be thrown away. They hold inputs from forward to `fisher_backward`.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from kfac_dist.compat.torch import break_graph
from kfac_dist.curvature.autograd import below_view, checkpointed_region, compile_anew, in_backward, of_the_loop
from kfac_dist.curvature.blocks import Block, Use
from kfac_dist.curvature.blocks.uses import Handle
from kfac_dist.curvature.broadcast import Samples, consumers_of, expand, samples_of
from kfac_dist.errors import ModelError
from kfac_dist.hooks import after_forward, before_forward

_NO_FULL_GRAPH = (
    "K-FAC measures a layer between two compiled pieces of the model: leave out fullgraph=True, or compile only "
    "modules without K-FAC blocks (kfac.curvature.exclude)"
)


@dataclass
class _Pending:
    """The uses of one block in the current forward pass.

    Attributes:
        uses: Calls that were seen.
        regions: The checkpointed region that each call was part of, if its input is still to come.
        ran_forward: Whether the block was seen in a forward pass proper since `reset`. If so, calls during backward are
            activation checkpointing computing it again; if not, they are its first with gradients (re-entrant kind).
    """

    uses: list[Use] = field(default_factory=list)
    regions: list[weakref.ref[Any] | None] = field(default_factory=list)
    ran_forward: bool = False

    @property
    def complete(self) -> bool:
        """Whether every use has all it needs."""
        return bool(self.uses) and all(use.measurable for use in self.uses)

    def clear(self) -> None:
        """Let go of everything."""
        self.uses.clear()
        self.regions.clear()

    def forget(self, use: Use) -> None:
        """Let go of a call whose graph is gone, unless its gradient has come already."""
        for index, other in enumerate(self.uses):
            if other is use and use.grad is None:
                del self.uses[index], self.regions[index]
                return

    def provide(self, region: object, inputs: Tensor, block: Block) -> bool:
        """Give the first call of a region that still waits its input, now that the region is computed again."""
        for index, waiting in enumerate(self.regions):
            if waiting is not None and waiting() is region:
                self.regions[index] = None
                self.uses[index].keep(block.kept(inputs))
                return True
        return False


class _Graph:
    """Held by the graph of one call and by nothing else: when it goes, no gradient can come any more."""

    def __init__(self, forward_pass: int) -> None:
        self.forward_pass = forward_pass


class _Recorder:
    """What one block records into; see `blocks.uses.Recorder`."""

    def __init__(self, capture: Capture, block: Block) -> None:
        self._capture = capture
        self._block = block

    @property
    def watching(self) -> bool:
        """Whether forward passes are measured now."""
        return self._capture.active and not self._capture.paused and torch.is_grad_enabled() and of_the_loop()

    def record(
        self,
        inputs: Tensor,
        output: Tensor | None,
        *,
        source: nn.Module,
        arrange: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """See `blocks.uses.Recorder.record`."""
        if not self.watching:
            return None
        if torch.compiler.is_dynamo_compiling():
            break_graph(_NO_FULL_GRAPH)
        return self._capture.record(self._block, inputs, output, source, arrange)


class Capture:
    """Collects uses of blocks between forward and backward.

    Args:
        model: The bare model; its own call marks where a forward pass begins.
        blocks: The blocks to watch.
        completed: Called with a block and its uses as soon as all their gradients are there.
        own_backward: The gradients come from `backpropagate`, not from the user's backward.

    Attributes:
        active: Whether forward passes are being watched; the owner sets it once a step.
        paused: Whether what runs now is none of this capture's business, forward or back.
        batch_size: Samples that the model was last called with, None if it was not called itself.
        passes: Forward passes of the model since `reset`.
        passes_back: Those of them that the user's backward has come back to, by number.
        samples: Blocks whose outputs all samples share; None until a forward pass has shown which.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        completed: Callable[[Block, list[Use]], None],
        *,
        own_backward: bool,
    ) -> None:
        self.active = False
        self.paused = False
        self.batch_size: int | None = None
        self.passes = 0
        self.passes_back: set[int] = set()
        self._completed = completed
        self._own_backward = own_backward
        self.samples: dict[str, Samples] | None = None
        self._nodes: list[tuple[str, Any]] = []
        self._pending: dict[str, _Pending] = {block.name: _Pending() for block in blocks}
        self._blocks = {block.name: block for block in blocks}
        self._handles: list[Handle] = [
            before_forward(model, self._forward_begins, with_kwargs=True),
            after_forward(model, self._forward_ended),
            *(handle for block in blocks for handle in block.watch(_Recorder(self, block))),
        ]
        compile_anew()

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.reset()

    def reset(self) -> None:
        """Forget uses whose gradients never came, and begin a new optimizer step."""
        for pending in self._pending.values():
            pending.clear()
            pending.ran_forward = False
        self.passes = 0
        self.passes_back.clear()
        self.batch_size = None
        self._nodes.clear()

    def flush(self) -> None:
        """Measure blocks of which some uses got a gradient and others never will (outputs that no loss reads)."""
        for name, pending in self._pending.items():
            if any(use.measurable for use in pending.uses):
                self._finish(self._blocks[name], pending)

    def backpropagate(
        self, outputs: Tensor, columns: Iterable[Tensor], measure: Callable[[Block, list[Use], bool], None]
    ) -> None:
        """Send vectors back from the model's outputs to the blocks' outputs, and measure after each.

        Args:
            outputs: The model's outputs, still attached to their graph.
            columns: Vectors of the outputs' shape; one backward pass each.
            measure: Called with a block, its uses and whether this is the first column.
        """
        live = [(name, use) for name, pending in self._pending.items() for use in pending.uses]
        edges = [use.edge for _, use in live if use.edge is not None]
        first = True
        for column in columns if edges else ():
            grads = torch.autograd.grad(outputs, edges, column, retain_graph=True, allow_unused=True)
            reached: dict[str, list[Use]] = {}
            for (name, use), grad in zip(live, grads, strict=True):
                if grad is not None:
                    reached.setdefault(name, []).append(use.with_gradient(grad))
            for name, uses in reached.items():
                self._check_untouched(self._blocks[name], uses)
                with _full_precision(uses):
                    measure(self._blocks[name], uses, first)
            first = False
        for pending in self._pending.values():
            pending.clear()

    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.active or self.paused or not torch.is_grad_enabled() or not of_the_loop():
            return
        if self.passes and in_backward():
            return
        self.flush()  # what an earlier micro-batch has left open is its own, not this one's
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim), None)
        self.batch_size = None if first is None else first.shape[0]
        self.passes += 1

    def _forward_ended(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Find, once, the layers whose outputs all samples share; see `broadcast`."""
        if not of_the_loop() or not self._nodes or self.batch_size is None or self.batch_size == 1 or in_backward():
            return
        consumers = consumers_of(output)
        self.samples = {}
        for name, node in self._nodes:
            samples = samples_of(node, consumers, self.batch_size)
            if samples is not Samples.OWN and self.samples.get(name) is not Samples.SHARED:
                self.samples[name] = samples
                self._pending[name].clear()  # what was seen in this pass is of no use
        self._nodes.clear()
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
        """Take note of one call of a block's layer; see `blocks.uses.Recorder.record`."""
        samples = Samples.OWN if self.samples is None else self.samples.get(block.name, Samples.OWN)
        if samples is Samples.SHARED:
            return None
        if samples is Samples.OWN or self.batch_size is None:
            self._take_note(block, inputs, output, source, arrange)
            return None
        inputs = expand(inputs, self.batch_size, samples)
        output = None if output is None else expand(output, self.batch_size, samples)
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
        region, pending = checkpointed_region(), self._pending[block.name]
        if not in_backward():
            pending.ran_forward = True
        elif pending.ran_forward:
            # Computed again for backward: nothing new, except for what was not held the first time.
            if region is not None and pending.provide(region, inputs, block) and pending.complete:
                self._finish(block, pending)
            return
        if output is None or not output.requires_grad:
            return
        if self.samples is None and not in_backward():
            self._nodes.append((block.name, output.grad_fn))
        written, arrange = below_view(output, arrange)
        use = Use(source, output.shape, arrange=arrange)
        later = region is not None and not self._own_backward
        if not later:
            use.keep(block.kept(inputs))
        pending.uses.append(use)
        pending.regions.append(weakref.ref(region) if later else None)
        if self._own_backward:
            use.edge = get_gradient_edge(written)
        else:
            # The graph may outlive backward; what was measured must not.
            graph, reference = _Graph(self.passes), weakref.ref(use)
            weakref.finalize(graph, _graph_went, pending, reference).atexit = False
            written.register_hook(functools.partial(self._gradient_came, block, pending, reference, graph))

    def _gradient_came(
        self, block: Block, pending: _Pending, reference: weakref.ref[Use], graph: _Graph, grad: Tensor
    ) -> None:
        use = reference()
        if self.paused or use is None or not any(use is other for other in pending.uses):
            return  # a second backward through a graph that was measured already
        self.passes_back.add(graph.forward_pass)
        use.take(grad.detach())
        if pending.complete:
            self._finish(block, pending)

    def _finish(self, block: Block, pending: _Pending) -> None:
        uses = [use for use in pending.uses if use.measurable]
        pending.clear()
        self._check_untouched(block, uses)
        with _full_precision(uses):
            self._completed(block, uses)

    def _check_untouched(self, block: Block, uses: Sequence[Use]) -> None:
        if not all(use.untouched for use in uses):
            raise ModelError(
                f"the input of layer {block.name} was modified in place after the layer had run, so that its factor A "
                "can't be measured: make the operation that follows it out of place (x = x + y instead of x += y), or "
                "name the layer in kfac.curvature.exclude"
            )


def _graph_went(pending: _Pending, reference: weakref.ref[Use]) -> None:
    use = reference()
    if use is not None:
        pending.forget(use)


@contextmanager
def _full_precision(uses: Sequence[Use]) -> Iterator[None]:
    """Measure without autograd, and without the autocast that a loop's backward may run in: it would round products."""
    with torch.no_grad(), torch.autocast(uses[0].inputs.device.type, enabled=False):
        yield


def warn_of_accumulation(passes: int) -> None:
    """Tell a loop that seems to accumulate gradients how to say so; the scale of G depends on it."""
    warnings.warn(
        f"the model ran {passes} forward passes since the last kfac.step(). If you accumulate gradients, call "
        "kfac.micro_batch(...) before each forward pass, so that the output gradients are scaled right",
        stacklevel=3,
    )
