"""Is the loss the mean that K-FAC takes it for? Asked once, of the first measured step, from the model's outputs.

`curvature.scale` finds the factor of the terms' gradients; here that number is compared with what the loop
said, or with a mean over the micro-batch if it said nothing. A mismatch by n or T stops every rank; another one is a
warning, since a loss may be weighted on purpose, also by a number that happens to be W.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.config.schema import Likelihood, LossTerms
from kfac_dist.curvature.blocks import MicroBatch
from kfac_dist.curvature.blocks.layer_calls import Batch
from kfac_dist.curvature.capture.autograd import of_the_loop, will_run
from kfac_dist.curvature.capture.samples import TensorDim, tensors_in
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.errors import ModelError
from kfac_dist.hooks import HookHandle, after_forward
from kfac_dist.preconditioner.measure.scale import gradient_scale

# Largest deviation of a scale from 1: above the rounding of half-precision outputs, below any wrong count's.
TOLERANCE = 0.04


@dataclass(frozen=True)
class Terms:
    """Reference for a loss's scale.

    Attributes:
        samples: B of the micro-batch.
        positions: Terms that a sample has if every position is one, T.
        ranks: W.
        loss_terms: Terms of the mean, as configured.
        scaled: Whether an AMP scaler is known of.
    """

    samples: int
    positions: int
    ranks: int
    loss_terms: LossTerms
    scaled: bool = False


def explain_scale(scale: float, terms: Terms) -> tuple[bool, str] | None:
    """Explain a scale that should be 1.

    Args:
        scale: Output gradients that K-FAC would use, in multiples of those of the loss's terms.
        terms: Sizes that a wrong scale may be made of.

    Returns:
        None if it is 1; else whether it has an explanation that leaves no doubt, and the message.
    """

    def near(value: float) -> bool:
        return abs(scale / value - 1) < TOLERANCE

    if near(1.0):
        return None
    n = terms.samples if terms.loss_terms is LossTerms.SAMPLE else terms.samples * terms.positions
    found = f"the loss's gradient is {scale:.4g} times that of a mean over {n} {terms.loss_terms}s"
    if terms.samples * terms.positions > 1 and (near(n) or near(terms.samples * terms.positions)):
        return True, (
            f"{found}: the loss is a sum. Divide it by the number of {terms.loss_terms}s (reduction='mean'), or call "
            "kfac.micro_batch(divisor=1.0) before each forward pass"
        )
    if terms.positions > 1 and terms.loss_terms is LossTerms.SAMPLE and near(1 / terms.positions):
        return True, (
            f"{found}: it is a mean over the {terms.positions} positions of each sample too. Set "
            "kfac.curvature.loss_terms: token"
        )
    if terms.positions > 1 and terms.loss_terms is LossTerms.TOKEN and near(terms.positions):
        return True, (
            f"{found}: it is a sum over the {terms.positions} positions of a sample. Divide it by the number of "
            "tokens, or set kfac.curvature.loss_terms: sample"
        )
    if terms.ranks > 1 and near(1 / terms.ranks):
        return False, (
            f"{found}: it looks divided by the {terms.ranks} ranks once more. Leave that to the averaging of the "
            "gradients (DDP does it)"
        )
    if terms.ranks > 1 and near(terms.ranks):
        return False, (
            f"{found}: it looks multiplied by the {terms.ranks} ranks. Leave that out, or call "
            f"kfac.micro_batch(divisor=...) with the number that the sum of the terms is divided by"
        )
    if not terms.scaled and scale >= 2**8 and near(2.0 ** round(math.log2(scale))):
        return True, f"{found}: it carries an AMP loss scale. Pass KFAC(..., grad_scaler=scaler)"
    return False, (
        f"{found}. If it is accumulated or leaves out terms, call kfac.micro_batch(divisor=..., terms=...) before each "
        "forward pass; if it is weighted on purpose, K-FAC's G carries the square of that weight"
    )


@dataclass(frozen=True)
class Outputs:
    """The outputs of a model that a loss reads.

    Attributes:
        values: The first of them.
        gradient: The loss's gradient there.
        read: Numbers of those that it reads, among those with dimensions that depend on trained parameters.
    """

    values: Tensor
    gradient: Tensor
    read: tuple[int, ...]


class LossScaleWatch:
    """Takes outputs and their gradient from the first measured backward pass.

    Forward passes that no backward follows (a look at the model before training begins) are passed over, as are whole
    steps whose gradients don't reach the model's outputs, up to `_STEPS` of them.

    Args:
        model: The bare model.
        current: Returns the micro-batch whose forward pass runs.
        came: Called with the outputs that the loss reads and the micro-batch as soon as a gradient has come; returns
            sizes and scales, None if the number of terms is not known.
        compare: Whether to compare the scale; if not, ranks only agree on where the number of samples stands.

    """

    def __init__(
        self,
        model: nn.Module,
        current: Callable[[], Batch],
        came: Callable[[Outputs, Batch], MicroBatch | None],
        *,
        compare: bool = True,
    ) -> None:
        self.paused = False
        self._current = current
        self._came = came
        self._compare = compare
        self._seen: tuple[Tensor, Tensor, MicroBatch | None] | None = None
        self._nodes: tuple[object, list[Any]] | None = None  # of the last forward pass
        self._watching = False
        self._unseen = 0
        self._handle: HookHandle | None = after_forward(model, self._forward_ran)

    @property
    def over(self) -> bool:
        """Whether the question is answered."""
        return self._handle is None

    def begin(self, *, active: bool) -> None:
        """Begin a step; look at its first forward pass if it is measured."""
        self._watching = active
        self._seen = self._nodes = None

    def judge(
        self,
        likelihood: Likelihood | None,
        communicator: Communicator,
        *,
        passes: int,
        scaled: bool,
        place: TensorDim | None,
        uncounted: ModelError | None,
        unclear: str | None = None,
    ) -> TensorDim | None:
        """Compare the scale with the described loss; collective, once, and waits for the device.

        Args:
            likelihood: The predictive distribution, if the configuration names it.
            communicator: The ranks.
            passes: Forward passes of this step.
            scaled: Whether an AMP scaler is known of.
            place: This rank's place of the number of samples.
            uncounted: Why it has not.
            unclear: Why that may be another place.

        Returns:
            Where all ranks find the number of samples from now on.

        Raises:
            ModelError: On every rank, the scale is wrong by a number of samples, positions or ranks, or a rank doesn't
                know its number of terms.
        """
        seen, self._seen = self._seen, None
        found, problem = None, None if uncounted is None else (True, str(uncounted))
        if seen is not None and seen[2] is not None and self._compare:
            outputs, gradient, micro = seen[0], seen[1], seen[2]
            found = _scale(outputs, gradient, micro, likelihood)
            if problem is None and found is None:
                problem = _beyond_bound(outputs, gradient, micro, likelihood)
            elif problem is None and found is not None:
                problem = explain_scale(found, _terms(outputs, micro, communicator.size, scaled))
            if problem is None and (found is None or micro.divisor is not None):
                problem = _left_out(gradient, micro)
        if problem is None and unclear is not None:
            problem = (False, unclear)
        # An overflow of the loss scale makes the first gradients infinite: then the next measurement is asked.
        overflowed = seen is not None and not bool(torch.isfinite(seen[1]).all())
        answers = communicator.gather_objects((overflowed, seen is None, problem, place), label="agreement")
        self._unseen += self._compare and all(unseen for _, unseen, *_ in answers)
        again = any(over for over, *_ in answers) or 0 < self._unseen < _STEPS
        proofs = [message for *_, said, _ in answers if said is not None for proven, message in [said] if proven]
        agreed = next((where for *_, where in answers if where is not None), None)
        if not proofs and again:
            return agreed
        self.stop()
        if proofs:
            raise ModelError(proofs[0])
        accumulated = found is not None and passes > 1 and abs(found * passes - 1) < TOLERANCE
        if problem is not None and not accumulated:
            warnings.warn(problem[1], stacklevel=2)
        return agreed

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Return a context in which nothing is looked at, forward or back, however it ends."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def stop(self) -> None:
        """Take the hook off the model."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._nodes = None

    def _forward_ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._compare or not self._watching or self.paused or not torch.is_grad_enabled() or not of_the_loop():
            return
        trained = [part for part in tensors_in(output) if part.ndim and part.requires_grad]
        if not trained:
            return
        if len({part.shape[0] for part in trained}) == 1:
            trained = trained[:1]  # whichever the loss reads, they have as many samples
        values = [part.detach() for part in trained]
        if trained[0].numel() < _COPIED:
            values[0] = values[0].clone()
        batch, token = self._current(), object()
        # Not in the hooks: a graph that holds hooks which hold its nodes would never go.
        self._nodes = (token, [part.grad_fn for part in trained]) if len(trained) > 1 else None

        def gradient_came(gradient: Tensor, index: int) -> None:
            if not self._watching or self.paused:
                return
            kept = self._nodes
            read = _read(kept[1]) if kept is not None and kept[0] is token else [index]
            if index != read[0]:
                return  # it only leads to another output, or comes after it
            self._watching, self._nodes = False, None
            outputs = Outputs(values[index], gradient.detach(), tuple(read))
            self._seen = (outputs.values, outputs.gradient, self._came(outputs, batch))

        for index, part in enumerate(trained):
            part.register_hook(functools.partial(gradient_came, index=index))


