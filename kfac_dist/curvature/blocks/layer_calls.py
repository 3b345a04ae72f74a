"""Calls of a layer: the tensors reported by its hooks, kept until the gradient arrives."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kfac_dist.curvature.capture.provenance import Reading
from kfac_dist.curvature.capture.samples import PassShapes
from kfac_dist.hooks import Handle as Handle

_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


class LayerCall:
    """One call of a layer in a forward pass: its input, and its output gradient once backward has brought it.

    Args:
        source: The module that was called.
        shape: Shape of the output.
        batch: The micro-batch of the forward pass that it was part of.
        owners: The `AccumulateGrad` nodes of the layer's parameters that were found in the graph.
        arrange: Brings the gradient of the recorded output to that of the layer's own output, batch first.

    Attributes:
        grad: Gradient of the loss with respect to the layer's output, summed over backward passes; None before any.
        settled: Whether no further gradient can come, since the last one's graph is freed.
        edge: The output's place in the autograd graph, for backward passes of K-FAC's own.
        reading: The samples' place in input and gradient; None: as their shapes say. Set before a gradient is taken.
        leading: Dimensions of input and gradient before the features.
        arranged: Whether the block's own hooks have put samples first in them.
        number: Calls of the block before it in this micro-batch.
    """

    def __init__(
        self,
        source: nn.Module,
        shape: torch.Size,
        *,
        batch: Batch | None = None,
        owners: Sequence[Any] = (),
        arrange: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.source = source
        self.shape = shape
        self._batch = batch
        self.owners = owners
        self.grad: Tensor | None = None
        self.settled = False
        self._queried: Tensor | None = None
        self.edge: torch.autograd.graph.GradientEdge | None = None
        self.reading: Reading | None = None
        self.leading = 1
        self.arranged = False
        self.number = 0
        self._arrange = arrange
        self._inputs: Tensor | None = None
        self._version = 0

    @property
    def inputs(self) -> Tensor:
        """The input as it was passed (under autocast: as autograd keeps it), detached; a sparse one made dense."""
        assert self._inputs is not None
        return self._read(self._inputs.to_dense() if self._inputs.layout in _SPARSE else self._inputs)

    def _read(self, tensor: Tensor) -> Tensor:
        return tensor if self.reading is None else self.reading.applied(tensor, self.batch.batch_size, self.leading)

    @property
    def batch(self) -> Batch:
        """The micro-batch of the forward pass that the call was part of."""
        assert self._batch is not None
        return self._batch

    @property
    def measurable(self) -> bool:
        """Whether input and gradient are both there."""
        return self.grad is not None and self._inputs is not None

    @property
    def empty(self) -> bool:
        """Whether the call had no rows at all: an expert that no token was sent to."""
        return not self.inputs.numel() or (self.grad is not None and not self.grad.numel())

    @property
    def untouched(self) -> bool:
        """Whether nothing has written into the input since."""
        assert self._inputs is not None
        return self._inputs.is_inference() or self._inputs._version == self._version

    def keep(self, inputs: Tensor) -> None:
        """Take the input."""
        self._inputs = inputs.detach()
        self._version = 0 if inputs.is_inference() else inputs._version

    def take(self, grad: Tensor) -> None:
        """Add a gradient that has come back to the output."""
        grad = self._read(grad if self._arrange is None else self._arrange(grad))
        self.grad = grad if self.grad is None else self.grad + grad

    @property
    def queried(self) -> bool:
        """Whether `torch.autograd.grad` was asked for a gradient of it, and no backward pass has brought one."""
        return self._queried is not None and (self.grad is None or self.grad is self._queried)

    def take_query(self, grad: Tensor) -> None:
        """Add a gradient that `torch.autograd.grad` has brought with those of the layer's parameters."""
        grad = self._read(grad if self._arrange is None else self._arrange(grad))
        self._queried = grad if self._queried is None else self._queried + grad

    def take_queried(self) -> None:
        """Take the queried gradients as the loss's, if no backward pass came: the loop sets `.grad` by hand."""
        if self.grad is None:
            self.grad = self._queried

    def with_gradient(self, grad: Tensor) -> LayerCall:
        """Return the same call with one gradient, for passes that send several."""
        call = copy.copy(self)
        call.grad = None
        call.take(grad)
        return call

    def part(self, samples: slice) -> LayerCall:
        """Return the same call as if the layer had seen some of the samples only; they come first in its tensors."""
        call = copy.copy(self)
        call._inputs = self.inputs[samples]
        call.reading = None  # they are in front now
        call.grad = None if self.grad is None else self.grad[samples]
        return call


