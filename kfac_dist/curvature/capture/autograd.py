"""Questions of hooks to autograd: the tensor below a view, a layer's parameters in the graph, a gradient's purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from kfac_dist.compat.torch import after_backward as after_backward
from kfac_dist.compat.torch import backward_pass_id as backward_pass_id
from kfac_dist.compat.torch import base_of, holds, running_node, saved_names
from kfac_dist.compat.torch import checkpointed_region as checkpointed_region
from kfac_dist.compat.torch import compile_anew as compile_anew
from kfac_dist.compat.torch import in_backward as in_backward
from kfac_dist.compat.torch import of_the_loop as of_the_loop
from kfac_dist.compat.torch import will_run as will_run


def below_view(
    output: Tensor, arrange: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """Return the tensor to ask for its gradient: of an output that is another tensor's view, that other tensor.

    Overwriting a view (an in-place activation behind a linear layer on tokens) takes the view's own node out of the
    graph; the node of the tensor below stays, and its gradient is that of the values before they were overwritten.
    """
    base = base_of(output)
    if base is None or not base.requires_grad or base.is_leaf:
        return output, arrange
    if base.numel() != output.numel() or not base.is_contiguous():
        return output, arrange
    shape, stride, offset = output.shape, output.stride(), output.storage_offset() - base.storage_offset()

    def view(grad: Tensor) -> Tensor:
        own = grad.contiguous().as_strided(shape, stride, offset)
        return own if arrange is None else arrange(own)

    return base, view


class Purpose(Enum):
    """The purpose of the backward pass that runs, as far as one parameter is concerned.

    Attributes:
        LOSS: `backward` accumulates into the parameter's `.grad`.
        QUERY: `torch.autograd.grad` was asked for the parameter's gradient.
        OTHER: The parameter gets no gradient, as when one with respect to an input is asked for.
    """

    LOSS = "loss"
    QUERY = "query"
    OTHER = "other"


def purpose(accumulators: Sequence[Any]) -> Purpose:
    """Return the purpose of the running backward pass for the parameters behind accumulators of gradients.

    Args:
        accumulators: The parameters' `AccumulateGrad` nodes; none if they were not found in the graph.
    """
    if not accumulators:
        return Purpose.OTHER if differentiated() else Purpose.LOSS
    asked = {_purpose(accumulator) for accumulator in accumulators}
    return next(purpose for purpose in Purpose if purpose in asked)


def _purpose(accumulator: Any) -> Purpose:
    try:
        executed = will_run(accumulator)
    except RuntimeError:  # autograd.grad was asked for this very leaf: the engine doesn't run it, but returns its input
        return Purpose.QUERY
    return Purpose.LOSS if executed else Purpose.OTHER


def differentiated() -> bool:
    """Whether the backward pass that runs is itself to be differentiated (`create_graph=True`)."""
    return torch.is_grad_enabled()


# Nodes between a layer's output and its parameters: views, casts, transposes, and the nodes of engines.
_REACH = 8
_NODES = 128


def accumulators(output: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the `AccumulateGrad` nodes of a layer's parameters, found in the graph right behind its output.

    The graph, not the module, says which tensor a call used: under FSDP2 a module shows its sharded parameters again
    as soon as the call is over, which are other tensors of the same shape.

    Args:
        output: The layer's output.
        parameters: The parameters that the module shows, by name.
    """
    found: dict[str, Any] = {}
    others: list[Any] = []
    level, seen = [output.grad_fn], 0
    for _ in range(_REACH):
        following: list[Any] = []
        for node in level:
            for source, _ in () if node is None else node.next_functions:
                variable = getattr(source, "variable", None)
                if variable is None:
                    following.append(source)
                    continue
                name = next((key for key, own in parameters.items() if own is variable), None)
                if name is not None:
                    found[name] = source
                elif source not in others:
                    others.append(source)
        seen += len(following)
        if len(found) == len(parameters) or not following or seen > _NODES:
            break
        level = following
    for name, own in parameters.items():
        if name not in found and hasattr(own, "placements"):  # a DTensor: its whole counterpart is in the graph
            match = next((node for node in others if node.variable.shape == own.shape), None)
            if match is not None:
                others.remove(match)
                found[name] = match
    return found


class Retention:
    """Whether the backward pass that runs keeps its graph (`retain_graph=True`), so that another one may follow.

    Autograd frees the tensors that a node has saved as soon as the node has run, unless the graph is kept. Made in a
    hook, this remembers which tensors the node at hand has saved; once it has run, they tell.
    """

    def __init__(self) -> None:
        self._node, self._names = _with_saved_tensors(running_node())

    @property
    def freed(self) -> bool:
        """Whether the node has run and has let go of its tensors, so that no other backward pass can follow."""
        return bool(self._names) and not any(holds(self._node, name) for name in self._names)


def _with_saved_tensors(node: Any) -> tuple[Any, list[str]]:
    """Return the node, or the nearest behind it, that has saved tensors, and their names."""
    for _ in range(_REACH):
        if node is None:
            break
        kind = type(node)
        names = [name for name in saved_names(kind) if holds(node, name)]
        if names:
            return node, names
        node = next((source for source, _ in node.next_functions if source is not None), None)
    return None, []
