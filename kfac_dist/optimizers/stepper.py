"""Steps computed from the quadratic model of the loss on the current batch: the common part of Newton and CG.

    micro_batch(inputs, targets)        before each forward pass of the step: it will be repeated for products
    backward                            the loop's; gradients are averaged
    propose()                           statistics, refresh, then `find` the step δ; the gradients become −δ
    descend by 1 × gradient             so that all that guards first-order steps guards these, too

In a loop of one's own `step` does the last two:

    kfac = KFAC(model, {"solver": "cg"})
    stepper = build_stepper(kfac, lambda outputs, targets: cross_entropy(outputs, targets, reduction="sum"))
    for inputs, targets in batches:
        model.zero_grad()
        stepper.micro_batch(inputs, targets)
        cross_entropy(model(inputs), targets).backward()
        stepper.step()

Such a step waits for the device: whether to go on is decided by numbers. Every number that decides has been reduced
over the ranks before, so that all of them decide alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfac_dist.errors import CheckpointError, ConfigError, ModelError
from kfac_dist.inputs import Inputs
from kfac_dist.optimizers.second_order.batch_loss import BatchLoss, RecordedPass, Total
from kfac_dist.optimizers.second_order.vectors import VectorSpace
from kfac_dist.preconditioner.kfac import KFAC


@dataclass(frozen=True)
class Problem:
    """The model of the loss that a step minimises: `M(δ) = ½ δᵀ(GGN + λI)δ + ∇hᵀδ`, and the loss itself.

    Attributes:
        gradient: ∇h, averaged over the global batch, with `l2·θ` of a weight decay that is part of the loss.
        batch: The loss on the batch and products with its GGN, without weight decay: l2 belongs to λ.
    """

    gradient: Tensor
    batch: BatchLoss


class Stepper(ABC):
    """Finds steps from the quadratic model of the loss.

    Vectors are flat tensors over all trained parameters (`space`), the same on every rank.

    Args:
        kfac: K-FAC on the model.
        total: The loss: outputs and targets to the *sum* of its terms.
        total_steps: Length of the run, for schedules that span it.

    Attributes:
        kfac: Measures, and preconditions.
        space: The space of the parameters.

    Raises:
        ConfigError: The engine shards parameters.
    """

    def __init__(self, kfac: KFAC, total: Total, *, total_steps: int | None = None) -> None:
        if kfac.solver_access.engine.sharded:
            raise ConfigError(
                f"kfac.solver {kfac.solver_access.config.solver} needs every parameter whole on every rank: train "
                "under DDP, or set kfac.solver to direct"
            )
        self.kfac = kfac
        self.space = VectorSpace(kfac.solver_access.engine.module)
        self._total = total
        self._total_steps = total_steps
        self._passes: list[RecordedPass] = []
        self._discarded = kfac.solver_access.discarded

    # ---- called by loops

    def micro_batch(self, inputs: Inputs, targets: Tensor, first_sample: int | None = None) -> None:
        """Record the micro-batch whose forward pass comes next.

        Args:
            inputs: The model's inputs.
            targets: The loss's targets.
            first_sample: Global index of its first sample within the step; by default ranks hold equal consecutive
                parts.
        """
        self._forget_discarded()
        if first_sample is None:
            ranks = self.kfac.communicator
            first_sample = (len(self._passes) * ranks.size + ranks.rank) * len(targets)
        self._passes.append(RecordedPass.record(inputs, targets, first_sample))

    @torch.no_grad()
    def propose(self, terms: float | Tensor | None = None) -> None:
        """Turn the averaged gradients into −δ, in place, for a plain descent by 1 × gradient; collective.

        Gradients that aren't finite stay as they are, and a δ that isn't finite on any rank becomes NaN on all: what
        skips such steps skips these, and they leave no trace in the solver's state.

        Args:
            terms: Terms of the step's loss over all ranks and micro-batches; by default the samples, that is for a
                loss with one term a sample and ranks with equal parts.

        Raises:
            ModelError: `micro_batch` was not called, or the model has an operation that can't be differentiated
                forward.
        """
        self._forget_discarded()
        if not self._passes:
            solver = self.kfac.solver_access.config.solver
            raise ModelError(f"kfac.solver {solver}: call micro_batch(inputs, targets) before forward")
        kfac, access, passes = self.kfac, self.kfac.solver_access, self._passes
        self._passes = []
        finite = bool(access.engine.finite_everywhere(kfac.communicator))
        if terms is None:
            terms = sum(len(one.targets) for one in passes) * kfac.communicator.size
        gradient = self.space.flatten(access.engine.gradients())
        if l2 := access.config.update.l2:
            gradient.add_(self.space.point(), alpha=l2)
        access.update_curvature()
        if finite:
            with kfac.unobserved():
                batch = BatchLoss(access.engine.module, self.space, passes, self._total, terms, kfac.communicator)
                step = self.find(Problem(gradient, batch))
            self._write(step)
        access.advance()

    @torch.no_grad()
    def step(self, terms: float | Tensor | None = None) -> bool:
        """Find the step and take it, for loops without an optimizer; returns whether it was finite and so taken."""
        self.propose(terms)
        gradients = self.kfac.solver_access.engine.gradients()
        if not bool(self.kfac.solver_access.engine.finite_everywhere(self.kfac.communicator)):
            return False
        parameters = self.kfac.solver_access.engine.parameters()
        torch._foreach_sub_([parameters[name] for name in gradients], list(gradients.values()))
        return True

    # ---- implemented by solvers

    @abstractmethod
    def find(self, problem: Problem) -> Tensor:
        """Return the step δ; collective. The solver's state moves on in `took`, if the step is taken."""

    @abstractmethod
    def took(self, step: Tensor) -> None:
        """Take note that the step which `find` returned last is taken."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Return numbers worth logging, the same on every rank."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the solver's state, the same on every rank: nested dictionaries of tensors.

        Keys and shapes are the same from the first step on, so that a checkpoint can be read into them.
        """

    @abstractmethod
    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`."""

    # ---- used by solvers

    def precondition(self, vector: Tensor) -> Tensor:
        """Return K-FAC's damped inverse times a vector, a new one; collective."""
        result = vector.clone()
        self.kfac.solver_access.precondition(self.space.views(result))
        return result

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector by parameter name, for a state."""
        return {name: view.clone() for name, view in self.space.views(vector).items()}

    def unnamed(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return a vector from the result of `named`.

        Raises:
            CheckpointError: It belongs to another model.
        """
        for name, parameter in self.space.parameters.items():
            if name not in values or values[name].shape != parameter.shape:
                raise CheckpointError(f"the solver's state has no {list(parameter.shape)} for {name!r}: another model")
        return self.space.flatten(values)

    def _forget_discarded(self) -> None:
        """Let go of the micro-batches of a step that `KFAC.discard` has ended."""
        if self._discarded != self.kfac.solver_access.discarded:
            self._discarded = self.kfac.solver_access.discarded
            self._passes.clear()

    def _write(self, step: Tensor) -> None:
        """Let −δ be the gradients; NaN if it isn't finite on every rank."""
        bad = (~torch.isfinite(step).all()).float().view(1)
        self.kfac.communicator.all_reduce(bad, label="finite").wait()
        if taken := not bool(bad):
            self.took(step)
        gradients, views = self.kfac.solver_access.engine.gradients(), self.space.views(-step)
        for name, gradient in gradients.items():
            gradient.copy_(views[name]) if taken else gradient.fill_(torch.nan)
