"""The arbiter: rows captured by a block's hooks must reproduce autograd's gradient of its parameters.

A block believes that its weight gradient is `Σ ĝᵀa` of the inputs and output gradients that were captured. The
statistics are made of the same rows, so where that is wrong, they are wrong, silently: a subclass that transforms its
weight, a weight that is also used by hand, a loss of derivatives, a hook that changes the output. Both sides are random
projections (`blocks.projection`): those of the rows, and those of the gradient as it arrives at the parameter, on this
rank, before anything averages, shards, unscales or clips it. Under DDP, FSDP2 and ZeRO alike that is a whole tensor.

It sees wrong content, not a wrong count of the loss's terms, which multiplies both sides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.compat.torch import forward_hooks, is_batched, register_first_hook
from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.layer_calls import Handle, LayerCall
from kfac_dist.curvature.blocks.projection import PROJECTIONS, Signs
from kfac_dist.curvature.capture.autograd import Purpose, purpose
from kfac_dist.errors import ModelError

# Relative distance from which a block is wrong: right ones agree to rounding, wrong ones are off by 0.1 and more.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
# Rounding of sums whose terms cancel, in multiples of the sum of their magnitudes; products of TF32 round more.
_ROUNDING = {torch.float64: 2.0**-48, torch.float32: 2.0**-20}
_TF32_ROUNDING = 2.0**-11
# Values that a gradient matrix has to have for each multiple that is fitted to it.
_PENALIZED = 3


@dataclass(frozen=True)
class Mismatch:
    """A block whose captured rows don't make its gradient.

    Attributes:
        block: Its name.
        off: Distance of the two, in multiples of the gradient's norm; infinite if that is zero.
        scale: The number by which the captured gradient comes nearest to the true one.
        cause: The probable cause, and a correction.
    """

    block: str
    off: float
    scale: float
    cause: str


class _Sides:
    """Projections of one block: of its rows, and of its gradient."""

    def __init__(self, block: Block, device: torch.device) -> None:
        zeros = functools.partial(torch.zeros, PROJECTIONS, dtype=torch.float64, device=device)
        self.signs = Signs(block.name, block.matrix_shape, device)
        self.size = zeros()
        self.rows = {asked: zeros() for asked in Purpose}
        self.gradient = {Purpose.LOSS: zeros(), Purpose.QUERY: zeros()}
        self.came: dict[Purpose, set[str]] = {}
        self.dtype = torch.float64
        self.captured = False
        # Of the gradients that a penalty on each parameter would have, |w|² and |w|.
        self.penalties: dict[str, list[Tensor]] = {}

    def note_dtype(self, dtype: torch.dtype) -> None:
        """Judge by the coarsest precision that any side has been in."""
        if dtype in _TOLERANCE and _TOLERANCE[dtype] > _TOLERANCE[self.dtype]:
            self.dtype = dtype


class Arbiter:
    """Compares, block by block, until each has been judged.

    Args:
        blocks: The blocks to judge.
        judged: Names of the blocks that were found right before.

    Attributes:
        open: Names of the blocks that no step has shown yet.
        differentiated: Whether a backward pass was itself to be differentiated (`create_graph=True`).
        replaced: Blocks whose calls used tensors computed from their parameters in place of these.
        unobserved: Blocks that were called while passes were ignored, with a graph behind the call.
        transformed: Blocks that were called under a transform of torch.func.
        paused: Whether to ignore the passes that run now.
    """

    def __init__(self, blocks: Sequence[Block], judged: Set[str] = frozenset()) -> None:
        self._blocks = {block.name: block for block in blocks}
        self.open = set(self._blocks) - judged
        self.differentiated = False
        self.replaced: set[str] = set()
        self.unobserved: set[str] = set()
        self.transformed: set[str] = set()
        self.paused = False
        self._sides: dict[str, _Sides] = {}
        self._refused: dict[str, str] = {}
        self._postponed: set[str] = set()
        self._handles: list[Handle] = []
        self._watched: set[tuple[int, str]] = set()
        self._expected: dict[str, set[str]] = {}

    def watch(self, block: Block, found: Mapping[str, Any]) -> None:
        """Ask for the gradients of a block's parameters.

        Args:
            block: The block.
            found: Its parameters' `AccumulateGrad` nodes, by full name.
        """
        if block.name not in self.open:
            return
        for name, accumulator in found.items():
            if (id(accumulator.variable), block.name) not in self._watched:
                self._watched.add((id(accumulator.variable), block.name))
                came = functools.partial(self._gradient_came, block, name, accumulator)
                self._handles.append(register_first_hook(accumulator.variable, came))
                self._expected.setdefault(block.name, set()).add(name)

    def refuse(self, block: Block, cause: str) -> bool:
        """Find a block wrong because of a call that can't be measured; returns whether it was still to be judged."""
        if block.name in self.open:
            self._refused.setdefault(block.name, cause)
        return block.name in self.open

    def postpone(self, name: str) -> None:
        """Judge a block at another step, and discard its captured rows of this one."""
        self._postponed.add(name)

    def captured(self, block: Block, calls: Sequence[LayerCall], asked: Purpose) -> bool:
        """Take the calls of a block, with the gradient at each; returns whether they can be measured.

        Args:
            block: The block.
            calls: Its calls.
            asked: The purpose of the pass that brought the gradients: OTHER for those of K-FAC's own, which make none
                to compare with.
        """
        if block.name not in self.open:
            return True
        if block.name in self._refused:
            return False
        try:
            self._project(block, calls, asked)
        except torch.OutOfMemoryError:
            raise
        except (ModelError, RuntimeError, TypeError, ValueError, IndexError) as error:
            # The layer was given something else than its type takes; what that is, the user's class knows.
            first = calls[0]
            self.refuse(
                block,
                f"it was given {list(first.inputs.shape)} and returned {list(first.shape)}, which is not what "
                f"{type(block.module).__name__} takes and gives ({str(error).splitlines()[0]})",
            )
            return False
        return True

    def _project(self, block: Block, calls: Sequence[LayerCall], asked: Purpose) -> None:
        for call in calls:
            assert call.grad is not None
            sides = self._sides_of(block, call.grad.device)
            values, size = block.project(call, call.batch.batch_size, sides.signs)
            sides.rows[asked] += values
            sides.size += size
            sides.captured |= asked is not Purpose.OTHER
            sides.note_dtype(call.grad.dtype)
            sides.note_dtype(call.inputs.dtype)

    def reset(self) -> None:
        """Forget the projections of this step."""
        self._sides.clear()
        self._refused.clear()
        self._postponed.clear()
        self.differentiated = False
        self.replaced.clear()
        self.unobserved.clear()
        self.transformed.clear()
        self.remove()

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watched.clear()
        self._expected.clear()

    def judge(self) -> tuple[set[str], list[Mismatch]]:
        """Compare the projections since the last call; waits for the device.

        Returns:
            The blocks that were judged, and those of them that are wrong.
        """
        judged = set(self._refused)
        wrong = [Mismatch(name, math.inf, math.nan, cause) for name, cause in self._refused.items()]
        for name, sides in self._sides.items():
            asked = Purpose.QUERY if sides.came.keys() == {Purpose.QUERY} else Purpose.LOSS
            if name in self._refused or name in self._postponed or not (sides.came or sides.captured):
                continue
            if sides.came.get(asked) and sides.came[asked] != self._expected.get(name, sides.came[asked]):
                continue  # backward was asked for some of its parameters' gradients only
            rows, gradient, size = (torch.stack([sides.rows[asked], sides.gradient[asked], sides.size])).cpu()
            if not bool(torch.isfinite(rows + gradient + size).all()):
                continue  # a step that overflowed says nothing
            judged.add(name)
            norm, distance = _norm(gradient), _norm(rows - gradient)
            rounding = _ROUNDING.get(sides.dtype, _ROUNDING[torch.float32])
            if sides.size.device.type == "cuda" and sides.dtype is torch.float32:
                rounding = _TF32_ROUNDING
            if distance <= _TOLERANCE[sides.dtype] * max(norm, _norm(rows)) + rounding * float(size.mean()):
                continue
            penalties = [term for terms in sides.penalties.values() for term in terms]
            large = math.prod(self._blocks[name].matrix_shape) >= _PENALIZED * len(penalties)  # else they fit anything
            if penalties and large and _norm(_beside(gradient - rows, penalties)) <= _TOLERANCE[sides.dtype] * norm:
                continue  # a penalty on the weights that is part of the loss: it has no rows, and makes none wrong
            square = float(rows.square().sum())
            scale = float((rows * gradient).sum()) / square if square else math.inf
            off = distance / norm if norm else math.inf
            cause = _cause(
                self._blocks[name],
                captured=sides.captured,
                replaced=name in self.replaced,
                unobserved=name in self.unobserved,
                transformed=name in self.transformed,
                differentiated=self.differentiated,
            )
            wrong.append(Mismatch(name, off, scale, cause))
        self.reset()
        return judged, wrong

    def _gradient_came(self, block: Block, name: str, accumulator: Any, grad: Tensor) -> None:
        asked = purpose([accumulator])
        if self.paused or asked is Purpose.OTHER or grad.is_sparse or is_batched(grad):
            return
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            sides = self._sides_of(block, grad.device)
            sides.gradient[asked] += block.project_gradient(name, grad.detach(), sides.signs)
            weight = accumulator.variable.detach()
            if name not in sides.penalties and weight.shape == grad.shape:
                sides.penalties[name] = [
                    block.project_gradient(name, term.to(grad.dtype), sides.signs) for term in (weight, weight.sign())
                ]
            sides.came.setdefault(asked, set()).add(name)
            sides.note_dtype(grad.dtype)

    def _sides_of(self, block: Block, device: torch.device) -> _Sides:
        if block.name not in self._sides:
            self._sides[block.name] = _Sides(block, device)
        return self._sides[block.name]


