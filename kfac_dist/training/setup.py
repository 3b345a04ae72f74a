"""From a configuration to the parts of a run: each built once, on every rank, in the same order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from kfac_dist.config.schema import Config, KFACConfig, Schedule, StepSolver, TrainConfig
from kfac_dist.distributed.communicators.agreement import agree_on_plan, agreed
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.startup.bootstrap import World
from kfac_dist.engines import TrainingEngine, build_engine, check_engine
from kfac_dist.errors import ConfigError, DataError
from kfac_dist.optimizers import Stepper, build_optimizer, build_stepper
from kfac_dist.preconditioner.kfac import KFAC
from kfac_dist.tasks import Loss, build_data, build_loss, build_model
from kfac_dist.tasks.scores import Score
from kfac_dist.training.averaging import IterateAverage
from kfac_dist.training.checkpoints.random_state import seed_everything
from kfac_dist.training.data.batches import Source, Stream, source_of
from kfac_dist.training.data.sampler import Position, sampler_of
from kfac_dist.training.game.passes import GameParts
from kfac_dist.training.game.players import PlayersKFAC
from kfac_dist.training.game.setup import build_game, build_players, check_players, share_judge
from kfac_dist.training.passes import forward, refuse_unused
from kfac_dist.training.trial import WHERE, check_targets, try_out


@dataclass(frozen=True)
class RunParts:
    """The parts of a run.

    Attributes:
        engine: The model, distributed.
        optimizer: Takes the step.
        kfac: Preconditions the gradient; None if the configuration disables it.
        loss: Loss and metric.
        stream: This rank's batches.
        train: The training data.
        test: The held-out data.
        total_steps: Length of the run.
        settings: Intervals of logging and evaluation, batch sizes, and reactions to bad steps.
        learning_rate: The rate that the run sets and logs.
        stepper: Finds the step instead of the optimizer, which then descends by it; None for the direct solver.
        average: The running average of the weights, if the run keeps one.
        score: Further figures of the held-out data, if the data brings any.
        game: Parts of a game beside these; None if the run is none.
    """

    engine: TrainingEngine
    optimizer: torch.optim.Optimizer
    kfac: KFAC | PlayersKFAC | None
    loss: Loss
    stream: Stream
    train: Source
    test: Source
    total_steps: int
    settings: TrainConfig
    learning_rate: Schedule
    stepper: Stepper | None = None
    average: IterateAverage | None = None
    score: Score | None = None
    game: GameParts | None = None

    @property
    def kfacs(self) -> tuple[KFAC, ...]:
        """Every K-FAC of the run: of its model, or of each player."""
        match self.kfac:
            case None:
                return ()
            case KFAC():
                return (self.kfac,)
            case PlayersKFAC():
                return self.kfac.members

    def phase_seconds(self) -> dict[str, float]:
        """Return how long the parts of K-FAC's steps have taken so far, by name; of all players together."""
        total: Counter[str] = Counter()
        for kfac in self.kfacs:
            total.update({str(phase): seconds for phase, seconds in kfac.monitor.phases.seconds().items()})
        return dict(total)


