"""Outputs that all samples share, such as a table of positions looked up once and added to every sequence.

Autograd brings such an output the *sum* of the samples' gradients. Squared, a sum depends on how the batch was cut into
ranks and micro-batches, so that nothing right can be measured from it. The graph of a forward pass tells where it
happens: an addition (or another elementwise operation) that is larger than the output in the samples' dimension; or,
for an output that no sample has entered (see `constants`), any operation that isn't one of row by row.

    positions [T, d] ─────────────┐
                                  ├─ add [B, T, d]        the output enters directly: measured expanded to [B, T, d]
    tokens [B, T] ── [B, T, d] ───┘
    bias [q, k, h] ── permute ── add [B, h, q, k]         not directly: the layer keeps its plain gradient
    relative positions [2k, d] ── bmm [B·h, q, 2k]        nor here, or where it is gathered or repeated

Code compiled by torch.compile can't be inspected: there, expand such inputs over the batch yourself.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from enum import IntEnum
from typing import Any

from torch import Tensor

from kfac_dist.compat.torch import gradient_shapes

_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Clone", "ToCopy")
_ELEMENTWISE = ("Add", "Sub", "RSub", "Mul", "Div", "Expand", "Where", "MaskedFill")
# Operations that put rows into places among others: they make B rows of one without expanding it.
_PLACING = ("Cat", "IndexAdd", "IndexCopy", "IndexPut", "MaskedScatter", "Scatter", "ScatterAdd", "SliceScatter")

Node = Any  # torch.autograd.graph.Node; its metadata has no public name
Consumers = Mapping[Node, list[Node]]
Shape = tuple[int, ...]


class Samples(IntEnum):
    """The relation of an output to the samples of a batch; checkpoints hold the numbers, 0 if it is not known yet.

    Attributes:
        OWN: Samples have rows of their own.
        SHARED: They share the output, and their gradients can't be separated.
        EXPAND: They share it, and its first dimension, of size 1, may stand for them.
        PREPEND: They share it, and a first dimension may be put in front for them.
    """

    OWN = 1
    SHARED = 2
    EXPAND = 3
    PREPEND = 4


def consumers_of(outputs: object) -> dict[Node, list[Node]]:
    """Return which nodes of the graph behind a model's outputs read each node's result."""
    todo = [tensor.grad_fn for tensor in _tensors(outputs) if tensor.grad_fn is not None]
    found: dict[Node, list[Node]] = {node: [] for node in todo}
    while todo:
        node = todo.pop()
        for source, _ in node.next_functions:
            if source is None:
                continue
            if source not in found:
                found[source] = []
                todo.append(source)
            found[source].append(node)
    return found


def samples_of(
    node: Node,
    consumers: Consumers,
    batch_size: int,
    constants: Container[Node] = (),
    shared_sizes: Container[int] | None = None,
) -> Samples:
    """Say whether samples have rows of their own in a node's result.

    Args:
        node: The autograd node of a layer's output.
        consumers: The graph, from `consumers_of`.
        batch_size: B.
        constants: The nodes whose results no sample has entered.
        shared_sizes: Sizes of the model's inputs that have no dimension for the samples; None if inputs aren't known.
    """
    readers = consumers.get(node, [])
    if _is_opaque(node):
        return Samples.OWN
    if node not in constants and shared_sizes is not None:
        # Rows of sequences laid end to end, as experts and their routers take them: what they are spread over then,
        # such as experts as many as there are samples, are no samples.
        rows = _shape(node)[:1]
        if any(size > batch_size and size % batch_size == 0 and size not in shared_sizes for size in rows):
            return Samples.OWN
    meets = node in constants and _meets_samples(node, consumers, batch_size, constants)
    if not meets and not _is_shared(node, consumers, batch_size):
        return Samples.OWN
    shape = _shape(node)
    spread = {_shape(reader) if _is(reader, _ELEMENTWISE) else () for reader in readers}
    if spread == {(batch_size, *shape)}:
        return Samples.PREPEND
    return Samples.EXPAND if spread == {(batch_size, *shape[1:])} else Samples.SHARED


def expand(tensor: Tensor, batch_size: int, samples: Samples) -> Tensor:
    """Return `[1, ...]` (EXPAND) or `[...]` (PREPEND) as `[B, ...]`; nothing is copied."""
    return tensor.expand(batch_size, *(tensor.shape if samples is Samples.PREPEND else tensor.shape[1:]))


def _is_shared(node: Node, consumers: Consumers, batch_size: int) -> bool:
    """Whether an operation behind a node spreads its result over the samples; follows it until samples appear."""
    todo, seen = [node], {node}
    while todo:
        node = todo.pop()
        own = _shape(node)
        for reader in consumers.get(node, []):
            if _is_opaque(reader) or _is(reader, _PLACING) or str(reader.name()) == "CopySlices":
                continue
            spread = _shape(reader)
            if _spreads(own, spread, batch_size, elementwise=_is(reader, _ELEMENTWISE)):
                return True
            further = not _has_samples(own, batch_size) and not _has_samples(spread, batch_size)
            if further and reader not in seen:
                seen.add(reader)
                todo.append(reader)
    return False


def _meets_samples(node: Node, consumers: Consumers, batch_size: int, constants: Container[Node]) -> bool:
    """Whether a constant meets the samples in another way than row by row; follows it as far as it is constant."""
    if _has_samples(_shape(node), batch_size):
        return False  # expanded before the layer
    todo, seen = [node], {node}
    while todo:
        node = todo.pop()
        for reader in consumers.get(node, []):
            if _is_compiled(reader):
                continue
            if reader not in constants:
                if not _is(reader, _ELEMENTWISE) or _shape(node) != _shape(reader):
                    return True
            elif _multiplies(node, reader, batch_size):
                return True
            elif reader not in seen:
                seen.add(reader)
                todo.append(reader)
    return False


def _multiplies(node: Node, reader: Node, batch_size: int) -> bool:
    """Whether samples appear in a constant otherwise than by a view of it: it is expanded, or looked up for each."""
    own, spread = _shape(node), _shape(reader)
    return not _is(reader, _VIEWS) and (
        _has_samples(spread, batch_size) or math.prod(spread) == batch_size * math.prod(own)
    )


def _spreads(own: Shape, spread: Shape, batch_size: int, *, elementwise: bool) -> bool:
    if elementwise and len(own) < len(spread) and spread[0] == batch_size:
        return True  # [T, d] beside [B, T, d]
    if _has_samples(own, batch_size):
        return False
    if elementwise:
        aligned = (1,) * (len(spread) - len(own)) + own
        # Samples come first, or second of three; elsewhere it is chance that something is as large as the batch.
        places = 2 if len(spread) > 2 else 1
        return any((a, b) == (1, batch_size) for a, b in zip(aligned[:places], spread[:places], strict=True))
    # Any other operation that makes B of one, such as attention with a bias.
    return len(own) == len(spread) > 2 and (own[0], spread[0]) == (1, batch_size)


def _has_samples(shape: Shape, batch_size: int) -> bool:
    """Whether the first dimension is the samples', or the second of `[T, B, d]`."""
    return batch_size in shape[:1] or (len(shape) > 2 and shape[0] != 1 and shape[1] == batch_size)


def _is(node: Node, kinds: tuple[str, ...]) -> bool:
    return str(node.name()).rstrip("0123456789") in {f"{kind}Backward" for kind in kinds}


def _is_opaque(node: Node) -> bool:
    """Whether a node is many operations in one, as made by torch.compile: its shapes say nothing."""
    return len(gradient_shapes(node)) != 1 or _is_compiled(node)


def _is_compiled(node: Node) -> bool:
    return str(node.name()).startswith("CompiledFunction")


def _shape(node: Node) -> Shape:
    return gradient_shapes(node)[0]


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
