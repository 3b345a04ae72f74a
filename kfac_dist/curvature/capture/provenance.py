"""The samples' dimension of every tensor in a forward pass, followed from the model's inputs function by function.

A shape alone doesn't tell: `[16, 4, d]` at B = 4 is sixteen time steps of four samples, or four samples of four patches
each that were folded into the first dimension. One pass is looked at, and each dimension written as the dimensions of
the model's inputs that it is made of, from the outermost to the innermost:

    inputs           [B, H, W]
    patches          [(B, 4), 4, d]     samples outermost: 4 · 4 rows, sample by sample
    turned           [T, B, d]          samples second
    then flattened   [(T, B), d]        samples innermost

Views are followed by their strides, for any arguments; of the rest, functions that work row by row or that sum
over a dimension are known by name. Dimensions that some function has mixed (attention over T) are not the samples'.
Otherwise the layout is unknown, and the shape decides.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_dist.compat.torch import base_of
from kfac_dist.curvature.capture.samples import PassShapes, TensorDim, tensors_in

# Labels of a dimension's factors, from the outermost; None: of no input.
Factor = tuple[int | None, int]
Dim = tuple[Factor, ...]
Layout = tuple[Dim, ...]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VIEWS = _names(
    "view reshape flatten unflatten permute transpose swapaxes swapdims movedim moveaxis t T mT unsqueeze "
    "squeeze expand view_as reshape_as select narrow unbind chunk split tensor_split diagonal __getitem__ "
    "ravel"
)
_PRODUCTS = _names("matmul __matmul__ mm bmm")
_JOINED = _names("cat concat concatenate")
_REPEATED = _names("repeat tile repeat_interleave")
_REDUCTIONS = _names("mean sum amax amin max min logsumexp prod std var any all median nansum nanmean")
# These keep the shape, and mix the entries along `dim`.
_ALONG = _names("softmax log_softmax gumbel_softmax cumsum cumprod logcumsumexp sort argsort")
_CONVOLUTIONS = _names(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool2d interpolate unfold"
)
_RECURRENT = _names("lstm gru rnn_tanh rnn_relu")
_BITS = 16  # dimensions that an input may have
# Readings in a number of 64 bits.
_DIGIT_BITS, _CALLS = 4, 12
# The label of what an index has picked, and its reading's dimension, which no tensor has.
_PICKED, _PICKED_DIM = -1, 6


@dataclass(frozen=True)
class Reading:
    """The samples' place in a layer's input: a dimension, and whether they are innermost in it."""

    dim: int
    last: bool

    @property
    def number(self) -> int:
        """The reading as a number above 0, for checkpoints."""
        return 1 + 2 * self.dim + self.last

    @property
    def picked(self) -> bool:
        """Whether the rows were picked by an index, so that each is by itself: an expert's, valid tokens."""
        return self.dim == _PICKED_DIM

    @classmethod
    def of(cls, number: int) -> Reading | None:
        """Return the reading with a number, None for 0."""
        return None if number < 1 else cls((number - 1) // 2, bool((number - 1) % 2))

    def applied(self, tensor: Tensor, batch_size: int | None, leading: int) -> Tensor:
        """Return a tensor whose first dimension is the samples', or theirs with others inside of it.

        Args:
            tensor: An input or an output gradient.
            batch_size: B.
            leading: Dimensions before the features; 1 for images, whose first dimension is not cut in two.
        """
        if not batch_size or self.dim >= leading or tensor.shape[self.dim] % batch_size:
            return tensor
        others = tensor.shape[self.dim] // batch_size
        if others == 1:
            return tensor.movedim(self.dim, 0)
        if not self.last and self.dim == 0:
            return tensor if leading == 1 else tensor.unflatten(0, (batch_size, others))
        cut = tensor.unflatten(self.dim, (others, batch_size) if self.last else (batch_size, others))
        turned: Tensor = cut.movedim(self.dim + self.last, 0)
        return turned.flatten(0, 1) if leading == 1 else turned


# By call of a layer in a pass; a single one stands for all.
Readings = tuple[Reading | None, ...]


def readings_number(readings: Readings) -> int | None:
    """Return readings as one number, 0 for none; None if they are too many."""
    if len(readings) > _CALLS or any(reading is not None and reading.number + 1 >> _DIGIT_BITS for reading in readings):
        return None
    digits = (1 if reading is None else 1 + reading.number for reading in readings)
    return sum(digit << _DIGIT_BITS * index for index, digit in enumerate(digits))


def readings_of(number: int) -> Readings:
    """Return the readings with a number."""
    found = []
    while number:
        number, digit = divmod(number, 1 << _DIGIT_BITS)
        found.append(Reading.of(digit - 1))
    return tuple(found)


class Provenance:
    """The layouts of a forward pass's tensors.

    Args:
        inputs: The model's inputs.
    """

    def __init__(self, inputs: object) -> None:
        self._layouts: dict[int, tuple[weakref.ref[Tensor], Layout]] = {}
        self._parents: dict[int, int] = {}
        self._mixed: set[int] = set()
        self._outputs: list[Layout | None] = []
        self._layers: dict[str, list[Layout | None]] = {}
        for index, tensor in enumerate(t for t in tensors_in(inputs) if t.ndim):
            if tensor.ndim < _BITS and not tensor.is_nested:
                sizes = enumerate(tensor.shape)
                self._set(tensor, tuple(((index * _BITS + dim, size),) for dim, size in sizes))

    def layout(self, tensor: Tensor) -> Layout | None:
        """Return the known layout of a tensor's dimensions."""
        found = self._layouts.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def called(self, layer: str, inputs: Tensor) -> None:
        """Take note of a layer's call."""
        self._layers.setdefault(layer, []).append(self.layout(inputs))

    def ended(self, output: object) -> None:
        """Take note of the model's outputs, and let go of all tensors."""
        trained = [t for t in tensors_in(output) if t.ndim and t.requires_grad]
        self._outputs = [self.layout(tensor) for tensor in trained]
        self._layouts.clear()

    def readings(self, place: TensorDim | None) -> dict[str, Readings]:
        """Return the readings of layers by call, once where all calls have the same one; none where none is known.

        Args:
            place: The samples' place in the pass's shapes.
        """
        label = self._label(place)
        if label is None:
            return {}
        found = {name: tuple(self._reading(layout, label) for layout in own) for name, own in self._layers.items()}
        return {name: own if len(set(own)) > 1 else own[:1] for name, own in found.items() if any(own)}

    def leaves_open(self, shapes: PassShapes, output: int = 0) -> bool:
        """Whether either of the first two dimensions of an output may be the samples': nothing has mixed either."""
        if output >= len(self._outputs) or len(shapes.outputs[output]) < 3:
            return False
        layout = self._outputs[output]
        labels = [self._only(dim) for dim in layout[:2]] if layout is not None else [None]
        return None not in labels and len(set(labels)) == 2 and not set(labels) & set(map(self._root, self._mixed))

    def note(
        self, name: str, function: Callable[..., Any], args: Sequence[Any], given: Mapping[str, Any], made: Any
    ) -> None:
        """Take note of a function of torch that has run.

        Args:
            name: Its name.
            function: The function.
            args: Its arguments.
            given: By name.
            made: Its result.
        """
        if not any(self.layout(tensor) for tensor in _near([*args, *given.values()])):
            return
        if name in _VIEWS:
            self._view(function, args, given, made)
            return
        if name.endswith("_") and not name.endswith("__"):
            return  # in place: the tensor keeps its layout
        results = list(_near([made]))
        if not results:
            return
        layout = self._computed(name, args, given, results[0])
        for result in results:
            own = layout if layout is not None and _shape(layout) == tuple(result.shape) else None
            own = self._alike(args, given, result) if own is None and name not in _KNOWN else own
            if own is not None:
                self._set(result, own)

    # ---- labels

    def _set(self, tensor: Tensor, layout: Layout) -> None:
        if any(label is not None for dim in layout for label, _ in dim):
            self._layouts[id(tensor)] = (weakref.ref(tensor), layout)
        else:
            self._layouts.pop(id(tensor), None)

    def _root(self, label: int) -> int:
        while label in self._parents:
            label = self._parents[label]
        return label

    def _only(self, dim: Dim) -> int | None:
        """Return the label of a dimension that is one input's whole dimension."""
        factors = [factor for factor in dim if factor[1] > 1] or [factor for factor in dim if factor[0] is not None]
        label = factors[0][0] if len(factors) == 1 else None
        return None if label is None or label == _PICKED else self._root(label)

    def _label(self, place: TensorDim | None) -> int | None:
        if place is None or place.kind not in ("inputs", "outputs"):
            return None
        if place.kind == "inputs":
            return self._root(place.tensor * _BITS + place.dim)
        layout = self._outputs[place.tensor] if place.tensor < len(self._outputs) else None
        return None if layout is None or place.dim >= len(layout) else self._only(layout[place.dim])

    def _reading(self, layout: Layout | None, label: int) -> Reading | None:
        found = [
            (number, index, len(factors))
            for number, factors in enumerate([f for f in dim if f[1] > 1] for dim in layout or ())
            for index, (own, _) in enumerate(factors)
            if own is not None and self._root(own) == label
        ]
        if not found and any(own == _PICKED for dim in (layout or ())[:-1] for own, _ in dim):
            return Reading(_PICKED_DIM, last=False)
        if len(found) != 1:
            return None
        [(dim, index, length)] = found
        if index == 0:
            return Reading(dim, last=False)
        return Reading(dim, last=True) if index == length - 1 else None

    def _mix(self, dims: Iterable[Dim]) -> None:
        self._mixed |= {label for dim in dims for label, _ in dim if label is not None}

    def _meet(self, one: Dim, other: Dim) -> Dim:
        """Return the labels of two dimensions combined element by element: the same ones, if both have some."""
        labelled = [dim for dim in (one, other) if any(label is not None and label != _PICKED for label, _ in dim)]
        if len(labelled) == 2 and [size for _, size in one] == [size for _, size in other]:
            for (a, _), (b, _) in zip(one, other, strict=True):
                if a is None or b is None or _PICKED in (a, b):
                    continue
                if (a := self._root(a)) != (b := self._root(b)):
                    self._parents[b] = a
        return labelled[0] if labelled else max(one, other, key=lambda dim: any(label is not None for label, _ in dim))

    # ---- functions

    def _view(self, function: Callable[..., Any], args: Sequence[Any], given: Mapping[str, Any], made: Any) -> None:
        """Follow a view: of a stand-in without memory, whose strides name its dimensions."""
        tensor = args[0] if args else None
        layout = self.layout(tensor) if isinstance(tensor, Tensor) else None
        if layout is None:
            return
        assert isinstance(tensor, Tensor)
        if any(isinstance(part, Tensor) for part in _flat([*args[1:], *given.values()])):
            if getattr(function, "__name__", "") == "__getitem__" and isinstance(made, Tensor):
                self._set(made, _picked(layout, args[1], made) or ())
            return
        stand_in = torch.empty(tensor.shape, device="meta")
        try:
            views = list(_near([function(stand_in, *args[1:], **given)]))
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            return
        results = list(_near([made]))
        if len(views) != len(results):
            return
        for view, result in zip(views, results, strict=True):
            if view.shape == result.shape and (view is stand_in or base_of(view) is stand_in):
                self._set(result, _viewed(layout, view.shape, view.stride()))

    def _computed(self, name: str, args: Sequence[Any], given: Mapping[str, Any], made: Tensor) -> Layout | None:
        """Return the layout of the result of a function known by name."""
        first = args[0] if args else given.get("input")
        own = self.layout(first) if isinstance(first, Tensor) else None
        tensors = list(_near([*args, *given.values()]))
        if name in _PRODUCTS:
            return self._product(tensors, made)
        if name in ("baddbmm", "addmm"):
            return self._product(tensors[1:], made)
        if name == "einsum":
            return self._einsum(args[0] if args else None, tensors)
        if name == "scaled_dot_product_attention":
            return self._attention(tensors)
        if name in _JOINED:
            return self._joined(args, given, made)
        if name == "stack":
            return self._stacked(args, given, made)
        if own is None or not isinstance(first, Tensor):
            return None
        if name in _REPEATED:
            return self._repeated(name, own, args, given, made)
        if name in ("linear", "bilinear"):
            self._mix(own[-1:])
            return (*own[:-1], _none(made.shape[-1]))
        if name == "index_select" and isinstance(dim := given.get("dim", args[1] if len(args) > 1 else None), int):
            dim %= len(own)
            return (*own[:dim], ((_PICKED, made.shape[dim]),), *own[dim + 1 :])
        if name == "embedding":
            return (*own, _none(made.shape[-1]))
        if name in _CONVOLUTIONS:
            self._mix(own[1:])
            return (own[0], *map(_none, made.shape[1:])) if len(own) == made.ndim else None
        if name in _RECURRENT:
            self._mix(own[1:2] if args[-1:] == (True,) else own[:1])
            return (*own[:-1], _none(made.shape[-1]))
        if name == "multi_head_attention_forward":
            self._mix(own[: len(own) - 2])
            return own
        if name in _REDUCTIONS:
            return self._reduced(own, args, given, made)
        if name in _ALONG:
            self._mix(own[dim] for dim in _dims(args, given, len(own)) if -len(own) <= dim < len(own))
            return own
        return None

    def _product(self, tensors: Sequence[Tensor], made: Tensor) -> Layout | None:
        if len(tensors) < 2 or tensors[0].ndim < 2 or tensors[1].ndim < 2:
            return None
        left, right = tensors[:2]
        one = self.layout(left) or tuple(map(_none, left.shape))
        other = self.layout(right) or tuple(map(_none, right.shape))
        self._mix([one[-1], other[-2]])
        if right.ndim > 2:  # rows with rows, as queries with keys, and not with a weight
            self._mix([one[-2], other[-1]])
        batch = self._aligned([one[:-2], other[:-2]], tuple(made.shape[:-2]))
        return (*batch, one[-2], other[-1])

    def _attention(self, tensors: Sequence[Tensor]) -> Layout | None:
        own, other = [*map(self.layout, tensors), None, None][:2]
        self._mix([dim for layout in (own, other) if layout is not None for dim in layout[-2:]])
        if own is None:
            return None
        if other is not None and len(own) == len(other):
            return (*(self._meet(a, b) for a, b in zip(own[:-2], other[:-2], strict=True)), *own[-2:])
        return own

    def _einsum(self, equation: Any, tensors: Sequence[Tensor]) -> Layout | None:
        if not isinstance(equation, str) or "." in equation or "->" not in equation:
            return None
        sides, letters = equation.replace(" ", "").split("->")
        dims: dict[str, Dim] = {}
        for side, tensor in zip(sides.split(","), tensors, strict=False):
            layout = self.layout(tensor) or tuple(map(_none, tensor.shape))
            for letter, dim in zip(side, layout, strict=False):
                dims[letter] = self._meet(dims[letter], dim) if letter in dims else dim
        self._mix(dim for letter, dim in dims.items() if letter not in letters)
        return tuple(dims[letter] for letter in letters) if set(letters) <= set(dims) else None

    def _joined(self, args: Sequence[Any], given: Mapping[str, Any], made: Tensor) -> Layout | None:
        parts = args[0] if args else given.get("tensors", ())
        dim = args[1] if len(args) > 1 else given.get("dim", given.get("axis", 0))
        layouts = [self.layout(t) or tuple(map(_none, t.shape)) for t in _near(parts) if t.ndim == made.ndim]
        if not isinstance(dim, int) or not layouts:
            return None
        dim %= made.ndim
        joined = [layout[dim] for layout in layouts]
        met = [self._met([layout[index] for layout in layouts]) for index in range(made.ndim) if index != dim]
        alike = len(layouts) == len(list(_near(parts))) and len(set(map(_size, joined))) == 1
        along = ((None, len(layouts)), *self._met(joined)) if alike else _none(made.shape[dim])
        return (*met[:dim], along, *met[dim:])

    def _stacked(self, args: Sequence[Any], given: Mapping[str, Any], made: Tensor) -> Layout | None:
        parts = list(_near(args[:1] or [given.get("tensors", ())]))
        dim = args[1] if len(args) > 1 else given.get("dim", 0)
        if not isinstance(dim, int) or not parts:
            return None
        dim %= made.ndim
        layouts = [self.layout(tensor) or tuple(map(_none, tensor.shape)) for tensor in parts]
        met = [self._met([layout[index] for layout in layouts]) for index in range(made.ndim - 1)]
        return (*met[:dim], _none(len(parts)), *met[dim:])

    def _repeated(
        self, name: str, own: Layout, args: Sequence[Any], given: Mapping[str, Any], made: Tensor
    ) -> Layout | None:
        if name == "repeat_interleave":
            times = args[1] if len(args) > 1 else given.get("repeats")
            dim = args[2] if len(args) > 2 else given.get("dim")
            if not isinstance(times, int) or not isinstance(dim, int):
                return None
            dim %= len(own)
            return (*own[:dim], (*own[dim], (None, times)), *own[dim + 1 :])
        whole = (*(_none(1) for _ in range(made.ndim - len(own))), *own)
        pairs = [(dim, size // max(_size(dim), 1)) for dim, size in zip(whole, made.shape, strict=True)]
        return tuple(dim if times == 1 else ((None, times), *dim) for dim, times in pairs)

    def _reduced(self, own: Layout, args: Sequence[Any], given: Mapping[str, Any], made: Tensor) -> Layout | None:
        if len(list(_near([*args, *given.values()]))) > 1:
            return self._alike(args, given, made)  # the larger of two, element by element
        dims = {dim % len(own) for dim in _dims(args, given, len(own))}
        self._mix(own[dim] for dim in dims or range(len(own)))
        if not dims:
            return None
        kept = [_none(1) if dim in dims else own[dim] for dim in range(len(own))]
        return tuple(kept) if made.ndim == len(own) else tuple(kept[dim] for dim in range(len(own)) if dim not in dims)

    def _alike(self, args: Sequence[Any], given: Mapping[str, Any], made: Tensor) -> Layout | None:
        """Return the layout of an unknown function's result: arguments broadcast, or dimensions kept in front."""
        shape = tuple(made.shape)
        known = [own for tensor in _near([*args, *given.values()]) if (own := self.layout(tensor)) is not None]
        fitting = [own for own in known if _broadcasts(_shape(own), shape)]
        if fitting:
            return self._aligned(fitting, shape)
        for own in known:
            front = next((i for i, (a, b) in enumerate(zip(_shape(own), shape, strict=False)) if a != b), len(shape))
            if front:
                return (*own[:front], *map(_none, shape[front:]))
        return None

    def _aligned(self, layouts: Sequence[Layout], shape: tuple[int, ...]) -> Layout:
        """Return the layout of dimensions aligned from the last one, as in broadcasting."""
        found = []
        for back in range(len(shape), 0, -1):
            size = shape[-back]
            own = [layout[-back] for layout in layouts if len(layout) >= back and _size(layout[-back]) == size]
            found.append(self._met(own) if own else _none(size))
        return tuple(found)

    def _met(self, dims: Sequence[Dim]) -> Dim:
        found = dims[0]
        for dim in dims[1:]:
            found = self._meet(found, dim)
        return found


_KNOWN = (
    _PRODUCTS
    | _JOINED
    | _CONVOLUTIONS
    | _REDUCTIONS
    | _RECURRENT
    | _REPEATED
    | {"stack", "index_select"}
    | {"baddbmm", "addmm", "einsum", "linear", "bilinear", "embedding", "multi_head_attention_forward"}
)


def _none(size: int) -> Dim:
    return ((None, size),)


def _size(dim: Dim) -> int:
    return math.prod(size for _, size in dim)


def _shape(layout: Layout) -> tuple[int, ...]:
    return tuple(map(_size, layout))


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(own in (1, size) for own, size in pairs)


def _viewed(layout: Layout, shape: Sequence[int], strides: Sequence[int]) -> Layout:
    """Return the layout of a view of a contiguous tensor, by the view's strides."""
    factors: list[tuple[int | None, int, int]] = []  # from the innermost, with strides
    stride = 1
    for label, size in reversed([factor for dim in layout for factor in dim]):
        if size > 1:
            factors.append((label, size, stride))
        stride *= size
    return tuple(_viewed_dim(factors, size, stride) for size, stride in zip(shape, strides, strict=True))


def _viewed_dim(factors: Sequence[tuple[int | None, int, int]], size: int, stride: int) -> Dim:
    """Return the factors that a view's dimension runs over; factors that are cut lose their labels."""
    rest, found = size, list[Factor]()
    for label, own, step in factors:
        if rest < 2 or not step <= stride < step * own:
            continue
        skipped = stride // step
        if stride % step or own % skipped:
            return _none(size)
        part = min(own // skipped, rest)
        found.append((label if part == own else None, part))
        if rest % part:
            return _none(size)
        rest //= part
        stride = step * own
    return tuple(reversed(found)) if rest == 1 and found else _none(size)


def _picked(layout: Layout, index: Any, made: Tensor) -> Layout | None:
    """Return the layout of rows that a tensor picks, behind dimensions that are taken whole; None of other lookups."""
    parts = index if isinstance(index, tuple) else (index,)
    kept = next((n for n, part in enumerate(parts) if not (isinstance(part, slice) and part == slice(None))), 0)
    if len(parts) != kept + 1 or not isinstance(parts[kept], Tensor):
        return None
    by_mask = parts[kept].dtype is torch.bool
    taken = parts[kept].ndim if by_mask else 1
    new = 1 if by_mask else parts[kept].ndim
    picked = [((_PICKED, size),) for size in made.shape[kept : kept + new]]
    return (*layout[:kept], *picked, *layout[kept + taken :])


def _dims(args: Sequence[Any], given: Mapping[str, Any], ndim: int) -> list[int]:
    """Return the dimensions in a function's arguments; none if there are none."""
    told = given.get("dim", given.get("axis", args[1] if len(args) > 1 else None))
    dims = told if isinstance(told, list | tuple) else [told]
    return [dim for dim in dims if isinstance(dim, int) and not isinstance(dim, bool) and -ndim <= dim < ndim]


def _near(values: Iterable[Any]) -> Iterator[Tensor]:
    return (value for value in _flat(values) if isinstance(value, Tensor) and not value.is_nested)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        elif isinstance(value, slice):
            yield from (value.start, value.stop, value.step)
        else:
            yield value