def _beside(rest: Tensor, penalties: Sequence[Tensor]) -> Tensor:
    """Return the residual of projections after least-squares multiples of some others are subtracted."""
    columns = torch.stack([term.cpu() for term in penalties], dim=1)
    fitted: Tensor = torch.linalg.pinv(columns) @ rest
    return rest - columns @ fitted


def _norm(values: Tensor) -> float:
    """Estimate the norm of a matrix from its projections."""
    return float(values.square().mean().sqrt())


def _cause(
    block: Block, *, captured: bool, replaced: bool, unobserved: bool, transformed: bool, differentiated: bool
) -> str:
    """Return the probable cause of a mismatch, and the way out."""
    kind = type(block.module)
    name = kind.__name__
    if replaced:
        return (
            "its calls used tensors computed from its parameters in their place, as torch.func.functional_call does; "
            "K-FAC measures the parameters themselves: call the model, or name the layer in kfac.curvature.exclude"
        )
    if unobserved:
        return (
            "it was also called inside of kfac.unobserved(), and the gradient of that call came outside of it: send "
            "that loss back by itself, inside of kfac.unobserved(), too"
        )
    if transformed:
        return (
            "a transform of torch.func (grad, jvp, vmap) was part of the loss, whose gradient reaches the weight by a "
            "way that no output gradient shows; send that part back by itself, inside of kfac.unobserved(), or name "
            "the layer in kfac.curvature.exclude"
        )
    if not captured:
        return (
            "its weight got a gradient, and no call of the layer made it: the weight is used by hand, as in "
            "F.linear(x, layer.weight); call the layer instead"
        )
    if differentiated:
        return (
            "the loss contains derivatives of the model's outputs (create_graph=True), whose gradient reaches the "
            "weight by a second way, which no output gradient shows; name the layer in kfac.curvature.exclude"
        )
    foreign = [hook for hook in forward_hooks(block.module) if not _is_ours(hook)]
    if foreign:
        return (
            "a forward hook on it, registered before KFAC was made, may change its output; register it afterwards, or "
            "move its work into the model's forward"
        )
    if not kind.__module__.startswith("torch.nn.") and "forward" in vars(kind):
        return (
            f"{name}.forward may transform the weight, the input or the output; let the module only compute what "
            f"{_base_name(kind)} does, or name it in kfac.curvature.exclude"
        )
    return (
        "its weight may also be used by hand, as in F.linear(x, layer.weight): call the layer wherever its weight is "
        "used; or the loss may contain a penalty on it that is neither |w| nor |w|²: send that back by itself, inside "
        "of kfac.unobserved(); else name the layer in kfac.curvature.exclude"
    )


def _base_name(kind: type[nn.Module]) -> str:
    base = next((base for base in kind.__mro__ if base.__module__.startswith("torch.nn.")), nn.Module)
    return f"nn.{base.__name__}"


def _is_ours(hook: Any) -> bool:
    function = getattr(hook, "func", hook)
    return str(getattr(function, "__module__", type(function).__module__)).startswith("kfac_dist.")