@dataclass
class Pending:
    """The calls of one block in the forward passes of one micro-batch.

    Attributes:
        uses: Calls that were seen.
        regions: The checkpointed region that each call was part of, if its input is still to come.
        seen: Number of calls.
    """

    calls: list[LayerCall] = field(default_factory=list)
    regions: list[weakref.ref[Any] | None] = field(default_factory=list)
    seen: int = 0

    @property
    def complete(self) -> bool:
        """Whether every call has all it needs, and no further gradient can come."""
        return bool(self.calls) and all(call.measurable and call.settled for call in self.calls)

    def clear(self) -> None:
        """Let go of everything."""
        self.calls.clear()
        self.regions.clear()

    def forget(self, call: LayerCall) -> None:
        """Drop a call whose graph is gone, unless its gradient has come already."""
        for index, other in enumerate(self.calls):
            if other is call and call.grad is None and not call.queried:
                del self.calls[index], self.regions[index]
                return

    def provide(self, region: object, inputs: Tensor, kept: Callable[[Tensor], Tensor]) -> bool:
        """Give the first call of a region that still waits its input, now that the region is computed again."""
        for index, waiting in enumerate(self.regions):
            if waiting is not None and waiting() is region:
                self.regions[index] = None
                self.calls[index].keep(kept(inputs))
                return True
        return False


class Batch:
    """The forward passes that belong to one micro-batch, and the calls of all blocks in them.

    That is every pass that one description of the loop covers, or every undescribed one up to its backward pass: two
    passes whose losses are added up (pairs, a critic's real and fake samples) are uses of the same terms.

    Attributes:
        description: The loop's description of it, or None.
        shapes: Shapes of the forward pass that backward reached first; before that, of the last one.
        positions: Positions that the layer nearest to the loss has seen, 0 before any gradient.
        went_back: Whether a backward pass has reached one of its calls.
        pending: Uses that wait for gradients, by block.
    """

    def __init__(self, description: object | None, count: Callable[[PassShapes], int | None]) -> None:
        self.description = description
        self.shapes = PassShapes()
        self._count = count
        self.positions = 0.0
        self.went_back = False
        self.pending: dict[str, Pending] = {}

    @property
    def batch_size(self) -> int | None:
        """Samples, None if nothing tells."""
        return self._count(self.shapes)

    def of(self, block: str) -> Pending:
        """Return the calls of a block."""
        return self.pending.setdefault(block, Pending())

    def waits_for(self, block: str) -> bool:
        """Whether uses of a block have not been measured yet."""
        return block in self.pending and bool(self.pending[block].calls)


class Recorder(Protocol):
    """The destination of the calls that a block's hooks report; implemented by `capture`."""

    @property
    def watching(self) -> bool:
        """Whether calls are measured now; hooks that cost something ask first."""

    def refuse(self, cause: str) -> None:
        """Take note of a call from which the block can't be measured.

        Raises:
            ModelError: The block has been measured before, so that it can't be left out any more.
        """

    def record(
        self,
        inputs: Tensor,
        output: Tensor | None,
        *,
        source: nn.Module,
        arrange: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor | None:
        """Take note of one call.

        Args:
            inputs: The layer's input tensors.
            output: Its output; None if an exception ended the call (so activation checkpointing stops the repeated
                forward pass of a region early).
            source: The module that was called.
            arrange: Turns the output's gradient into the layer's own, as a view: columns, order of dimensions.

        Returns:
            An equivalent of the output for the hook to return in its place, or None to leave the output as it is.
        """