def _read(nodes: list[Any]) -> list[int]:
    """Return which of the model's outputs the loss reads, in a backward pass: those that lead to no other of them."""
    running = [index for index, node in enumerate(nodes) if node is not None and will_run(node)]
    if len(running) < 2:
        return running or list(range(len(nodes)))
    behind: set[Any] = set()
    for index in running:
        todo = [source for source, _ in nodes[index].next_functions]
        while todo:
            node = todo.pop()
            if node is not None and node not in behind:
                behind.add(node)
                todo += [source for source, _ in node.next_functions]
    return [index for index in running if nodes[index] not in behind] or running


# Gradients that differ by less of the largest are the same.
_SAME = 1e-5
# Measured steps that may bring nothing before the question is dropped: each of them waits for the device once.
_STEPS = 3
# Outputs of more values are not copied; one that the loss changes in place then no longer fits its gradient.
_COPIED = 2**22


def _scale(outputs: Tensor, gradient: Tensor, micro: MicroBatch, likelihood: Likelihood | None) -> float | None:
    """Return the factor between K-FAC's output gradients and the terms' own.

    A Gaussian's gradient c·(s − y) tells nothing of c while y may be any number: there the doctor's comparison of a
    batch with its samples has to do.
    """
    if likelihood is Likelihood.GAUSSIAN:
        return None
    scale = gradient_scale(outputs, gradient, likelihood)
    return None if scale is None else scale * _divisor(micro)


