"""Hooks that bring each block its inputs and output gradients, and that cost nothing on steps that don't measure.

A forward hook remembers the input and asks the output for its gradient; when backward has brought the gradients of all
uses of the layer in this forward pass, the block measures at once and the tensors are let go. The gradient is asked of
the output *tensor*, so that an in-place activation behind the layer doesn't matter.

K-FAC's own backward passes (`mc`, `type2`) ask autograd for the gradients at the outputs only: no parameter gradient is
ever computed for them, so nothing has to be thrown away.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from kfac_dist.curvature.blocks import Block, Use
from kfac_dist.errors import ModelError


@dataclass
class _Pending:
    """The uses of one block in the current forward pass.

    Attributes:
        uses: Calls that were seen.
        arrived: How many of them have their gradient.
        ran_forward: Whether the block was seen in a forward pass proper since `reset`. If so, calls during backward are
            activation checkpointing computing it again; if not, they are its first with gradients (re-entrant kind).
    """

    uses: list[Use] = field(default_factory=list)
    arrived: int = 0
    ran_forward: bool = False


class Capture:
    """Collects uses of blocks between forward and backward.

    Args:
        model: The bare model; its own call marks where a forward pass begins.
        blocks: The blocks to watch.
        completed: Called with a block and its uses as soon as all their gradients are there.
        own_backward: The gradients come from `backpropagate`, not from the user's backward.

    Attributes:
        active: Whether forward passes are being watched; the owner sets it once a step.
        batch_size: Samples that the model was last called with, None if it was not called itself.
        passes: Forward passes of the model since `reset`.
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
        self.batch_size: int | None = None
        self.passes = 0
        self._completed = completed
        self._own_backward = own_backward
        self._pending: dict[str, _Pending] = {block.name: _Pending() for block in blocks}
        self._blocks = {block.name: block for block in blocks}
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._forward_begins, with_kwargs=True),
            *(
                block.module.register_forward_hook(functools.partial(self._forward_ran, block), with_kwargs=True)
                for block in blocks
            ),
        ]

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.reset()

    def reset(self) -> None:
        """Forget uses whose gradients never came, and begin a new optimizer step."""
        for pending in self._pending.values():
            pending.uses.clear()
            pending.arrived = 0
            pending.ran_forward = False
        self.passes = 0
        self.batch_size = None

    def flush(self) -> None:
        """Measure blocks of which some uses got a gradient and others never will (outputs that no loss reads)."""
        for name, pending in self._pending.items():
            if pending.arrived:
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
        for column in columns:
            grads = torch.autograd.grad(outputs, edges, column, retain_graph=True, allow_unused=True)
            reached: dict[str, list[Use]] = {}
            for (name, use), grad in zip(live, grads, strict=True):
                if grad is not None:
                    reached.setdefault(name, []).append(Use(use.inputs, grad))
            for name, uses in reached.items():
                with _full_precision(uses):
                    measure(self._blocks[name], uses, first)
            first = False
        for pending in self._pending.values():
            pending.uses.clear()

    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.active or not torch.is_grad_enabled() or (self.passes and _in_backward()):
            return
        self.flush()  # what an earlier micro-batch has left open is its own, not this one's
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim), None)
        self.batch_size = None if first is None else first.shape[0]
        self.passes += 1

    def _forward_ran(
        self, block: Block, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self.active or not torch.is_grad_enabled():
            return
        if not isinstance(output, Tensor):
            raise ModelError(
                f"layer {block.name} ({type(module).__name__}) returns {type(output).__name__}, not a tensor: "
                "name it in kfac.curvature.exclude"
            )
        if not output.requires_grad:
            return
        pending = self._pending[block.name]
        if not _in_backward():
            pending.ran_forward = True
        elif pending.ran_forward:
            return
        use = Use((args[0] if args else kwargs["input"]).detach())
        pending.uses.append(use)
        if self._own_backward:
            use.edge = get_gradient_edge(output)
        else:
            output.register_hook(functools.partial(self._gradient_came, block, pending, use))

    def _gradient_came(self, block: Block, pending: _Pending, use: Use, grad: Tensor) -> None:
        if not any(use is other for other in pending.uses):
            return  # a second backward through a graph that was measured already
        pending.arrived += use.grad is None
        use.grad = grad.detach() if use.grad is None else use.grad + grad.detach()
        if pending.arrived == len(pending.uses):
            self._finish(block, pending)

    def _finish(self, block: Block, pending: _Pending) -> None:
        uses = [use for use in pending.uses if use.grad is not None]
        pending.uses.clear()
        pending.arrived = 0
        with _full_precision(uses):
            self._completed(block, uses)


def _in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, as `torch.utils.checkpoint` asks it."""
    return torch._C._current_graph_task_id() != -1


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
