"""The loss of one step's batch as a function of the parameters, and exact products with its curvature.

    h(θ) = (1/n) Σ ℓ(f_θ(x), y)          GGN = (1/n) Σ Jᵀ H J = the Fisher matrix of the models that K-FAC knows

    vᵀ GGN w     J v, J w forward (JVP), H by differentiating the loss at the outputs           one number a pair
    GGN v        J v forward, H (J v), then back by Jᵀ (VJP)                                    one all-reduce

with J the Jacobian of the outputs and H the Hessian of the loss there, independent of K-FAC's likelihood: any loss that
is convex in the outputs will do, and ignored positions contribute nothing.
Sums run over this rank's micro-batches and then over the ranks; n are the terms of the whole step. That is the mean
over the global batch however unevenly the ranks share it.

Every pass sees the function that the gradient saw: the same inputs, the same random numbers (dropout), and BatchNorm
in the same mode. Writes of a pass into buffers, such as running statistics, go into copies that are discarded.
A pass that fails on one rank fails on all (`summation`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.errors import ModelError
from kfac_dist.inputs import Inputs, arguments, each
from kfac_dist.optimizers.second_order.vectors import VectorSpace
from kfac_dist.optimizers.summation import summed

LABEL = "curvature products"
LABEL_LOSS = "trial losses"

Total = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RecordedPass:
    """One micro-batch's forward pass, as far as it takes to repeat it.

    Attributes:
        inputs: The model's inputs.
        targets: The loss's targets.
        random: State of the random generators before it: the CPU's, and the device's if it has one of its own.
        first_sample: Index of the first sample in the step's global batch.
    """

    inputs: Inputs
    targets: Tensor
    random: tuple[Tensor, ...]
    first_sample: int = 0

    @classmethod
    def record(cls, inputs: Inputs, targets: Tensor, first_sample: int = 0) -> RecordedPass:
        """Record the pass that comes next."""
        states = [torch.get_rng_state()]
        if targets.is_cuda:
            states.append(torch.cuda.get_rng_state(targets.device))
        return cls(inputs, targets, tuple(states), first_sample)

    def every(self, stride: int, phase: int) -> RecordedPass:
        """Return the same pass over those samples alone whose global index is `phase` modulo `stride`."""
        first = (phase - self.first_sample) % stride
        return replace(self, inputs=each(lambda x: x[first::stride], self.inputs), targets=self.targets[first::stride])

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Return a context that draws the pass's random numbers again, and leaves the generators as they were."""
        devices = [self.targets.device] if self.targets.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.random[0])
            if devices:
                torch.cuda.set_rng_state(self.random[1], self.targets.device)
            yield


@dataclass(frozen=True)
class Product:
    """A product with the curvature, the same on every rank.

    Attributes:
        vector: `GGN v`.
        form: `vᵀ GGN v`.
        means: The numbers that the ranks have shared, each the mean over them.
    """

    vector: Tensor
    form: float
    means: tuple[float, ...]