def _beyond_bound(
    outputs: Tensor, gradient: Tensor, micro: MicroBatch, likelihood: Likelihood | None
) -> tuple[bool, str] | None:
    """Say so if a term's gradient is larger than that of any label, soft ones included: |p − y| ≤ 1 in each output."""
    if likelihood in (None, Likelihood.GAUSSIAN):
        return None
    largest = float(gradient.abs().amax()) * _divisor(micro) if gradient.numel() else 0.0
    if not 1 + TOLERANCE < largest < math.inf:
        return None
    return False, (
        f"the loss's gradient reaches {largest:.4g} in an output, where that of a {likelihood} term is at most 1. If "
        "the loss is a sum, divide it by its number of terms; if it is weighted on purpose, K-FAC's G carries the "
        "square of that weight"
    )


def _left_out(gradient: Tensor, micro: MicroBatch) -> tuple[bool, str] | None:
    """Say so if the loss reads fewer of the outputs' rows than it is taken to have terms."""
    terms = float(micro.terms)
    leading = (gradient.shape[0], gradient.shape[:-1].numel())
    rows = next((number for number in leading if number == terms), 0)
    if not rows:
        return None
    read = int(gradient.reshape(rows, -1).any(dim=1).sum())
    if not read or read >= rows * (1 - TOLERANCE):
        return None
    return False, (
        f"the loss's gradient is zero in {rows - read} of the model's {rows} {micro.loss_terms}s. If the loss leaves "
        "them out, call kfac.micro_batch(terms=..., divisor=...) before each forward pass with the number of those "
        "that it keeps"
    )


def time_dim(gradient: Tensor) -> int | None:
    """Return which of the first two dimensions of an output can't be the samples', by the loss's gradient there.

    The loss takes a mean over it, so that its gradient is the same all along it; or reads one position of it. None:
    neither or both.
    """
    rest = gradient.flatten(2) if gradient.ndim > 2 else gradient[..., None]
    largest = rest.abs().amax()
    found = []
    for dim in (0, 1):
        same = (rest - rest.mean(dim, keepdim=True)).abs().amax() <= _SAME * largest
        single = rest.ne(0).any(2).any(1 - dim).sum() == 1
        found.append(gradient.shape[dim] > 1 and bool(same | single))
    return found.index(True) if sum(found) == 1 else None


def _divisor(micro: MicroBatch) -> float:
    """Return K-FAC's factor of output gradients."""
    divisor = micro.terms if micro.divisor is None else micro.divisor
    return float(divisor) * unscaling(micro)


def unscaling(micro: MicroBatch) -> float:
    """Return the inverse of the loss scale in a micro-batch's gradients; waits for the device."""
    return 1.0 if micro.inverse_scale is None else float(micro.inverse_scale)


def _terms(outputs: Tensor, micro: MicroBatch, ranks: int, scaled: bool) -> Terms:
    samples, positions = _sizes(outputs, micro)
    return Terms(samples, positions, ranks, micro.loss_terms, scaled)


def _sizes(outputs: Tensor, micro: MicroBatch) -> tuple[int, int]:
    """Return B and T: rows of logits beyond the number of samples are positions."""
    rows = outputs.shape[:-1].numel() if outputs.ndim > 1 else outputs.shape[0]
    samples = micro.batch_size or outputs.shape[0]
    return samples, max(rows // max(samples, 1), 1)
