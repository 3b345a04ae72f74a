"""The training loop: steps, logging, evaluation and saving.

    batch ─▶ for each micro-batch: forward, backward ─▶ kfac.step ─▶ clip, optimizer.step ─▶ window
    at some steps: log (one reduction, one host sync), evaluate, save; before each: does a scheduler want us to stop?

A step that doesn't log waits for nothing on the host.

The engine places gradients and weights: the loop is the same under DDP, FSDP2 and ZeRO.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kfac_dist.config.schedules import value_at
from kfac_dist.distributed.communicators.agreement import agreed
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.errors import CheckpointError
from kfac_dist.optimizers import set_learning_rate
from kfac_dist.optimizers.variance import RelativeVariance
from kfac_dist.preconditioner.kfac import KFAC
from kfac_dist.training.checkpoints.checkpoint import Checkpoint
from kfac_dist.training.checkpoints.differences import differences, divides_work_alike
from kfac_dist.training.checkpoints.run_state import capture_state, restore_state
from kfac_dist.training.data.batches import Source, StepBatch
from kfac_dist.training.data.sampler import Position
from kfac_dist.training.evaluation import Evaluation, evaluate, share_buffers
from kfac_dist.training.game.passes import GamePasses, Referee
from kfac_dist.training.records.logbook import Logbook
from kfac_dist.training.records.metrics import peak_memory_bytes
from kfac_dist.training.records.outputs import RunOutputs as RunOutputs
from kfac_dist.training.records.variance import relative_variances
from kfac_dist.training.records.window import Stopwatch, Window
from kfac_dist.training.recovery.divergence import DivergedError as DivergedError
from kfac_dist.training.recovery.divergence import Guard, Verdict
from kfac_dist.training.recovery.preemption import Preempted, Preemption
from kfac_dist.training.recovery.skips import Skips
from kfac_dist.training.setup import RunParts
from kfac_dist.training.step import Passes, TermCounts


class Trainer:
    """Runs the steps of one run.

    Args:
        parts: Model, data, loss, optimizers.
        communicator: The ranks.
        outputs: Destinations of logged numbers.

    Attributes:
        step: Optimizer steps done.
        position: Next position in the data.
        stopwatch: Training time.
    """

    def __init__(self, parts: RunParts, communicator: Communicator, outputs: RunOutputs) -> None:
        self.parts = parts
        self.communicator = communicator
        self.outputs = outputs
        self.step = 0
        self.position = Position()
        self.stopwatch = Stopwatch()
        self._device = next(parts.engine.module.parameters()).device
        self._window = Window(self._device, parts.kfacs)
        self._window_began = 0.0
        self._window_positions: list[Position] = []
        self._saved_at = 0
        self._has_begun = False
        self._saved_moment = time.monotonic()
        self._guard = Guard(parts.engine, communicator, self._device)
        self._passes = self._build_passes()
        self._skips = Skips(parts, communicator, self._guard, outputs.progress.note)
        self._logbook = Logbook(parts, outputs, self._standing)
        self._batches = parts.stream.steps(self.position)

    def train(self) -> None:
        """Run the steps that are left.

        Raises:
            DataError: A batch has too few samples for the ranks, the model refuses it, or it holds NaN or infinity.
            ModelError: Under DDP, the loss leaves out parameters on this rank.
            DivergedError: Loss or gradients are not finite, and going back to a checkpoint has not helped.
            CollectiveError: Another rank has failed.
            CheckpointError: A checkpoint can't be written.
            Preempted: A rank received a signal to stop; the state is saved.
        """
        self._has_begun = True
        self.parts.stream.sampler.check(self.communicator.size, self.position)
        self.parts.engine.module.train()
        self._batches = self.parts.stream.steps(self.position)
        requests = (self._is_in_trouble, self._wants_to_save)
        preemption = Preemption(self.outputs.signals, self.communicator, requests=requests)
        self._saved_moment = time.monotonic()
        self.stopwatch.start()
        with self.outputs.watch.explaining(), self._loading(), self.outputs.signals.deferring():
            while self.step < self.parts.total_steps:
                self._at_boundary(preemption)
                self.outputs.watch.set_activity(f"step {self.step + 1}, loading the batch")
                batch = next(self._batches)
                self._window_positions.append(self.position)
                self._take_step(batch)
                self.step += 1
                self.position = batch.after
                self.outputs.watch.set_activity(f"step {self.step}, what follows it")
                self._after_step()
            preemption.finish()
            self._settle_writes()
        self.stopwatch.stop()

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """End the processes that load samples with the run, whatever still refers to it."""
        try:
            yield
        finally:
            self._batches.close()

    def _at_boundary(self, preemption: Preemption) -> None:
        """Do what a rank has wished for."""
        if preemption.due():
            self._preempt()
        trouble, save = preemption.granted
        if trouble:
            self._settle_writes()
        if save and self.step > self._saved_at:
            self._paused(lambda: self._save_on_schedule(unforeseen=True))

    def evaluate(self, source: Source, samples: int | None = None) -> Evaluation:
        """Evaluate on the first `samples` (default: all) samples; collective.

        It evaluates the current model, or the average of the weights if the run keeps one. Of the test data the
        data's own score is taken, too.
        """
        settings, score = self.parts.settings, self.parts.score if source is self.parts.test else None
        batch_size = max(1, settings.batch_size // (settings.accumulate * self.communicator.size))
        samples = len(source) if samples is None else min(samples, len(source))
        average = self.parts.average
        with nullcontext() if average is None else average.in_place():
            if self.parts.game is not None:
                return Referee(self.parts.game, self.communicator).evaluate(source, samples)
            return evaluate(self.parts.engine, self.parts.loss, source, samples, batch_size, self.communicator, score)

    def save(self, *, unforeseen: bool = False, wait: bool = True) -> None:
        """Write a checkpoint; collective.

        Saving adds up what ranks measured for themselves, and begins a new window of the logged loss: a resumed run
        goes on exactly as this one does.

        Args:
            unforeseen: No schedule of steps foresaw this checkpoint. What each rank has for itself is saved too, and
                stays as it is, so that the run goes on, or is resumed, as if nothing had been saved.
            wait: Whether it is complete on return, rather than written while training goes on.
        """
        share_buffers(self.parts.engine.module, self.communicator)
        facts = {
            "epoch": self.position.epoch,
            "offset": self.position.offset,
            "seconds": self.stopwatch.seconds,
            "world_size": self.communicator.size,
            "skips": self._skips.facts(),
            "config": self.outputs.configuration,
        }
        own = self._own_state() if unforeseen else {}
        state = capture_state(self.parts, self.communicator.rank)
        if unforeseen:
            state["own"] = {f"rank{self.communicator.rank}": own}
            facts["window"] = {
                "counts": self._window.counts(),
                "began": self._window_began,
                "positions": [[place.epoch, place.offset, place.step] for place in self._window_positions],
            }
        self.outputs.checkpoints.save(self.step, state, facts, wait=wait)
        self._saved_at, self._saved_moment = self.step, time.monotonic()
        if not unforeseen:
            self._begin_window()
        elif self.parts.kfac is not None:
            self.parts.kfac.solver_access.load_local_statistics(own["kfac"])

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint; collective.

        Raises:
            CheckpointError: It can't be read, or is of another model.
        """
        parts, facts = self.parts, checkpoint.facts
        fresh_kfac = self.outputs.checkpoint.kfac == "fresh" and not self._has_begun
        own = restore_state(
            self.outputs.checkpoints,
            checkpoint,
            parts,
            self.communicator.rank,
            self._own_state() if self._continues_exactly(facts) and not fresh_kfac else {},
            differences(facts.get("config", {}), self.outputs.configuration),
            fresh_kfac=fresh_kfac,
        )
        self.step = self._saved_at = checkpoint.step
        self.position = Position(facts["epoch"], facts["offset"], checkpoint.step)
        self.stopwatch = Stopwatch(facts["seconds"])
        self._skips.restore(facts["skips"])
        self._begin_window()
        if own:
            self._restore_own(own, facts["window"])

    def _build_passes(self) -> Passes | GamePasses:
        parts = self.parts
        if parts.game is None:
            return Passes(parts, self.communicator, self._guard, self._window)
        assert not isinstance(parts.kfac, KFAC)
        return GamePasses(parts.game, parts.kfac, self.communicator, self._guard, self._window)

    def _own_state(self) -> dict[str, dict[str, Tensor]]:
        """Return this rank's own values."""
        kfac = self.parts.kfac
        return {"window": self._window.state()} | (
            {"kfac": kfac.solver_access.local_statistics()} if kfac is not None else {}
        )

    def _restore_own(self, own: dict[str, dict[str, Tensor]], window: dict[str, Any]) -> None:
        if self.parts.kfac is not None:
            self.parts.kfac.solver_access.load_local_statistics(own["kfac"])
        self._window.restore(own["window"], window["counts"])
        self._window_began = window["began"]
        self._window_positions = [Position(*position) for position in window["positions"]]

    def _continues_exactly(self, facts: dict[str, Any]) -> bool:
        """Whether a checkpoint holds ranks' own state, and these ranks divide the work as those did."""
        return (
            "window" in facts
            and facts["window"]["counts"].keys() == self._window.counts().keys()
            and facts["world_size"] == self.communicator.size
            and divides_work_alike(facts.get("config", {}), self.outputs.configuration)
        )

    def backpropagate(self, batch: StepBatch) -> TermCounts:
        """Pass the micro-batches of a step through the model, forward and back; collective.

        Returns:
            The step's loss terms; the averaged gradients are in the engine.
        """
        return self._passes.run(batch, self.step)

    def take(self, steps: int) -> None:
        """Take the next steps and nothing that surrounds them in a run: no log, no evaluation, no checkpoint."""
        batches = self.parts.stream.steps(self.position)
        for _ in range(steps):
            batch = next(batches)
            self._take_step(batch)
            self.step += 1
            self.position = batch.after

    def _take_step(self, batch: StepBatch) -> None:
        self._logbook.ask(self.step)
        stepper = self.parts.stepper
        if stepper is None:
            set_learning_rate(self.parts.optimizer, self._learning_rate(self.step))
        watch, where = self.outputs.watch, f"step {self.step + 1}"
        watch.set_activity(f"{where}, forward and backward")
        counts = self.backpropagate(batch)
        watch.set_activity(f"{where}, K-FAC and the optimizer")
        if stepper is not None:
            stepper.propose(counts.everywhere)
        elif self.parts.kfac is not None:
            self.parts.kfac.step()
        taken = self._guard.taken()
        self.parts.engine.take_step(self.parts.optimizer, self.parts.settings.clip_grad_norm)
        if self.parts.average is not None:
            self.parts.average.update(self.step + 1)
        self._window.add_step(batch.samples, counts.everywhere, taken)

    def _after_step(self) -> None:
        settings, every = self.parts.settings, self.outputs.checkpoint.every
        last = self.step == self.parts.total_steps
        if self.outputs.monitor is not None:
            self.outputs.monitor.stepped()
        if (self.step % settings.log_every == 0 or last) and self._log() is Verdict.GO_BACK:
            self._paused(self._go_back)
            return
        if settings.evaluate_every and self.step % settings.evaluate_every == 0 and not last:
            self._paused(self._log_evaluation)
        if (every and self.step % every == 0) or last:
            self._paused(self._save_on_schedule)

    def _save_on_schedule(self, *, unforeseen: bool = False) -> None:
        """Write a checkpoint beside training, but none to go back to of a run that skips its steps or statistics."""
        last = self.step == self.parts.total_steps
        if not self._guard.row and (last or not self._skips.recovery.dropping):
            self.save(unforeseen=unforeseen, wait=not self.outputs.checkpoint.asynchronous)

    def _preempt(self) -> None:
        """Save unless this step is saved, and stop."""
        self.stopwatch.stop()
        if self.step > self._saved_at:
            self.save(unforeseen=True)
        self._settle_writes()
        raise Preempted(self.step)

    def _is_in_trouble(self) -> bool:
        """Whether this rank alone knows of a failure."""
        writer, lock = self.outputs.writer, self.outputs.lock
        failures = [holder.failure for holder in (writer, lock) if holder is not None]
        return self.outputs.checkpoints.failed or any(failure is not None for failure in failures)

    def _wants_to_save(self) -> bool:
        """Whether rank 0's clock asks for a checkpoint."""
        minutes = self.outputs.checkpoint.every_minutes
        due = minutes > 0 and time.monotonic() - self._saved_moment >= 60 * minutes
        return due and self.communicator.rank == 0

    def _settle_writes(self) -> None:
        """Wait for pending writes, and raise any rank's failure on every rank; collective."""
        with agreed(self.communicator, CheckpointError):
            self.outputs.checkpoints.finish()
            for holder in (self.outputs.writer, self.outputs.lock):
                if holder is not None and holder.failure is not None:
                    raise holder.failure

    def _go_back(self) -> None:
        """Continue from the newest checkpoint, with more damping; collective."""
        checkpoints, failed_at, skips = self.outputs.checkpoints, self.step, self._skips
        self._settle_writes()
        newest = checkpoints.newest() if skips.may_go_back else None
        if newest is None:
            raise DivergedError(skips.reason)
        checkpoints.set_aside(newest.step)
        failed = skips.recovery
        self.restore(newest)
        skips.went_back(failed, self.step)
        self._batches = self.parts.stream.steps(self.position)
        self._logbook.went_back(self.step, f"step {failed_at}: {skips.reason}; back to {newest.path}")

    def _log(self) -> Verdict:
        totals = self._window.close(self.communicator, lambda: self.stopwatch.seconds - self._window_began)
        self._window_began = self.stopwatch.seconds
        positions, self._window_positions = self._window_positions, []
        verdict = self._skips.judge(totals, self.step, positions)
        record = {
            "step": self.step,
            "epoch": self.position.epoch,
            "loss": totals.loss,
            "lr": self._learning_rate(self.step - 1),  # of the step that was taken last
            "samples_per_second": totals.samples_per_second,
            "seconds": self.stopwatch.seconds,
            "memory_bytes": peak_memory_bytes(self._device),
            "skipped": totals.skipped,
        }
        if self.parts.kfac is not None:
            record["kfac/dropped_statistics"] = self._skips.recovery.dropped
        self._logbook.logged(record | self._passes.figures(), totals.skipped)
        return verdict

    def _log_evaluation(self) -> None:
        self._logbook.evaluated(self.step, self.evaluate(self.parts.test), self.relative_variances())

    def relative_variances(self) -> dict[str, RelativeVariance]:
        """Return how noisy each parameter's gradient is, if that is wanted and the optimizer knows it; collective."""
        if not self.outputs.metrics.relative_variance:
            return {}
        return relative_variances(self.parts.engine, self.parts.optimizer, self.communicator)

    def show(self, result: Evaluation) -> None:
        """Write the pictures of an evaluation at the current step, if there are any."""
        self._logbook.show(self.step, result)

    def _paused(self, action: Callable[[], None]) -> None:
        with self._standing():
            action()

    @contextmanager
    def _standing(self) -> Iterator[None]:
        """Stop the run's clock."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # training still under way belongs to training's time
        self.stopwatch.stop()
        yield
        self.stopwatch.start()

    def _begin_window(self) -> None:
        self._window.reset()
        self._window_positions = []
        self._window_began = self.stopwatch.seconds

    def _learning_rate(self, step: int) -> float:
        return value_at(self.parts.learning_rate, step, self.parts.total_steps)