class BatchLoss:
    """The loss of one step's batch around the current parameters, which must not move while this is in use.

    Args:
        module: The bare model.
        space: Its trained parameters.
        passes: This rank's micro-batches of the step.
        total: The loss: outputs and targets to the *sum* of the terms.
        terms: n, of all ranks and micro-batches together.
        communicator: The ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        space: VectorSpace,
        passes: Sequence[RecordedPass],
        total: Total,
        terms: float | Tensor,
        communicator: Communicator,
    ) -> None:
        self.space = space
        self._module = module
        self._passes = passes
        self._total = total
        self._terms = terms
        self._communicator = communicator
        # One graph is kept for all products; those of several micro-batches would hold all of their activations.
        self._kept: _Graph | None = None

    def thinned(self, stride: int, phase: int) -> BatchLoss:
        """Return the loss on every `stride`-th sample of the global batch, one in each `stride` from `phase` on.

        For losses with one term a sample, and models that see each sample by itself; of any number of samples at least
        one is taken.
        """
        samples = int(self._terms)
        phase %= min(stride, samples)
        parts = [part for one in self._passes if len((part := one.every(stride, phase)).targets)]
        kept = -(-(samples - phase) // stride)
        return BatchLoss(self._module, self.space, parts, self._total, kept, self._communicator)

    @torch.no_grad()
    def product(self, vector: Tensor, shared: Sequence[Tensor] = ()) -> Product:
        """Return the product of the curvature with a vector; one all-reduce, and waits for the device.

        Args:
            vector: v, the same on every rank.
            shared: 0-dim tensors that every rank has computed for itself from equal vectors, such as inner products.
                They are summed with the product, so that every rank decides alike.

        Raises:
            KFACError: A pass failed on a rank; a `ModelError` if an operation has no forward-mode derivative.
        """
        own = torch.zeros(self.space.size + 2 + len(shared), dtype=vector.dtype, device=vector.device)
        with summed(own, self._communicator, label=LABEL):
            for one in self._passes:
                tangent = self._tangent(one, vector)
                graph = self._graph(one)
                curved = graph.hessian(tangent)
                own[: self.space.size] += graph.pull_back(self.space, curved)
                own[self.space.size] += torch.sum(tangent * curved)
            own /= self._terms
            for place, value in enumerate(shared, self.space.size + 1):
                own[place] = value / self._communicator.size
        form, *means, _ = own[self.space.size :].tolist()
        return Product(own[: self.space.size], form, tuple(means))

    @torch.no_grad()
    def forms(self, vectors: Sequence[Tensor]) -> Tensor:
        """Return `[k, k]`: `v_iᵀ GGN v_j`, by forward passes alone; one all-reduce of k² numbers and a mark.

        Raises:
            KFACError: A pass failed on a rank; a `ModelError` if an operation has no forward-mode derivative.
        """
        k = len(vectors)
        own = torch.zeros(k**2 + 1, dtype=vectors[0].dtype, device=vectors[0].device)
        forms = own[:-1].view(k, k)
        with summed(own, self._communicator, label=LABEL):
            for one in self._passes:
                tangents = [self._tangent(one, vector) for vector in vectors]
                graph = self._graph(one)
                curved = [graph.hessian(tangent) for tangent in tangents]
                forms += torch.stack([torch.stack([torch.sum(t * c) for c in curved]) for t in tangents])
            forms /= self._terms
        return (forms + forms.T) / 2

    @torch.no_grad()
    def value(self, offset: Tensor | None = None) -> Tensor:
        """Return `h(θ + offset)`, a 0-dim tensor, without weight decay; one all-reduce of a number and a mark.

        Raises:
            KFACError: A pass failed on a rank.
        """
        moved = {} if offset is None else self.space.views(self.space.point() + offset)
        own = torch.zeros(2, dtype=torch.get_default_dtype(), device=self._passes[0].targets.device)
        with summed(own, self._communicator, label=LABEL_LOSS):
            for one in self._passes:
                with one.repeated():
                    outputs = functional_call(self._module, {**self._buffers(), **moved}, *arguments(one.inputs))
                own[0] += self._total(_precise(outputs), _precise(one.targets))
            own /= self._terms
        return own[0]

    def _tangent(self, one: RecordedPass, vector: Tensor) -> Tensor:
        """Return `J v` at a micro-batch's outputs, by forward-mode differentiation."""
        directions = self.space.views(vector)
        with torch.no_grad(), one.repeated(), _differentiable_forward(self._module), forward_mode.dual_level():
            duals = {
                name: forward_mode.make_dual(p.detach(), directions[name]) for name, p in self.space.parameters.items()
            }
            try:
                outputs = functional_call(self._module, {**self._buffers(), **duals}, *arguments(one.inputs))
            except (NotImplementedError, RuntimeError) as error:
                if "forward" not in str(error).lower():
                    raise
                raise ModelError(
                    "an operation of the model has no forward-mode derivative, which kfac.solver newton and cg need: "
                    f"{next(iter(str(error).splitlines()), '')}; replace the operation, or set kfac.solver to direct"
                ) from error
            primal, tangent = forward_mode.unpack_dual(outputs)
        return _precise(torch.zeros_like(primal) if tangent is None else tangent)

    def _graph(self, one: RecordedPass) -> _Graph:
        """Return a micro-batch's graph from parameters to outputs and loss."""
        if self._kept is not None:
            return self._kept
        with torch.enable_grad(), one.repeated():
            outputs = functional_call(self._module, self._buffers(), *arguments(one.inputs))
        graph = _Graph(outputs, self._total, one.targets)
        if len(self._passes) == 1:
            self._kept = graph
        return graph

    def _buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self._module.named_buffers()}


class _Graph:
    """One micro-batch's outputs with their graph, and the loss's gradient at them with its own."""

    def __init__(self, outputs: Tensor, total: Total, targets: Tensor) -> None:
        self._outputs = outputs
        with torch.enable_grad():
            self._leaf = _precise(outputs.detach()).requires_grad_()
            loss = total(self._leaf, _precise(targets))
            [self._gradient] = torch.autograd.grad(loss, self._leaf, create_graph=True)

    def hessian(self, tangent: Tensor) -> Tensor:
        """Return `H t`, H being the Hessian of the summed loss at the outputs."""
        if not self._gradient.requires_grad:  # a loss that is linear in the outputs
            return torch.zeros_like(tangent)
        [product] = torch.autograd.grad(
            self._gradient, self._leaf, tangent, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return product

    def pull_back(self, space: VectorSpace, vector: Tensor) -> Tensor:
        """Return `Jᵀ u`."""
        names, parameters = list(space.parameters), list(space.parameters.values())
        gradients = torch.autograd.grad(
            self._outputs, parameters, vector.to(self._outputs.dtype), retain_graph=True, allow_unused=True
        )
        return space.flatten({name: g for name, g in zip(names, gradients, strict=True) if g is not None})


@contextmanager
def _differentiable_forward(module: nn.Module) -> Iterator[None]:
    """Return a context without the fused kernels of attention and recurrent layers: they have no forward derivative."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(layer, nn.RNNBase) for layer in module.modules()):
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # of no use on this machine
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _precise(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
