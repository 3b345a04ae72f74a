"""`KFAC`: three lines in any training loop.

    kfac = KFAC(model, config, optimizer=optimizer)
    ...
    loss.backward(); kfac.step(); optimizer.step()

An engine that drives its optimizer itself (DeepSpeed) calls `step` on its own, between reduction and update:

    kfac = KFAC(engine, config)
    ...
    engine.backward(loss); engine.step()

`step` follows the data: close the statistics that backward measured, refresh due inverses, then collect, transform,
scale and deliver the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.config.schema import KFACConfig, StepSolver
from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.curvature.blocks import Coverage
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.engines import Engine, as_engine
from kfac_dist.errors import ConfigError, ModelError
from kfac_dist.preconditioner import state
from kfac_dist.preconditioner.core import Core
from kfac_dist.preconditioner.measure.loss_terms import Description
from kfac_dist.preconditioner.monitor import Monitor
from kfac_dist.preconditioner.parts import Loop, Parts
from kfac_dist.preconditioner.phases import Phase
from kfac_dist.preconditioner.precondition.transforms.trust_region import HasRates
from kfac_dist.preconditioner.solver_access import SolverAccess
from kfac_dist.preconditioner.turns import Turns


class KFAC:
    """Distributed K-FAC for a module, a DDP model, or any `Engine`.

    Collective: every rank constructs it with the same model and configuration.

    Args:
        model: The model as the loop calls it: bare, in DDP, sharded by `fully_shard`, or a DeepSpeed engine.
        config: The options; defaults are K-FAC with Cholesky, empirical Fisher, statistics every 10 and inverses every
            100 steps. A mapping is validated.
        optimizer: The optimizer that takes the step; its current lr enters the KL clip. Needed unless the engine has
            it, `update.kl_clip` is null or `update.kl_clip_lr` is a number.
        grad_scaler: The AMP scaler, if there is one; call `unscale_` before `step`.
        total_steps: Length of the run, for damping schedules that span it.
        check_scale: Whether the first measured step compares the loss's gradient at the model's outputs with that of a
            plain mean. False where another model follows whose outputs the likelihood describes: a generator's.

    Attributes:
        solver_access: The parts of a step one by one, for solvers and loops of their own.
        monitor: Numbers, spectra and times.

    Raises:
        ModelError: No layer of the model gets a block, or its layers lie on several devices.
        ConfigError: An option is wrong, or the placement doesn't fit the number of ranks.
        PlanMismatchError: The ranks were given different models or configurations.
    """

    def __init__(
        self,
        model: nn.Module | Engine,
        config: KFACConfig | Mapping[str, Any] | None = None,
        *,
        optimizer: HasRates | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        total_steps: int | None = None,
        check_scale: bool = True,
    ) -> None:
        asked, self._engine = parse_kfac(config), as_engine(model)
        self._optimizer: HasRates | None = self._engine.optimizer if optimizer is None else optimizer
        scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        self._core = Core(self._engine, asked, Loop(self._optimizer, scaler, total_steps, check_scale))
        self.solver_access = SolverAccess(self._core)
        self.monitor = Monitor(self._core)
        self._turns = Turns(self._engine)
        # An engine that drives its optimizer may be stepped by the user's unchanged loop.
        self._attached = self._engine.before_step(self._step_once)

    @property
    def coverage(self) -> Coverage:
        """The blocks, and why other parameters have none."""
        return self._core.coverage

    @property
    def communicator(self) -> Communicator:
        """The ranks; its `traffic` counts bytes and collectives."""
        return self._core.communicator

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self._core.steps

    # ---- the step

    @torch.no_grad()
    def step(self) -> None:
        """Precondition the gradients in place. Call it after backward (and `unscale_`), before the optimizer's step.

        Before the last micro-batch of a step, as `micro_batch(last=False)` or a DeepSpeed engine tells it, it does
        nothing. With a DeepSpeed engine it needn't be called.

        Raises:
            ModelError: On every rank: it was called again, and no backward has come since; or the optimizer has
                stepped though another micro-batch was announced; or, in the first measured step, the loss shows to be a
                sum where a mean was expected.
            ConfigError: `kfac.solver` finds the step instead.
        """
        core = self._core
        if core.config.solver is not StepSolver.DIRECT:
            raise ConfigError(
                f"kfac.solver is {core.config.solver}, which finds the whole step: call "
                "kfac_dist.optimizers.build_stepper(kfac, loss).step() instead of kfac.step() and optimizer.step()"
            )
        if not self._engine.stepping or self._out_of_turn():
            return
        core.update_curvature()
        parts = core.parts
        preconditioner = parts.preconditioner
        with core.phases(Phase.PRECONDITIONING):
            gradients = preconditioner.collect(self._loss_gradients())
            updates = preconditioner.transform(gradients, core.damping)
            scale = preconditioner.scale(updates)
            preconditioner.deliver(updates, scale)
            preconditioner.complete(gradients)
            parts.damping.adaptation.note(parts.trust_region.kl_scale)
        if self._attached is None:
            self._turns.taken()
        core.advance()

    def unobserved(self) -> AbstractContextManager[None]:
        """Return a context in which passes through the model are not measured, forward or back.

        For passes of other losses: a generator's loss goes back through the discriminator, whose statistics it must not
        enter.
        """
        return self._core.parts.measurement.paused()

    def micro_batch(
        self,
        *,
        first_sample: int | None = None,
        divisor: float | Tensor | None = None,
        terms: float | Tensor | None = None,
        last: bool = True,
        classes: Tensor | None = None,
    ) -> None:
        """Describe the micro-batch whose forward pass comes next; a plain loop over equal batches needn't.

        Args:
            first_sample: Global index of its first sample within the optimizer step; by default ranks hold equal
                consecutive parts. Sampled labels and rows depend on it, nothing else.
            divisor: Number by which the sum of its per-term losses is divided before backward; by default `terms`. With
                K accumulated micro-batches and a loss divided by K: K times that.
            terms: n, the terms of its loss on this rank: samples, or valid tokens for token losses, however many rows a
                layer sees; a tensor stays on the device. By default the first dimension of the model's outputs, or all
                of their positions for token losses. Needed where the loss leaves some of them out, or where no output
                shows it.
            last: Whether the optimizer's step follows its backward. Only then may reductions overlap with backward:
                without this call they start in `step`.
            classes: Labels of its samples `[B]`, or tokens `[B, T]`, with `curvature.class_conditional` and the
                empirical Fisher; any without a class lie outside of [0, C). `mc` and `type2` have labels of their own.
                Labels on the host spare a GPU work.
        """
        self._turns.check_waited()
        self._core.parts.measurement.describe(Description(first_sample, divisor, terms, last, classes))

    def discard(self) -> None:
        """Forget the measurements of this step, for a batch that is not trained on after all.

        Call it instead of `step`, on every rank; then continue with another batch. A solver forgets the batch, too.
        """
        self._core.discard()

    def fisher_backward(self, outputs: Tensor) -> None:
        """Measure G by K-FAC's own backward passes (fisher `mc` and `type2`); does nothing otherwise.

        Call it after the forward pass and before `loss.backward()`.

        Args:
            outputs: The model's outputs, attached to their graph: logits `[B, ..., C]`, or `[B, ...]` for Bernoulli and
                Gaussian likelihoods.
        """
        self._core.parts.measurement.fisher_backward(outputs)

    def metrics(self) -> dict[str, float]:
        """Return numbers worth logging; waits for the device, and for no other rank.

        All but `failed_inversions`, `raised_dampings`, `dropped_statistics`, `bytes_sent` and `asymmetry` are the same
        on every rank: the first four are its own and add up, the last is the largest of its `asymmetries`; left out
        before there is any. `raised_dampings` counts factors that weren't positive definite with their damping, so that
        more of it was added (or, in an eigenbasis, negative eigenvalues were taken for 0); a warning names the first.
        """
        return self.monitor.metrics()

    def remove(self) -> None:
        """Take K-FAC off the model: its hooks and its process groups."""
        if self._attached is not None:
            self._attached.remove()
        self._core.remove()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return everything by unit name, the same on every rank; collective, so call it on all of them.

        Reduces the running averages, which changes them by rounding at most.

        Raises:
            CollectiveError: Another rank doesn't call it. After some seconds a warning says which call waits.
        """
        state.meet(self.communicator, "state_dict")
        return self._core.state()

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take a state that `state_dict` returned, also of another number of ranks or another placement.

        Layers that were left out before it was saved (`coverage.mismatched`) are left out here, too.

        Collective: every rank loads the same state.

        Raises:
            CheckpointError: The state belongs to another model, or to other `max_factor_dim`, on this rank or another;
                or ranks load states of different steps.
            CollectiveError: Another rank doesn't call it. After some seconds a warning says which call waits.
        """
        self._core.load(values)

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return this rank's state, for `torch.distributed.checkpoint`; collective like `state_dict`."""
        state.meet(self.communicator, "sharded_state_dict")
        return state.held(self._core.parts, self.steps)

    def load_sharded_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take a `sharded_state_dict` into which `torch.distributed.checkpoint` has loaded.

        Raises:
            CheckpointError: See `load_state_dict`.
        """
        self.load_state_dict(values)

    # ---- inside

    @property
    def _parts(self) -> Parts:
        return self._core.parts

    def _loss_gradients(self) -> dict[str, Tensor]:
        """Return the gradients, with those of a weight decay that is part of the loss."""
        gradients = self._engine.gradients()
        l2 = self._core.config.update.l2 * self._engine.gradient_scale
        if l2 and gradients:
            parameters = self._engine.parameters()
            torch._foreach_add_(list(gradients.values()), [parameters[name] for name in gradients], alpha=l2)
        return gradients

    def _step_once(self) -> None:
        """Take the step, unless the user's loop has called it already.

        Raises:
            ModelError: The engine's optimizer steps, and the loop has announced another micro-batch.
        """
        if not self._core.ended:
            if self._core.parts.measurement.awaits_more and self._engine.stepping:
                raise ModelError(
                    "the engine steps after kfac.micro_batch(last=False), which says that another micro-batch comes "
                    "first: say last=True before the last micro-batch of a step, or leave it to the engine"
                )
            self.step()
        self._core.ended = False

    def _out_of_turn(self) -> bool:
        """Whether another micro-batch comes first, so that nothing is done; see `turns` for refused calls."""
        if self._attached is not None:
            if self._core.ended:
                raise ModelError(
                    "kfac.step() was called twice before the engine's step: the same gradients would be preconditioned "
                    "twice. Call it once, or leave it to engine.step()"
                )
            return self._core.parts.measurement.awaits_more
        self._turns.check_waited()
        if self._core.parts.measurement.awaits_more or _accumulates(self._optimizer):
            self._turns.passed_over()
            return True
        self._turns.check()
        return False


def _accumulates(optimizer: object) -> bool:
    """Whether an optimizer that Accelerate has prepared takes no step yet, inside of `accumulate`."""
    state = getattr(optimizer, "gradient_state", None)
    return not getattr(state, "sync_gradients", True)
