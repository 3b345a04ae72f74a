"""The number of samples in a forward pass, from the shapes of the model's inputs and outputs.

The loss has its terms in the model's outputs, so their first dimension goes before that of any input: a graph network
has nodes and edges for its inputs and graphs in its outputs; position ids `[1, T]` stand before tokens `[B, T]`.

    outputs                    samples
    all begin with one number  that number
    several numbers            the one with which an input begins, too
    time first                 the second dimension, known from recurrent and attention layers with time first
    positions for rows         unknown: `[B·T, C]` of `[B, T]` may have B terms or B·T
    none (a loss alone)        the number with which the inputs begin
    the model wasn't called    the number with which the inputs of its layers begin
    one sample, no batch       1, known from the layer nearest to the loss, whose output is the model's

Where that leaves no single number, nothing is measured and the loop is asked. A loss that shows by its gradient over
how many terms it is a mean (`curvature.scale`) decides before all shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

Shape = tuple[int, ...]

# The shape that stands for a layer's input of one sample without a batch dimension.
UNBATCHED: Shape = (1,)
# Nesting depth of tensors in a model's arguments (in PyTorch Geometric's batch objects four), and how many
# parts are looked at.
_DEPTH = 6
_PARTS = 5000


@dataclass(frozen=True)
class TensorDim:
    """A dimension of one of a pass's tensors.

    Attributes:
        kind: `inputs`, `outputs` or `layers`; `one` stands for one sample without a batch's dimension.
        tensor: The tensor.
        dim: The dimension.
    """

    kind: str
    tensor: int
    dim: int = 0


_ONE = TensorDim("one", 0)


@dataclass
class PassShapes:
    """Shapes of the tensors of one forward pass, without 0-dim tensors.

    Attributes:
        inputs: Of the model's inputs.
        outputs: Of its outputs that depend on trained parameters.
        layers: Of its layers' inputs.
        time_first: Of the inputs of layers whose first dimension is time (`batch_first=False`).
        nearest: Values that the last of them returned.
    """

    inputs: tuple[Shape, ...] = ()
    outputs: tuple[Shape, ...] = ()
    layers: list[Shape] = field(default_factory=list)
    time_first: list[Shape] = field(default_factory=list)
    nearest: int = 0

    def read(self, place: TensorDim) -> int | None:
        """Return the size at a place; None if this pass has no such place."""
        if place == _ONE:
            return 1 if is_unbatched(self) else None
        shapes: Sequence[Shape] = getattr(self, place.kind)
        if place.tensor >= len(shapes) or place.dim >= len(shapes[place.tensor]):
            return None
        return shapes[place.tensor][place.dim]

    def describe(self) -> str:
        """Return the shapes for a message."""
        kinds = (("called with", self.inputs), ("returns", self.outputs))
        parts = [f"{verb} {', '.join(str(list(shape)) for shape in shapes)}" for verb, shapes in kinds if shapes]
        if parts:
            return f"the model is {' and '.join(parts)}"
        firsts = sorted({shape[0] for shape in self.layers})
        return f"the model itself was not called, and its layers see {', '.join(map(str, firsts))} samples"


def shapes_of(value: object, *, trained: bool = False) -> tuple[Shape, ...]:
    """Return the shapes of all tensors with dimensions in a value.

    Args:
        value: A tensor, or any nest of tuples, mappings and objects of them.
        trained: Leave out what has no gradient.
    """
    return tuple(tuple(t.shape) for t in tensors_in(value) if t.ndim and (t.requires_grad or not trained))


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in a nest of tuples, mappings and objects, in their order."""
    todo, looked_at = [(value, _DEPTH)], 0
    while todo and looked_at < _PARTS:
        part, depth = todo.pop()
        looked_at += 1
        if isinstance(part, Tensor):
            yield part
        elif depth and not isinstance(part, str | bytes | int | float | nn.Module | type | None):
            todo += [(inner, depth - 1) for inner in reversed(list(_parts(part)))]


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, list | tuple):
        return value
    if dataclasses.is_dataclass(value):
        return [getattr(value, entry.name, None) for entry in dataclasses.fields(value)]
    return vars(value).values() if hasattr(value, "__dict__") else ()


def find_samples(shapes: PassShapes) -> TensorDim | None:
    """Return where a pass's shapes show the number of samples; None if they contradict each other or show nothing."""
    if is_unbatched(shapes):
        return None if _looks_batched(shapes) else _ONE
    if (second := _time_first(shapes)) is not None:
        return second
    if shapes.outputs:
        asked = _looks_like_features(shapes) or _folded(shapes)
        return None if asked else _by_outputs(shapes.outputs, shapes.inputs)
    if shapes.inputs:
        # A first dimension of size 1 is broadcast over the samples.
        firsts = {shape[0] for shape in shapes.inputs}
        return _single("inputs", shapes.inputs, firsts - {1} or firsts)
    return _single("layers", shapes.layers, {shape[0] for shape in shapes.layers})


