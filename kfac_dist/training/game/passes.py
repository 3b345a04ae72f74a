"""The passes and the evaluation of a game, in the place of `training.step`'s and `training.evaluation`'s.

    noise ─ generator ─ made ┐
                       real ─┴─ discriminator ─ logits of pairs ─ both losses
    one pass back for each loss ─ average ξ ─ two products ─ average λNᵀξ ─ .grad of both players

Each player's K-FAC measures the pass of its own loss: the generator's goes back through the discriminator, which is
then not measured. Noise is a function of seed and step, of which ranks take their rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_dist.config.schema import GameConfig
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.inputs import Inputs
from kfac_dist.optimizers.symplectic import GameField, game_field
from kfac_dist.tasks.game import TwoPlayers, discriminator_total, game_noise, generator_total
from kfac_dist.tasks.judge import Judge, frechet, score
from kfac_dist.training.data.batches import Source, StepBatch, TermCounts, evaluation_batches
from kfac_dist.training.data.sampler import split
from kfac_dist.training.evaluation import Evaluation, share_buffers
from kfac_dist.training.game.players import PlayersKFAC
from kfac_dist.training.passes import explained
from kfac_dist.training.records.window import Window
from kfac_dist.training.recovery.divergence import Guard

# Steps count from 0: noise of this one is for evaluation, and for pictures.
_SCORED = -1
_CHUNK = 250


@dataclass(frozen=True)
class GameParts:
    """A game's parts beside those of every run.

    Attributes:
        players: The bare models.
        config: The game's section.
        judge: Classifier that rates samples.
        judge_accuracy: Its accuracy on the test data.
        seed: Of the noise.
    """

    players: TwoPlayers
    config: GameConfig
    judge: Judge
    judge_accuracy: float
    seed: int


class GamePasses:
    """Runs the passes of a game's steps.

    Args:
        game: The players.
        kfac: Their K-FACs, if they have any.
        communicator: The ranks.
        guard: Tells all ranks of a loss that isn't finite.
        window: Takes the discriminator's losses.
    """

    def __init__(
        self, game: GameParts, kfac: PlayersKFAC | None, communicator: Communicator, guard: Guard, window: Window
    ) -> None:
        self._game = game
        self._kfac = kfac
        self._communicator = communicator
        self._guard = guard
        self._window = window
        self._last: tuple[Tensor, GameField, float] | None = None

    def run(self, batch: StepBatch, step: int) -> TermCounts:
        """Write the adjusted field of a step's batch into both players' gradients; collective.

        Args:
            batch: This rank's part.
            step: Steps done before.

        Returns:
            The step's loss terms: pairs.
        """
        [micro] = batch.micro_batches
        real = one_tensor(micro.inputs)
        players, config, kfac = self._game.players, self._game.config, self._kfac
        divisor = batch.samples / self._communicator.size
        with explained(f"step {step + 1}", players, micro.inputs, micro.targets):
            noise = self._noise(step, batch.samples, micro.first_sample, real)
            if kfac is not None:
                for member in kfac.members:
                    member.micro_batch(first_sample=micro.first_sample, divisor=divisor)
            logits = players.logits(real, players.generator(noise))
            if kfac is not None:
                self._fisher_backward(kfac, logits)
            totals = generator_total(logits, config.objective), discriminator_total(logits)
            field = game_field(
                tuple(total / divisor * self._guard.poison(total) for total in totals),  # type: ignore[arg-type]
                (list(players.generator.parameters()), list(players.discriminator.parameters())),
                adjustment=config.adjustment,
                align=config.align,
                kfacs=(None, None) if kfac is None else (kfac["generator"], kfac["discriminator"]),
                average=self._average,
            )
        field = _all_or_nothing(field)
        field.deliver()
        self._window.add_loss(totals[1])
        self._last = (totals[0].detach(), field, batch.samples)
        return TermCounts([None], batch.samples)

    def figures(self) -> dict[str, float]:
        """Return numbers of the last step worth logging; collective, and waits for the device."""
        if self._last is None:
            return {}
        total, field, samples = self._last
        total = total.double().view(1)
        self._communicator.all_reduce(total, label="loss").wait()
        found = {"game/generator_loss": total.item() / samples, "game/field_norm": field.field.norm().item()}
        if field.adjustment is not None:
            found["game/adjustment_norm"] = field.adjustment.norm().item()
        return found

    def _noise(self, step: int, samples: int, first: int, real: Tensor) -> Tensor:
        rows = game_noise(self._game.seed, step, samples, self._game.players.latent)
        return rows[first : first + len(real)].to(real.device, real.dtype, non_blocking=True)

    def _fisher_backward(self, kfac: PlayersKFAC, logits: Tensor) -> None:
        """Draw labels from the discriminator's belief: of pairs for itself, of made samples for the generator."""
        with kfac["generator"].unobserved():
            kfac["discriminator"].fisher_backward(logits)
        with kfac["discriminator"].unobserved():
            kfac["generator"].fisher_backward(logits[:, 1:])

    def _average(self, vector: Tensor) -> None:
        self._communicator.all_reduce(vector, label="game field").wait()
        vector /= self._communicator.size


class Referee:
    """Judges a game's samples; collective.

    Args:
        game: The players and the judge.
        communicator: The ranks.
    """

    def __init__(self, game: GameParts, communicator: Communicator) -> None:
        self._game = game
        self._communicator = communicator

    @torch.no_grad()
    def evaluate(self, source: Source, samples: int) -> Evaluation:
        """Compare the generator's samples with the first `samples` of the data; always the same noise."""
        game, ranks = self._game, self._communicator
        players, judge = game.players, game.judge
        share_buffers(players, ranks)
        was_training = players.training
        players.eval()
        device = next(players.parameters()).device
        sums = torch.zeros(2, judge.sums_size, dtype=torch.float64, device=device)
        own = split(game.config.score_samples, ranks.size)[ranks.rank]
        noise = game_noise(game.seed, _SCORED, game.config.score_samples, players.latent).to(device)
        for rows in noise[own.start : own.stop].split(_CHUNK):
            sums[0] += judge.sums(players.generator(rows))
        for counted, inputs, _ in evaluation_batches(source, samples, _CHUNK, ranks.rank, ranks.size):
            if counted:
                sums[1] += judge.sums(one_tensor(inputs))
        ranks.all_reduce(sums, label="evaluation").wait()
        shown = players.generator(noise[: game.config.grid**2])
        players.train(was_training)
        made, real = sums.cpu()
        return Evaluation(
            loss=frechet(made, real, judge.classes),
            metric=score(made, judge.classes),
            references={"real_score": score(real, judge.classes), "judge_accuracy": game.judge_accuracy},
            pictures=shown.cpu(),
        )


def one_tensor(inputs: Inputs) -> Tensor:
    """Return a batch of samples, which a game's data has as one tensor (`game_setup.check_players`)."""
    assert isinstance(inputs, Tensor)
    return inputs


def _all_or_nothing(field: GameField) -> GameField:
    """Return the field, or NaN everywhere if any of it isn't finite: neither player steps or measures alone."""
    poison = torch.where(torch.isfinite(field.total.sum()), 1.0, torch.nan).to(field.field.dtype)
    return replace(field, field=field.field * poison)
