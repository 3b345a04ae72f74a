"""Blocks: one layer's share of the Fisher matrix each, and the map of its tensors to the one layout.

A layer type joins by one small class that says how its input and its output gradient become rows, and how its
parameters fill the gradient matrix; everything else (sharing, sampling, scales, counts) is common to all of them:
`calls` and `rows`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from kfac_dist.config.schema import Sharing
from kfac_dist.curvature.blocks.layer_calls import Handle, LayerCall, Recorder
from kfac_dist.curvature.blocks.projection import Signs, wide
from kfac_dist.curvature.blocks.rows import MicroBatch, sample, shared_rows, unscale
from kfac_dist.curvature.class_conditional import Members
from kfac_dist.curvature.factors import FactorKind, FactorSpec, Heads, Side
from kfac_dist.hooks import after_forward


class StatisticsSink(Protocol):
    """The destination of a block's measurements; implemented by `statistics.RunningAverages`."""

    def add_rows(
        self, block: str, side: Side, rows: Tensor, *, scale: float, ones: bool, members: Members | None = None
    ) -> None:
        """Add `scale · [rows, 1]ᵀ[rows, 1]` for rows `[batch, M, d]`, each class's to its own matrices."""

    def add_values(self, block: str, side: Side, values: Tensor) -> None:
        """Add `[classes·batch, n]` to a diagonal factor, or `[classes·batch, n, n]` to a dense one."""

    def add_count(self, block: str, side: Side, count: float | Tensor, by_class: Tensor | None = None) -> None:
        """Add to the weight that the factor's sum will be divided by, and to those of its classes `[C]`."""


