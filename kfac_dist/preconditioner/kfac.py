"""`KFAC`: three lines in anyone's training loop.

    kfac = KFAC(model, config, optimizer=optimizer)
    ...
    loss.backward(); kfac.step(); optimizer.step()

An engine that drives its optimizer itself (DeepSpeed) calls `step` on its own, between reduction and update:

    kfac = KFAC(engine, config)
    ...
    engine.backward(loss); engine.step()

`step` reads in the order in which data flows: close the statistics that backward measured, refresh what is due, then
collect, precondition, clip and deliver the gradients.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist.config.schema import KFACConfig, OnMismatch, StepSolver, Structure
from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.curvature.block_tridiagonal_units import find_all
from kfac_dist.curvature.blocks import Coverage
from kfac_dist.curvature.capture.arbiter import Arbiter, Mismatch
from kfac_dist.curvature.capture.shared_outputs import Samples
from kfac_dist.curvature.statistics import RunningAverages
from kfac_dist.distributed.communicators.agreement import agree_on_plan, caught, fail_together
from kfac_dist.engines import Engine, as_engine
from kfac_dist.errors import ConfigError, ModelError
from kfac_dist.precision import settled, working
from kfac_dist.preconditioner import state
from kfac_dist.preconditioner.invert.damping import Damping
from kfac_dist.preconditioner.invert.damping_rules import DampingAdaptation
from kfac_dist.preconditioner.invert.inspection import RefreshReading
from kfac_dist.preconditioner.invert.refresh_queue import Pace
from kfac_dist.preconditioner.measure.loss_terms import Description, TermCounter
from kfac_dist.preconditioner.measure.measurement import Measurement
from kfac_dist.preconditioner.parts import assemble, device_of, make_plan
from kfac_dist.preconditioner.phases import Phase, PhaseTimer
from kfac_dist.preconditioner.precondition.trust_region import HasRates, StepLength
from kfac_dist.preconditioner.renewal import (
    FOLLOWS,
    ParameterWatch,
    carry,
    idle_message,
    listed,
    message_of,
    same_blocks,
    without,
)
from kfac_dist.preconditioner.schedule import Cadence
from kfac_dist.preconditioner.turns import Turns


class KFAC:
    """Distributed K-FAC for a module, a DDP model, or any `Engine`.

    Collective: every rank constructs it with the same model and configuration.

    Args:
        model: The model as the loop calls it: bare, in DDP, sharded by `fully_shard`, or a DeepSpeed engine.
        config: What to do; defaults are K-FAC with Cholesky, empirical Fisher, statistics every 10 and inverses every
            100 steps. A mapping is validated.
        optimizer: The optimizer that takes the step; its current lr enters the KL clip. Needed unless the engine has
            it, `update.kl_clip` is null or `update.kl_clip_lr` is a number.
        grad_scaler: The AMP scaler, if there is one; call `unscale_` before `step`.
        total_steps: Length of the run, for damping schedules that span it.
        check_scale: Whether the first measured step compares the loss's gradient at the model's outputs with that of a
            plain mean. False where another model follows whose outputs the likelihood describes: a generator's.

    Attributes:
        coverage: The blocks, and why other parameters have none.
        plan: Who does what.
        communicator: The ranks; its `traffic` counts what was sent.
        steps: Steps taken.
        discarded: Calls of `discard`.
        measured: Steps that were measured.
        names_dropped: Whether a refresh is to warn, once, of layers whose statistics were dropped; off where the loop
            tells of them.
        phases: How long the parts of steps take, once `phases.enabled` is set.

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
        self.config = self._asked = parse_kfac(config)
        self.steps = 0
        self.discarded = 0
        self.measured = 0
        self._scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        self._total_steps = total_steps
        # Step whose own statistics every inverse was solved from, all in one; None if its refreshes were of some.
        self._solved_whole: int | None = None
        self._engine = as_engine(model)
        self._optimizer: HasRates | None = self._engine.optimizer if optimizer is None else optimizer
        self._check_scale = check_scale
        self._counter = TermCounter(self.config.curvature.loss_terms)
        self._check_whole()

        self._mismatched: dict[str, Mismatch] = {}
        self._named_idle: set[str] = set()
        self.names_dropped = True
        self.coverage = self._find()
        self._blocks = self.coverage.blocks
        self._settle()
        distribution = self.config.distribution
        self.communicator = self._engine.communicator(distribution.timeout_seconds, distribution.backend)
        # Compared before anything can fail on one rank alone: with other layers, or with none.
        agree_on_plan(self.communicator, [(block.name, block.describe()) for block in self._blocks])
        self._device = device_of(self.coverage)
        self.phases = PhaseTimer(self._device)
        self.plan = make_plan(self._engine, self._blocks, self.config, self.communicator, self._device)
        self._parameters = ParameterWatch(self._engine, self.communicator)
        self._build(Arbiter(self._blocks))
        self._pace = Pace(Cadence.of(self.config), self.plan)
        self._begin()
        self._turns = Turns(self._engine)
        # An engine that drives its optimizer may be stepped by the user's unchanged loop.
        self._done = False
        self._attached = self._engine.before_step(self._step_once)

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
        if self.config.solver is not StepSolver.DIRECT:
            raise ConfigError(
                f"kfac.solver is {self.config.solver}, which finds the whole step: call "
                "kfac_dist.optimizers.build_stepper(kfac, loss).step() instead of kfac.step() and optimizer.step()"
            )
        if not self._engine.stepping or self._out_of_turn():
            return
        self.update_curvature()
        with self.phases(Phase.PRECONDITIONING):
            self._add_weight_decay()
            self._precondition(self._engine.gradients(), self._length)
        if self._attached is None:
            self._turns.taken()
        self.advance()

    @torch.no_grad()
    def update_curvature(self) -> None:
        """Close the statistics that backward measured and refresh what is due: the first part of `step`.

        For solvers that take the step themselves: then come any number of calls of `precondition`, and `advance`.
        """
        if self._measurement.active:
            self._measure_and_refresh()
        with self.phases(Phase.SHARING):
            self._refresh.activate(self.steps)

    @torch.no_grad()
    def precondition(self, vectors: dict[str, Tensor]) -> None:
        """Multiply a vector by the current damped inverse, in place; collective, and linear in the vector.

        Nothing of K-FAC's state changes: no clip, no weight decay, no statistics.

        Args:
            vectors: By parameter name, each in the shape in which the engine holds the parameter's gradient. Parameters
                without a block keep their values (with `uncovered: diagonal` they are divided by its damped Fisher).
        """
        with self.phases(Phase.PRECONDITIONING):
            self._precondition(vectors, None)

    def advance(self) -> None:
        """End the step: the last part of `step`, for solvers that take the step themselves."""
        self.steps += 1
        self._done = True
        self._begin()

    def unobserved(self) -> AbstractContextManager[None]:
        """Return a context in which passes through the model are not measured, forward or back.

        For those that aren't of its own loss: a generator's goes back through the discriminator, whose statistics it
        must not enter.
        """
        return self._measurement.paused()

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
        self._measurement.describe(Description(first_sample, divisor, terms, last, classes))

    def discard(self) -> None:
        """Forget what this step has measured, such as a batch that will not be trained on after all.

        Call it instead of `step`, on every rank; then go on with another batch. What a solver has been told of the
        batch is forgotten, too.
        """
        self.discarded += 1
        if self._measurement.active:
            self._measurement.discard()
            self._pace.skip()
            self._begin()

    def fisher_backward(self, outputs: Tensor) -> None:
        """Measure G by K-FAC's own backward passes (fisher `mc` and `type2`); does nothing otherwise.

        Call it after the forward pass and before `loss.backward()`.

        Args:
            outputs: The model's outputs, attached to their graph: logits `[B, ..., C]`, or `[B, ...]` for Bernoulli and
                Gaussian likelihoods.
        """
        self._measurement.fisher_backward(outputs)

    @property
    def damping(self) -> float:
        """λ of the current step, without the weight decay that is part of the loss."""
        return self._damping.at(self.steps)

    @property
    def damping_factor(self) -> float:
        """What `multiply_damping` has set."""
        return self._damping.factor

    def set_damping(self, value: float | None) -> None:
        """Damp by this from now on, in place of what is configured; `multiply_damping` still multiplies it.

        Inverses take it up when they are refreshed next. It is part of `state_dict`: a resumed run goes on with it.

        Args:
            value: λ, without the weight decay that is part of the loss. The same on every rank. None goes back to what
                is configured.

        Raises:
            ConfigError: It is no positive number.
        """
        self._damping.set(value)

    @property
    def can_refresh_again(self) -> bool:
        """Whether this step has refreshed every inverse from its own statistics; a step that is skipped hasn't."""
        return self._solved_whole == self.steps

    @torch.no_grad()
    def refresh_again(self) -> None:
        """Solve all inverses anew from the same statistics with the present damping, for use at once; collective.

        Between `update_curvature` and `advance` of a step at which every inverse is due.

        Raises:
            ConfigError: On every rank, before anything is sent: this step has not refreshed every inverse. The others'
                sums and weights are of other steps, and don't belong together.
        """
        if not self.can_refresh_again:
            raise ConfigError(
                f"kfac.refresh_again() at step {self.steps}, which has not refreshed every inverse from its own "
                "statistics: call it between kfac.update_curvature() and kfac.advance() of a step that refreshes all, "
                "with kfac.curvature.stagger and kfac.inversion.stagger 1 at a multiple of "
                f"kfac.inversion.inverse_every ({self.config.inversion.inverse_every})"
            )
        with self.phases(Phase.INVERSION):
            self._refresh.start(self._pace.every_slot, self._reduction.totals, self._total_damping, self.steps)
        with self.phases(Phase.SHARING):
            self._refresh.activate(self.steps)

    def inverses(self) -> dict[str, Tensor]:
        """Return copies of what this rank preconditions with, by unit."""
        return {unit.name: group.payload(unit).clone() for group in self._groups for unit in group.units}

    def use_inverses(self, values: Mapping[str, Tensor]) -> None:
        """Precondition with what `inverses` returned on this rank."""
        for group in self._groups:
            for unit in group.units:
                group.load(unit, values[unit.name])

    def multiply_damping(self, factor: float, *, refresh: bool = False) -> None:
        """Multiply the configured damping from now on, such as after steps that had to be skipped.

        It is part of `state_dict`, and so are refreshes that are still owed: a resumed run goes on with them.

        Args:
            factor: Of the configured damping; 1 at first. The same on every rank.
            refresh: Whether every inverse is refreshed at the next step that measures, rather than when it is due.

        Raises:
            ConfigError: The factor is no positive number.
        """
        self._damping.multiply(factor)
        if refresh:
            self._pace.owe_everything()
            self._begin()

    def metrics(self) -> dict[str, float]:
        """Return numbers worth logging; waits for the device, and for no other rank.

        All but `failed_inversions`, `raised_dampings`, `dropped_statistics`, `bytes_sent` and `asymmetry` are the same
        on every rank: the first four are its own and add up, the last is the largest of its `asymmetries`; left out
        before there is any. `raised_dampings` counts factors that weren't positive definite with their damping, so that
        more of it was added (or, in an eigenbasis, negative eigenvalues were taken for 0); a warning names the first.
        """
        traffic = self.communicator.traffic
        asymmetries = self.asymmetries()
        return {
            "damping": self.damping,
            "kl_scale": float(self._length.kl_scale),
            "predicted_kl": float(self._length.predicted_kl),
            "refreshes": self._refresh.refreshes,
            "failed_inversions": self._refresh.failures,
            "raised_dampings": self._refresh.raised,
            "dropped_statistics": int(self.dropped),
            "collectives": traffic.total_calls,
            "bytes_sent": traffic.total_bytes,
            **({"asymmetry": max(asymmetries.values())} if asymmetries else {}),
        }

    @property
    def dropped(self) -> Tensor:
        """How often this rank has dropped statistics of a taken step, because they weren't finite; on the device.

        The step's other ranks keep theirs, and averages stay right; they grow old if it goes on.
        """
        return sum(
            (averages.dropped for averages in self._measured_averages()),
            torch.zeros((), dtype=torch.int64, device=self._device),
        )

    def not_finite(self) -> list[str]:
        """Return the blocks whose statistics this rank has found not to be finite, in taken steps; waits for it."""
        return list(
            dict.fromkeys(
                unit.block
                for averages in self._measured_averages()
                for unit, times in zip(averages.layout.units, averages.not_finite.tolist(), strict=True)
                if times
            )
        )

    def inspect(self, outside: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Read spectrum, condition and damping of every factor at its next refresh, by the rank that inverts it.

        That costs an eigenvalue decomposition beside the inversion, and changes nothing else.

        Args:
            outside: Makes a context for the reading, such as one that stops a clock.
        """
        self._refresh.inspector.ask(self.plan.owned(self.communicator.rank), outside)

    def inspection(self) -> list[RefreshReading]:
        """Return what all ranks have read since the last call, by step and rank; collective."""
        ranks = self.communicator.gather_objects(self._refresh.inspector.take(), label="inspection")
        return sorted((reading for own in ranks for reading in own), key=lambda reading: (reading.step, reading.rank))

    def asymmetries(self) -> dict[tuple[str, str], float]:
        """Return `max|M − Mᵀ| / max|M|` of what this rank last inverted; waits for the device.

        Measured on running averages before half of each is mirrored or left unread, and on inverses before they are
        made symmetric. Keys are a unit's name and `factor` or `inverse`. What can't be asymmetric isn't listed:
        eigenbases, diagonals, and factors that came as packed triangles, which are mirrored before anyone measures.
        """
        return {
            (unit.name, kind): value
            for kind, values in zip(("factor", "inverse"), self._refresh.asymmetries.tolist(), strict=True)
            for unit, value in zip(self.plan.units, values, strict=True)
            if value >= 0
        }

    def remove(self) -> None:
        """Take K-FAC off the model: its hooks and its process groups."""
        if self._attached is not None:
            self._attached.remove()
        self._measurement.remove()
        self._refresh.close()
        self.communicator.close()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return everything by unit name, the same on every rank; collective, so call it on all of them.

        Reduces the running averages, which changes them by rounding at most.

        Raises:
            CollectiveError: Another rank doesn't call it. After some seconds a warning says which call waits.
        """
        state.meet(self.communicator, "state_dict")
        return state.gather(self._parts())

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take a state that `state_dict` returned, also of another number of ranks or another placement.

        Layers that were left out before it was saved (`coverage.mismatched`) are left out here, too.

        Collective: every rank loads the same state.

        Raises:
            CheckpointError: The state belongs to another model, or to other `max_factor_dim`, on this rank or another;
                or ranks load states of different steps.
            CollectiveError: Another rank doesn't call it. After some seconds a warning says which call waits.
        """
        reasons = state.mismatched(values)
        state.agree_to_load(self._parts(), values, self._lost_with(reasons))
        self.leave_out(reasons)
        self._load(values)
        self._begin()

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Go on without some blocks, as if they had been found not to make their gradients; collective.

        Args:
            reasons: What to say of each in `coverage.uncovered`, by the block's name. Other names are passed over.
        """
        found = self._as_mismatches(reasons)
        if found:
            self._mismatched |= {mismatch.block: mismatch for mismatch in found}
            self._renew(without(self.coverage, found), judged=self._measurement.judged)
            self._begin()

    def _as_mismatches(self, reasons: Mapping[str, str]) -> list[Mismatch]:
        known = {block.name for block in self._blocks}
        return [Mismatch(name, math.inf, math.nan, why) for name, why in reasons.items() if name in known]

    def _lost_with(self, reasons: Mapping[str, str]) -> set[str]:
        """Return the blocks that go with those that are left out."""
        kept = without(self.coverage, self._as_mismatches(reasons)).blocks
        return {block.name for block in self._blocks} - {block.name for block in kept}

    def _load(self, values: Mapping[str, Any]) -> None:
        self.steps = state.load(self._parts(), values)
        self._solved_whole = None
        self._pace.overdue = state.marked(self._parts(), values, "overdue")
        self._pace.refreshed = state.marked(self._parts(), values, "refreshed")
        self._measurement.load_samples(state.samples(self._parts(), values))
        self._averages.discard()
        if self._moments is not None:
            self._moments.averages.discard()

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return what this rank holds, for `torch.distributed.checkpoint`; collective like `state_dict`."""
        state.meet(self.communicator, "sharded_state_dict")
        return state.held(self._parts())

    def load_sharded_state_dict(self, values: Mapping[str, Any]) -> None:
        """Take a `sharded_state_dict` into which `torch.distributed.checkpoint` has loaded.

        Raises:
            CheckpointError: See `load_state_dict`.
        """
        self.load_state_dict(values)

    def local_statistics(self) -> dict[str, Tensor]:
        """Return the statistics as this rank alone has them, before a `state_dict` adds the ranks' up.

        That changes them by a rounding. A run that is to go on as if it had never been saved, on as many ranks and
        with the same configuration, loads these on top of its state.
        """
        return self._reduction.local()

    def load_local_statistics(self, values: Mapping[str, Tensor]) -> None:
        """Take this rank's own `local_statistics`, after a state of the same moment."""
        self._reduction.restore_local(values)

    def _parts(self) -> state.Parts:
        return state.Parts(
            plan=self.plan,
            averages=self._averages,
            reduction=self._reduction,
            refresh=self._refresh,
            moments=self._moments,
            communicator=self.communicator,
            lagged=self._pace.cadence.lag > 0,
            rest=self._rest,
            damping=self._damping,
            step=self.steps,
            overdue=self._pace.overdue,
            refreshed=self._pace.refreshed,
            samples=self._measurement.samples(),
            mismatched=self.coverage.mismatched,
        )

    # ---- what step is made of

    def _begin(self) -> None:
        """Prepare the hooks for the step that comes next."""
        pace, cadence = self._pace, self._pace.cadence
        pace.begin(self.steps)
        self._measurement.begin(self.steps, factors=bool(pace.measured), moments=cadence.rescales(self.steps))
        curvature = self.config.curvature
        if curvature.decay_ramp and self._moments is not None:
            self._moments.averages.decay = cadence.moments_decay(self.steps, curvature.decay)
        if pace.measured:
            if curvature.decay_ramp:
                self._averages.decay = cadence.decay(self.steps, curvature.decay)
            self._reduction.begin(pace.slots, pace.measured)

    def _measure_and_refresh(self) -> None:
        """Close this step's statistics and, where slots are due, refresh their inverses."""
        with self.phases(Phase.REDUCTION):
            finite = self._engine.finite_everywhere(self.communicator)
            taken = self._measurement.finish(finite, refreshes=bool(self._pace.slots))
        self.measured += 1
        if self._pace.cadence.begins_round(self.steps):
            self._rest.measure(self._measurement.terms, taken)
        self._follow_model()
        slots, totals = self._pace.slots, self._reduction.totals
        if not slots:
            return
        if not bool(taken):  # the step will be skipped
            self._pace.skip()
            return
        lag = self._pace.take(self.steps, self._refresh.unmeasured(slots, totals) if self._pace.first else ())
        self._damping.adaptation.judge()
        with self.phases(Phase.INVERSION):
            self._refresh.start(slots, totals, self._total_damping, self.steps, lag)
        self._solved_whole = self.steps if slots == self._pace.every_slot else None
        self._refresh.inspector.read(self.steps)
        self._name_idle()
        self._name_dropped()

    def _follow_model(self) -> None:
        """Cover the model anew where it has changed, or where the arbiter has found a block wrong; collective."""
        mismatches = self._measurement.mismatches
        changed = self._parameters.changed(agree=bool(self._pace.slots), device=self._device)
        if mismatches and (self.config.curvature.on_mismatch is OnMismatch.ERROR or self._is_chain):
            raise ModelError(message_of(mismatches))
        if changed:
            said = self._parameters.message()
            with caught(lambda error: ModelError(f"{said}; that failed: {error}")) as failed:
                changed = self._engine.take_parameters()
            fail_together(self.communicator, failed)
            self._parameters.take()
            warnings.warn(f"{said}: {FOLLOWS[changed]}", stacklevel=4)
        if mismatches:
            warnings.warn(message_of(mismatches), stacklevel=4)
            self._mismatched |= {mismatch.block: mismatch for mismatch in mismatches}
        if changed:
            fresh = self._find()
            same = same_blocks(fresh.blocks, self._blocks)
            self._mismatched = {name: found for name, found in self._mismatched.items() if name in same or mismatches}
            self._renew(without(fresh, self._mismatched.values()), judged=set())
        elif mismatches:
            self._renew(without(self.coverage, mismatches), judged=self._measurement.judged)

    def _renew(self, coverage: Coverage, *, judged: set[str]) -> None:
        """Plan and build for other blocks; the state of units that remain goes on by name; collective."""
        before = state.gather(self._parts())
        checks_scale = self._measurement.checks_scale
        self._measurement.remove()
        self._refresh.close()
        self.coverage, self._blocks = coverage, coverage.blocks
        self._settle()
        agree_on_plan(self.communicator, [(block.name, block.describe()) for block in self._blocks])
        self.plan = make_plan(self._engine, self._blocks, self.config, self.communicator, self._device)
        self._check_scale = checks_scale
        self._build(Arbiter(self._blocks, judged))
        self._pace = Pace(self._pace.cadence, self.plan)
        self._load(carry(before, state.gather(self._parts())))
        self._pace.begin(self.steps)

    def _name_dropped(self) -> None:
        """Name, once, the layers whose statistics this rank has dropped; at a refresh, which waits anyway."""
        if not self.names_dropped or not bool(self.dropped):
            return
        self.names_dropped = False
        warnings.warn(
            f"statistics of {listed(self.not_finite())} were not finite on this rank, and were dropped together with "
            "those that travel with them: squares exceed float32. Scale what these layers are given, or leave them out "
            "by kfac.curvature.exclude",
            stacklevel=4,
        )

    def _name_idle(self) -> None:
        """Name, once, the blocks whose refresh is due and that no backward pass has come to, on any rank."""
        # Named already, or measured from the next step on.
        shared = {name for name, how in self._measurement.samples().items() if how not in (0, Samples.OWN)}
        found = self._refresh.never_measured(self._pace.slots, self._reduction.totals)
        idle = [name for name in found if name not in shared]
        others = [name for name in self.coverage.idle if self.plan.blocks[name].slot not in self._pace.slots]
        self.coverage = replace(self.coverage, idle=(*others, *idle))
        names = [name for name in idle if name not in self._named_idle]
        self._named_idle |= set(names)
        if names:
            warnings.warn(idle_message(names), stacklevel=4)

    def _find(self) -> Coverage:
        with self._engine.whole_shapes():
            return find_all(self._engine.module, self.config)

    @property
    def _is_chain(self) -> bool:
        return self.config.inversion.structure is Structure.BLOCK_TRIDIAGONAL

    def _measured_averages(self) -> list[RunningAverages]:
        return [self._averages, *([] if self._moments is None else [self._moments.averages])]

    def _step_once(self) -> None:
        """Take the step, unless the user's loop has called it already.

        Raises:
            ModelError: The engine's optimizer steps, and the loop has announced another micro-batch.
        """
        if not self._done:
            if self._measurement.awaits_more and self._engine.stepping:
                raise ModelError(
                    "the engine steps after kfac.micro_batch(last=False), which says that another micro-batch comes "
                    "first: say last=True before the last micro-batch of a step, or leave it to the engine"
                )
            self.step()
        self._done = False

    def _out_of_turn(self) -> bool:
        """Whether another micro-batch comes first, so that nothing is done; see `turns` for what is refused."""
        if self._attached is not None:
            if self._done:
                raise ModelError(
                    "kfac.step() was called twice before the engine's step: the same gradients would be preconditioned "
                    "twice. Call it once, or leave it to engine.step()"
                )
            return self._measurement.awaits_more
        self._turns.check_waited()
        if self._measurement.awaits_more or _accumulates(self._optimizer):
            self._turns.passed_over()
            return True
        self._turns.check()
        return False

    def _precondition(self, gradients: dict[str, Tensor], length: StepLength | None) -> None:
        """Collect, precondition, lengthen or shorten, and deliver gradients, in place."""
        if self._offload is not None:
            self._offload.begin()
        self._transport.collect(gradients)
        self._rest.collect(gradients)
        for groups in self._transport.arriving():
            present = groups if self._offload is None else self._offload.streamed(groups)
            updates = [group.apply(self._total_damping) for group in present]
            if length is not None:
                length.shape(groups, updates)
            self._transport.send(groups, updates)
        rest = self._rest.apply(self._total_damping)
        scale = None if length is None else length.scale(rest)
        self._transport.deliver(gradients, scale)
        self._rest.deliver(gradients, rest, scale)
        if length is not None:
            length.replace_plain(gradients)
            self._damping.adaptation.note(length.kl_scale)

    def _add_weight_decay(self) -> None:
        l2 = self.config.update.l2 * self._engine.gradient_scale
        if not l2:
            return
        gradients, parameters = self._engine.gradients(), self._engine.parameters()
        if gradients:
            torch._foreach_add_(list(gradients.values()), [parameters[name] for name in gradients], alpha=l2)

    @property
    def engine(self) -> Engine:
        """The model, and where its gradients are."""
        return self._engine

    @property
    def _total_damping(self) -> float:
        return self.damping + self.config.update.l2

    # ---- construction

    def _settle(self) -> None:
        """Let every precision that is `auto` follow the covered layers."""
        self.config = settled(self._asked, (p for block in self._blocks for p in block.parameters.values()))

    def _build(self, arbiter: Arbiter) -> None:
        parts = assemble(self._engine, self.coverage, self.config, self.communicator, self.plan, self._device)
        self._averages, self._reduction = parts.averages, parts.reduction
        self._groups, self._row, self._rest = parts.groups, parts.row, parts.rest
        self._refresh, self._moments = parts.refresh, parts.moments
        self._transport, self._offload = parts.transport, parts.offload
        inversion = self.config.inversion
        adaptation = DampingAdaptation(inversion.adapt, self.communicator, self._device, working(self.config))
        self._damping = Damping(inversion.damping, adaptation, self._total_steps, self.config.update.l2)
        self._length = StepLength(
            self.config.update,
            self._engine,
            self._optimizer,
            self._row,
            self._rest,
            [name for name in self.coverage.uncovered if name not in self._rest.names],
            self._device,
            working(self.config),
        )
        self._measurement = Measurement(
            self._engine,
            self._blocks,
            self._averages,
            self._reduction,
            self._moments,
            self.config.curvature,
            communicator=self.communicator,
            scaler=self._scaler,
            phases=self.phases,
            drawn=self._rest.drawn,
            check_scale=self._check_scale,
            counter=self._counter,
            arbiter=arbiter,
        )

    def _check_whole(self) -> None:
        if self._engine.sharded and self.config.inversion.structure is Structure.BLOCK_TRIDIAGONAL:
            raise ConfigError(
                "kfac.inversion.structure: block_tridiagonal needs every gradient whole on every rank: train under "
                "DDP, or set it to block_diagonal"
            )


def _accumulates(optimizer: object) -> bool:
    """Whether an optimizer that Accelerate has prepared takes no step yet, inside of `accumulate`."""
    state = getattr(optimizer, "gradient_state", None)
    return not getattr(state, "sync_gradients", True)