def build_parts(
    config: Config,
    world: World,
    communicator: Communicator,
    set_activity: Callable[[str], None] = lambda activity: None,
) -> RunParts:
    """Build everything that a run needs; collective.

    Parts that can fail on one rank alone (a missing package, a file, the user's own code) are built first and agreed
    on, so that no rank waits for one that has given up.

    Args:
        config: The run's configuration.
        world: This rank's place and device.
        communicator: The ranks.
        set_activity: Told what comes next, for ranks that have to wait.

    Raises:
        KFACError: Something can't be built; every rank raises.
    """
    settings = config.train
    with agreed(communicator):
        check_engine(config.engine, config.train, world)
        seed_everything(config.run.seed, rank=0)  # the same initial weights on every rank
        set_activity("building the model")
        model = build_model(config.model)
        set_activity("reading the data")
        splits = build_data(config.data)
        train, test = (source_of(part, world.device, settings.loader_workers) for part in (splits.train, splits.test))
        sampler = sampler_of(settings, len(train), config.run.seed)
        if not len(test):
            raise DataError("the test data has no samples")
        sampler.check(communicator.size, Position())
        loss = build_loss(config.loss)
        if config.game is not None:
            check_players(config.model.name, model, train)
        set_activity("trying the model out")
        trial = try_out(model.to(world.device), loss, train, test)
        check_targets(loss, train, trial.outputs)
        game = None
        if config.game is not None:
            game = build_game(config.game, model, train, test, config.run.seed)
        if communicator.size > 1 and config.engine.waits_for_every_gradient:
            refuse_unused(WHERE, trial.unused)
        set_activity("comparing what was built")
    agree_on_plan(communicator, parameter_shapes(model))
    total_steps = settings.steps or sampler.steps(settings.epochs or 1)
    engine: TrainingEngine
    kfac: KFAC | PlayersKFAC | None = None
    stepper = None
    if game is not None:
        share_judge(game, communicator)
        engine, optimizer, kfac = build_players(game, config.first_order, config.kfac, total_steps)
    else:
        engine, optimizer = build_engine(
            model, config.engine, config.train, world, partial(build_optimizer, config=config.first_order)
        )
        _settle(engine, loss, train)
        if config.kfac.enabled:
            options = with_classes(config.kfac, trial.outputs.shape[-1])
            kfac = KFAC(engine, options, optimizer=optimizer, total_steps=total_steps)
            if config.kfac.solver is not StepSolver.DIRECT:
                stepper = build_stepper(kfac, loss.total, total_steps=total_steps)
    seed_everything(config.run.seed, rank=world.rank + 1)
    stream = Stream(train, sampler, rank=world.rank, world_size=world.world_size, accumulate=settings.accumulate)
    average = None if settings.iterate_averaging is None else IterateAverage(engine, settings.iterate_averaging)
    return RunParts(
        engine,
        optimizer,
        kfac,
        loss,
        stream,
        train,
        test,
        total_steps,
        settings,
        config.learning_rate,
        stepper,
        average,
        splits.score,
        game,
    )


def with_classes(config: KFACConfig, outputs: int) -> KFACConfig:
    """Fill in the number of classes where statistics are kept apart by class and the configuration doesn't say it.

    Args:
        config: K-FAC's options.
        outputs: Of the model, for each term of the loss.

    Raises:
        ConfigError: It says another number than the model has outputs.
    """
    by_class = config.curvature.class_conditional
    if by_class is None or by_class.classes == outputs:
        return config
    if by_class.classes is not None:
        raise ConfigError(
            f"kfac.curvature.class_conditional.classes is {by_class.classes}, but the model has {outputs} outputs a "
            f"term: samples of classes beyond the number would not be measured; set it to {outputs}, or leave it out"
        )
    known = by_class.model_copy(update={"classes": outputs})
    curvature = config.curvature.model_copy(update={"class_conditional": known})
    return config.model_copy(update={"curvature": curvature})


def parameter_shapes(model: nn.Module) -> list[tuple[str, str]]:
    """Return names and shapes, which DDP takes to be the same on every rank and would not name."""
    return [
        (name, f"{str(p.dtype).removeprefix('torch.')} {list(p.shape)}{'' if p.requires_grad else ', frozen'}")
        for name, p in model.named_parameters()
    ]


def _settle(engine: TrainingEngine, loss: Loss, data: Source) -> None:
    """Let the engine arrange its communication by a pass over the first samples, which leaves no trace."""

    def backward() -> None:
        [(inputs, targets)] = data.fetch([torch.arange(min(2, len(data)))], seed=0)
        loss.total(forward(engine.model, inputs), targets).backward()

    engine.settle(backward)