class Block(ABC):
    """One layer's share of the Fisher.

    Attributes:
        name: The module's name in the model.
        module: The layer.
        modules: All modules whose calls are this block's uses: more than one if they share the weight.
        parameters: Full parameter names and parameters, in the order in which the gradient matrix takes them.
        factors: The factors that are measured, by side.
        matrix_shape: `(batch, d_out, d_in(+1))` of the gradient matrix.
        sharing: Treatment of positions that share the weight.
        partial_traces: Whether A and G are the partial traces of F, so that F ≈ A ⊗ G / tr F and not A ⊗ G.
        by_class: Whether its statistics can be kept apart by class.
        heads: The layer's relation to attention's heads, as found by `find_blocks`; None if it has none.
        per_sample: Whether rows of A and G make the gradients of single samples, as EKFAC needs them.
        parameter_names: The layer's names of its parameters, in the order of `parameters`; without the first, the
            weight, it has no block.
    """

    partial_traces = False
    by_class = False
    per_sample = False
    parameter_names: tuple[str, ...] = ("weight", "bias")

    def __init__(
        self,
        name: str,
        module: nn.Module,
        sharing: Sharing,
        *,
        also: Sequence[nn.Module] = (),
        parameters: dict[str, nn.Parameter] | None = None,
    ) -> None:
        self.name = name
        self.module = module
        self.modules = (module, *also)
        self.sharing = sharing
        self.parameters = (
            trained_parameters(name, self.modules, self.parameter_names) if parameters is None else parameters
        )
        # As they are now: an engine that shards them may show less later.
        self._shapes = [tuple(parameter.shape) for parameter in self.parameters.values()]
        self.heads: Heads | None = None

    factors: tuple[FactorSpec, ...]
    matrix_shape: tuple[int, int, int]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The whole shapes of `parameters`, as they were when the block was found."""
        return dict(zip(self.parameters, self._shapes, strict=False))  # some blocks leave the bias to others

    def watch(self, recorder: Recorder) -> list[Handle]:
        """Put hooks on the layer that report its calls; by default one on each of the block's modules."""

        def ran(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if not recorder.watching:
                return None
            if output is not None and not isinstance(output, Tensor):
                recorder.refuse(f"{type(module).__name__} returns {type(output).__name__}, not a tensor")
                return None
            inputs = next((value for value in (*args[:1], *kwargs.values()) if isinstance(value, Tensor)), None)
            if inputs is None:
                recorder.refuse(f"{type(module).__name__} was called without a tensor")
                return None
            return recorder.record(inputs, output, source=module)

        return [after_forward(module, ran, with_kwargs=True, always_call=True) for module in self.modules]

    def own_tensors(self, source: nn.Module) -> dict[str, Tensor]:
        """Return the block's parameters by full name, as the module that was called shows them now."""
        return {name: cast(Tensor, getattr(source, name.rpartition(".")[2])) for name in self.parameters}

    @abstractmethod
    def project(self, call: LayerCall, batch_size: int | None, signs: Signs) -> tuple[Tensor, Tensor]:
        """Project the gradient of the block's parameters that one call makes, Σ ĝᵀa in the gradient matrix's layout.

        The statistics are made of the same rows: where this isn't the gradient that autograd finds, they are wrong.

        Args:
            call: One call with the gradient at its output, as it came.
            batch_size: Samples that the model was called with.
            signs: The random matrices.

        Returns:
            The projections `[k]`, and the sums of their terms' magnitudes `[k]`, both fp64.
        """

    def project_gradient(self, name: str, grad: Tensor, signs: Signs) -> Tensor:
        """Project a parameter's part of the gradient matrix; returns `[k]`, fp64."""
        matrix = torch.zeros(self.matrix_shape, device=grad.device, dtype=wide(grad).dtype)
        tensors = [grad if key == name else grad.new_zeros(()).expand(p.shape) for key, p in self.parameters.items()]
        for view, place in self.matrix_views(tensors, matrix):
            place.copy_(view)
        return signs.project(matrix)

    def kept(self, inputs: Tensor) -> Tensor:
        """Return the input as autograd keeps it for the layer's own backward, which under autocast may be a cast copy.

        A model may overwrite the original as soon as the layer has run.
        """
        return inputs

    def unbatched(self, inputs: Tensor) -> bool:
        """Whether an input is of one sample, without a batch's dimension."""
        return inputs.ndim < 2

    def leading(self, output: Sequence[int]) -> int:
        """Return how many dimensions of an output stand before its features; 1 for images, `[B, C, ...]`."""
        return max(len(output) - 1, 1)

    def rows(self, parameter: str) -> tuple[int, int] | None:
        """Return which rows `[first, last)` of a parameter are this block's, where it shares one; None: all of it."""
        return None

    def own_shapes(self) -> list[tuple[int, ...]]:
        """Return the shape of this block's part of each parameter: all of it, or its `rows`."""
        rows = [self.rows(name) for name in self.parameters]
        return [
            shape if own is None else (own[1] - own[0], *shape[1:])
            for shape, own in zip(self.shapes.values(), rows, strict=True)
        ]

    def matrix_views(self, tensors: Sequence[Tensor], matrix: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Pair views of parameter-shaped tensors with the views of the gradient matrix that hold the same values."""
        views = self.parameter_views(matrix)
        return [
            (part_of(tensor, self.rows(name), view), view)
            for name, tensor, view in zip(self.parameters, tensors, views, strict=True)
        ]

    @abstractmethod
    def parameter_views(self, matrix: Tensor) -> list[Tensor]:
        """Return views of a gradient matrix that are shaped like this block's parameters, as `own_shapes` says.

        Together they cover every entry once. They stay valid as long as the matrix's memory. Where groups lie apart in
        the matrix, a first dimension may be cut in two, `[groups, rows, ...]`; see `part_of`.

        Args:
            matrix: Contiguous, of `matrix_shape`.
        """

    @abstractmethod
    def measure(
        self, calls: Sequence[LayerCall], batch: MicroBatch, sink: StatisticsSink, sides: frozenset[Side]
    ) -> None:
        """Add the statistics of all uses of the layer in one forward pass to the sink.

        Args:
            calls: The calls of the layer whose output gradients arrived.
            batch: Sizes, scales and sampling of the micro-batch.
            sink: Receives sums and counts.
            sides: The factors to measure now; a Fisher of K-FAC's own measures them in separate passes.
        """

    def describe(self) -> str:
        """Return the block's kind and shapes, the part of the plan that every rank has to agree on."""
        factors = " ".join(f"{f.side}:{f.kind}{f'{f.batch}×' if f.batch > 1 else ''}{f.dim}" for f in self.factors)
        return f"{type(self).__name__} {'×'.join(map(str, self.matrix_shape))} {factors} {self.sharing}"


class KroneckerBlock(Block):
    """A block whose Fisher is approximated by A ⊗ G (Martens & Grosse 2015; Grosse & Martens 2016).

    Subclasses say how tensors become rows `[batch, B, T, d]`.
    """

    has_bias: bool
    by_class = True
    per_sample = True

    @abstractmethod
    def input_rows(self, inputs: Tensor, batch_size: int | None) -> Tensor:
        """Return activations `[batch, B, T, d_in]`, without the homogeneous coordinate."""

    @abstractmethod
    def output_rows(self, grad: Tensor, batch_size: int | None) -> Tensor:
        """Return output gradients `[batch, B, T, d_out]`."""

    def measure(
        self, calls: Sequence[LayerCall], batch: MicroBatch, sink: StatisticsSink, sides: frozenset[Side]
    ) -> None:
        """Add A from inputs and G from output gradients; see `Block.measure`."""
        if Side.A in sides:
            self._measure_inputs(calls, batch, sink)
        if Side.G in sides:
            self._measure_outputs([call.grad for call in calls if call.grad is not None], batch, sink)

    def kept(self, inputs: Tensor) -> Tensor:
        """See `Block.kept`: autocast casts the operands of matrix products."""
        return as_autocast(inputs)

    def use_rows(self, call: LayerCall, batch_size: int | None) -> Tensor:
        """Return the activations of one call; layers whose rows depend on more than their input override it."""
        return self.input_rows(call.inputs, batch_size)

    def project(self, call: LayerCall, batch_size: int | None, signs: Signs) -> tuple[Tensor, Tensor]:
        """See `Block.project`."""
        assert call.grad is not None
        rows, grads = self.use_rows(call, batch_size), self.output_rows(call.grad, batch_size)
        return signs.project_rows(grads.flatten(1, 2), rows.flatten(1, 2), ones=self.has_bias)

    def _measure_inputs(self, calls: Sequence[LayerCall], batch: MicroBatch, sink: StatisticsSink) -> None:
        rows = [self.use_rows(call, batch.batch_size) for call in calls]
        for part in shared_rows(rows, self.sharing, mean=True):
            kept, members = sample(part, batch), batch.members(self.name, part.shape[1], inputs=True)
            sink.add_rows(self.name, Side.A, kept, scale=1.0, ones=self.has_bias, members=members)
            counts = None if members is None else members.counts(kept.device)
            sink.add_count(self.name, Side.A, float(kept.shape[1]), counts)

    def _measure_outputs(self, grads: Sequence[Tensor], batch: MicroBatch, sink: StatisticsSink) -> None:
        rows = [self.output_rows(tensor, batch.batch_size) for tensor in grads]
        total = kept_total = 0
        by_class: list[Tensor] = []
        for part in shared_rows(rows, self.sharing, mean=False):
            kept, members = sample(part, batch), batch.members(self.name, part.shape[1], inputs=False)
            scaled, factor = unscale(kept, batch)
            sink.add_rows(self.name, Side.G, scaled, scale=factor**2, ones=False, members=members)
            total, kept_total = total + part.shape[1], kept_total + kept.shape[1]
            by_class += [] if members is None else [members.counts(kept.device)]
        # The sum above has kept/total of its rows: its count shrinks alike, so that sampling leaves the scale alone.
        counts = torch.stack(by_class).sum(0) * (batch.terms / max(total, 1)) if by_class else None
        sink.add_count(self.name, Side.G, batch.terms * (kept_total / max(total, 1)), counts)


def trained_parameters(
    name: str, modules: Sequence[nn.Module], keys: Sequence[str] = ("weight", "bias")
) -> dict[str, nn.Parameter]:
    """Return the trained parameters among `keys` that all the modules share, by the first one's full names."""
    own = dict(modules[0].named_parameters(recurse=False))
    return {
        f"{name}.{key}" if name else key: parameter
        for key, parameter in ((key, own[key]) for key in keys if key in own)
        if parameter.requires_grad and all(getattr(other, key, None) is parameter for other in modules)
    }


def as_autocast(inputs: Tensor) -> Tensor:
    """Return the input of a matrix product as autocast casts it."""
    device = inputs.device.type
    if not inputs.is_floating_point() or not torch.is_autocast_enabled(device):
        return inputs
    return inputs.detach().to(torch.get_autocast_dtype(device))


def part_of(tensor: Tensor, rows: tuple[int, int] | None, view: Tensor) -> Tensor:
    """Return a block's rows of a parameter-shaped tensor, in the shape of its view of the gradient matrix."""
    own = tensor if rows is None else tensor[rows[0] : rows[1]]
    # Only a first dimension is cut, so that any memory format (channels_last) has such a view.
    return own if own.ndim == view.ndim else own.unflatten(0, view.shape[:2])


def weight_and_bias_views(shapes: Sequence[Sequence[int]], matrix: Tensor) -> list[Tensor]:
    """View the columns of `[batch, d_out/batch, d_in(+1)]` as a `[d_out, ...]` weight and a `[d_out]` bias."""
    rows = matrix.view(-1, matrix.shape[-1])
    weight = rows[:, : math.prod(shapes[0][1:])].unflatten(1, shapes[0][1:])
    return [weight, rows[:, -1]][: len(shapes)]


def dense(side: Side, dim: int, batch: int = 1) -> FactorSpec:
    """Return the spec of a dense factor."""
    return FactorSpec(side, dim, batch, FactorKind.DENSE)