def is_unbatched(shapes: PassShapes) -> bool:
    """Whether the pass is of one sample without a batch's dimension: the last layer saw one, and made the outputs.

    The layers before it may have seen the positions of that sample, `[T, d]`. Where single samples go through the
    layers one by one inside of the model, its outputs are those of several.
    """
    if not shapes.layers or shapes.layers[-1] != UNBATCHED:
        return False
    return not shapes.outputs or not shapes.nearest or any(_product(s) == shapes.nearest for s in shapes.outputs)


def _looks_batched(shapes: PassShapes) -> bool:
    """Whether inputs and outputs of an unbatched pass begin with one number, as those of a batch do."""
    if all(shape == UNBATCHED for shape in shapes.layers):
        return False
    return bool({shape[0] for shape in shapes.outputs} & {shape[0] for shape in shapes.inputs})


def _time_first(shapes: PassShapes) -> TensorDim | None:
    """Return the second dimension of an output that begins like a layer's time-first input."""
    seen = {shape[:2] for shape in shapes.time_first if shape[0] != shape[1]}
    kind, own = ("outputs", shapes.outputs) if shapes.outputs else ("inputs", shapes.inputs)
    return next((TensorDim(kind, index, 1) for index, shape in enumerate(own) if shape[:2] in seen), None)


def _looks_like_features(shapes: PassShapes) -> bool:
    """Whether the one output may be a vector that the last layer has for each row, such as the mean of one graph's."""
    [first, *others] = shapes.outputs
    if others or len(first) > 1 or first[0] == 1 or not shapes.layers:
        return False
    rows = _product(shapes.layers[-1][:-1])
    return first[0] not in {shape[0] for shape in shapes.inputs} and shapes.nearest == rows * first[0]


def _folded(shapes: PassShapes) -> bool:
    """Whether the outputs' rows are positions of the samples of an input, `[B·T, C]` of `[B, T]`: B or B·T terms."""
    firsts = {shape[0] for shape in shapes.outputs}
    if len(firsts) > 1 or firsts & {size for shape in shapes.inputs for size in shape}:
        return False
    [first] = firsts
    return any(
        first == shape[0] * _product(shape[begin:end])
        for shape in shapes.inputs
        for begin in range(1, len(shape))
        for end in range(begin + 1, len(shape) + 1)
        if shape[0] > 1
    )


def folded_samples(shapes: PassShapes) -> TensorDim | None:
    """Return where the samples stand of a pass whose outputs have their positions for rows; None of another one."""
    if not shapes.outputs or not _folded(shapes):
        return None
    return next(TensorDim("inputs", index) for index, shape in enumerate(shapes.inputs) if shape[0] > 1)


def _by_outputs(outputs: Sequence[Shape], inputs: Sequence[Shape]) -> TensorDim | None:
    firsts, known = {shape[0] for shape in outputs}, {shape[0] for shape in inputs}
    if len(firsts) > 1:
        return _single("outputs", outputs, firsts & known)
    # [T, B, d] from [B, T], also where that is only a mask: either may be the samples.
    turned = any(
        len(out) > 2 and len(given) > 1 and given[0] == out[1] != out[0] == given[1]
        for out in outputs
        for given in inputs
    )
    return None if turned else TensorDim("outputs", 0)


def _single(kind: str, shapes: Sequence[Shape], numbers: set[int]) -> TensorDim | None:
    if len(numbers) != 1:
        return None
    [number] = numbers
    return TensorDim(kind, next(index for index, shape in enumerate(shapes) if shape[0] == number))


def find_number(shapes: PassShapes, number: float, tolerance: float = 0.0) -> TensorDim | None:
    """Return the first place in which a given number of samples stands, outputs first.

    Args:
        shapes: A pass.
        number: The number.
        tolerance: By how much of it the size may differ.
    """
    places = [
        *(TensorDim("outputs", index) for index in range(len(shapes.outputs))),
        *(TensorDim("outputs", index, 1) for index, shape in enumerate(shapes.outputs) if len(shape) > 2),
        *(TensorDim("inputs", index) for index in range(len(shapes.inputs))),
    ] or [TensorDim("layers", index) for index in range(len(shapes.layers))]
    return next((p for p in places if abs((shapes.read(p) or 0) - number) <= tolerance * number), None)


def find_positions(shapes: PassShapes, samples: int | None, nearest: int | None) -> int:
    """Return the positions of a loss with a term each: rows of the model's outputs.

    Args:
        shapes: The pass.
        samples: B, if it is known.
        nearest: Rows of the layer nearest to the loss, which tell whether classes are the last dimension, the second or
            none.
    """
    if not shapes.outputs:
        return nearest or samples or 0
    shape = next((own for own in shapes.outputs if own[0] == samples), shapes.outputs[0])
    number = _product(shape)
    by_rows = number // max(shape[-1], 1) if len(shape) > 1 else number
    by_channels = number // max(shape[1], 1) if len(shape) > 2 else number
    likely = [by_channels, by_rows] if len(shape) > 3 else [by_rows, by_channels, number]
    return next((found for found in likely if found == nearest), likely[0])


def _product(shape: Shape) -> int:
    number = 1
    for size in shape:
        number *= size
    return number
