"""The typed, frozen sections of a run: the keys of its YAML file and their meanings.

Each section answers one question and has its own file here, so that a constructor takes the few options that it needs:

    run  model  data  loss  optimizer  engine  train  checkpoint  metrics        the training run
    game                                                                         two players instead of one model
    kfac = curvature (measurement) + inversion (solving)
         + distribution (which rank does it) + update (scaling of the result)
         + solver (finds the step) with newton or cg

Everything here is a plain value: nothing imports torch, so that a configuration can be checked in milliseconds.
Values out of range and unknown keys are refused here; `kfac_dist.config.yaml.load` turns a refusal into a message that
names the file, the line, the value found and the values allowed.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from kfac_dist.config.checkpoint import CheckpointConfig as CheckpointConfig
from kfac_dist.config.engine import EngineConfig as EngineConfig
from kfac_dist.config.engine import EngineName as EngineName
from kfac_dist.config.engine import FSDP2Config as FSDP2Config
from kfac_dist.config.engine import Precision as Precision
from kfac_dist.config.game import DiscriminatorConfig as DiscriminatorConfig
from kfac_dist.config.game import GameConfig as GameConfig
from kfac_dist.config.game import Objective as Objective
from kfac_dist.config.kfac.curvature import ClassConditionalConfig as ClassConditionalConfig
from kfac_dist.config.kfac.curvature import CurvatureConfig as CurvatureConfig
from kfac_dist.config.kfac.curvature import DType as DType
from kfac_dist.config.kfac.curvature import Fisher as Fisher
from kfac_dist.config.kfac.curvature import Likelihood as Likelihood
from kfac_dist.config.kfac.curvature import LossTerms as LossTerms
from kfac_dist.config.kfac.curvature import OnMismatch as OnMismatch
from kfac_dist.config.kfac.curvature import Sharing as Sharing
from kfac_dist.config.kfac.curvature import Uncovered as Uncovered
from kfac_dist.config.kfac.distribution import AssignmentStrategy as AssignmentStrategy
from kfac_dist.config.kfac.distribution import Backend as Backend
from kfac_dist.config.kfac.distribution import DistributionConfig as DistributionConfig
from kfac_dist.config.kfac.distribution import Placement as Placement
from kfac_dist.config.kfac.distribution import ReduceEvery as ReduceEvery
from kfac_dist.config.kfac.distribution import Reduction as Reduction
from kfac_dist.config.kfac.inversion import AdaptConfig as AdaptConfig
from kfac_dist.config.kfac.inversion import InversionConfig as InversionConfig
from kfac_dist.config.kfac.inversion import Solver as Solver
from kfac_dist.config.kfac.inversion import SplitBy as SplitBy
from kfac_dist.config.kfac.inversion import SplitConfig as SplitConfig
from kfac_dist.config.kfac.inversion import Structure as Structure
from kfac_dist.config.kfac.kfac import KFACConfig as KFACConfig
from kfac_dist.config.kfac.solver import CGConfig as CGConfig
from kfac_dist.config.kfac.solver import NewtonConfig as NewtonConfig
from kfac_dist.config.kfac.solver import StepSolver as StepSolver
from kfac_dist.config.kfac.update import TRANSFORM_NAMES as TRANSFORM_NAMES
from kfac_dist.config.kfac.update import Direction as Direction
from kfac_dist.config.kfac.update import FirstOrderConfig as FirstOrderConfig
from kfac_dist.config.kfac.update import Graft as Graft
from kfac_dist.config.kfac.update import Iteration as Iteration
from kfac_dist.config.kfac.update import IterationDType as IterationDType
from kfac_dist.config.kfac.update import Length as Length
from kfac_dist.config.kfac.update import OrthogonalConfig as OrthogonalConfig
from kfac_dist.config.kfac.update import UpdateConfig as UpdateConfig
from kfac_dist.config.loss import LossConfig as LossConfig
from kfac_dist.config.loss import LossName as LossName
from kfac_dist.config.metrics import SINK_NAMES as SINK_NAMES
from kfac_dist.config.metrics import MetricsConfig as MetricsConfig
from kfac_dist.config.optimizer import OptimizerConfig as OptimizerConfig
from kfac_dist.config.optimizer import OptimizerName as OptimizerName
from kfac_dist.config.schedules import Schedule as Schedule
from kfac_dist.config.schedules import ScheduleKind as ScheduleKind
from kfac_dist.config.section import MOST_NAME, FilePath, ModuleName, Name, Seconds, Seed
from kfac_dist.config.section import OpenNames as OpenNames
from kfac_dist.config.section import Section as Section
from kfac_dist.config.section import check_new_name as check_new_name
from kfac_dist.config.train import BatchGrowth as BatchGrowth
from kfac_dist.config.train import DivergenceConfig as DivergenceConfig
from kfac_dist.config.train import TrainConfig as TrainConfig


class Target(Section):
    """A shipped name, or `package.module:callable`, with its keyword arguments.

    Attributes:
        name: The name. Code that it names is imported, and is called when the model or the data is built.
        args: The callable's keyword arguments.
    """

    name: Annotated[str, Field(min_length=1, max_length=200)]
    args: dict[str, Any] = Field(default_factory=dict)

    @property
    def is_code(self) -> bool:
        """Whether it is code of the user's own, not shipped."""
        return ":" in self.name

    @model_validator(mode="before")
    @classmethod
    def _string_is_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data


class RunConfig(Section):
    """Name, seed and place of a run; its files go to `directory/name`.

    Attributes:
        name: Of the run, and of the folder of its files.
        directory: Parent of that folder.
        seed: Seed of the initial weights, the batches and all other random numbers.
        device: Device of each rank; `auto` is a GPU for each rank if PyTorch finds them, else the CPU.
        timeout_seconds: Seconds that ranks wait for each other before they give up.
    """

    name: Name
    directory: FilePath = "runs"
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_seconds: Seconds = 600.0


class Config(Section):
    """A whole run.

    Attributes:
        run: Name, seed and place.
        model: The model: a shipped one, or your own as package.module:callable.
        data: The data: shipped data, or your own as package.module:callable.
        loss: The loss; it also determines K-FAC's likelihood.
        optimizer: The first-order optimizer that takes the step; none if a solver of K-FAC computes the whole step.
        kfac: K-FAC: measurement, inversion, distribution and update.
        engine: Distribution of the model's parameters over the ranks.
        train: Length, batches and evaluation.
        checkpoint: Saving, keeping and resuming checkpoints.
        metrics: Measurements beside losses, and the address that serves them while the run trains.
        game: Two players instead of one model.
        compare: Optimizers that `--compare` trains beside K-FAC, by name, from the same weights on the same data.
        extensions: Modules of your own, as package.module, that are imported before this file is checked: each
            registers layer types, solvers or other parts.
    """

    run: RunConfig
    model: Target
    data: Target
    loss: LossConfig
    optimizer: OptimizerConfig | None = None
    kfac: KFACConfig = Field(default_factory=KFACConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    train: TrainConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    game: GameConfig | None = None
    compare: dict[str, OptimizerConfig] = Field(default_factory=dict)
    extensions: tuple[ModuleName, ...] = ()

    @field_validator("compare")
    @classmethod
    def _compared_names_are_folders(cls, compare: dict[str, OptimizerConfig]) -> dict[str, OptimizerConfig]:
        for name in compare:
            if len(name) > MOST_NAME or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(
                    f"found the name {name[:60]!r}, which names the folder of its files: expected at most {MOST_NAME} "
                    "letters, digits, '.', '_' and '-'"
                )
        return compare

    @model_validator(mode="after")
    def _engine_takes_growing_batches(self) -> Self:
        if self.train.batch_growth is not None and self.engine.name.zero_stage is not None:
            raise ValueError(
                f"train.batch_growth and engine.name {self.engine.name} exclude each other: DeepSpeed gets the size "
                "of a batch once; use engine ddp or fsdp2, or leave batch_growth out"
            )
        return self

    @model_validator(mode="after")
    def _curvature_fits_loss(self) -> Self:
        loss, curvature = self.loss.name, self.kfac.curvature
        if curvature.likelihood not in (None, loss.likelihood):
            raise ValueError(
                f"kfac.curvature.likelihood ({curvature.likelihood}) contradicts loss.name ({loss}), whose likelihood "
                f"is {loss.likelihood}: leave it out, it follows from the loss"
            )
        if "loss_terms" in curvature.model_fields_set and curvature.loss_terms is not loss.loss_terms:
            raise ValueError(
                f"kfac.curvature.loss_terms ({curvature.loss_terms}) contradicts loss.name ({loss}), a mean over "
                f"{loss.loss_terms}s: leave it out, it follows from the loss"
            )
        return self

    @model_validator(mode="after")
    def _drawn_gradients_are_whole(self) -> Self:
        if self.kfac.enabled and self.kfac.curvature.uncovered.draws and self.engine.name is not EngineName.DDP:
            raise ValueError(
                f"kfac.curvature.uncovered diagonal_mc needs engine.name: ddp, found {self.engine.name}: it sends "
                "drawn labels back to whole parameters; use uncovered: diagonal, whose gradients the engine brings"
            )
        return self

    @model_validator(mode="after")
    def _targets_are_classes(self) -> Self:
        curvature = self.kfac.curvature
        if curvature.class_conditional is None:
            return self
        if self.loss.name.likelihood is not Likelihood.CATEGORICAL:
            raise ValueError(
                f"kfac.curvature.class_conditional needs targets that are classes, loss.name ({self.loss.name}) has "
                "none: use cross_entropy or token_cross_entropy, or leave class_conditional out"
            )
        reduces = [*curvature.sharing_overrides.values(), curvature.sharing]
        if self.loss.name.loss_terms is LossTerms.TOKEN and Sharing.REDUCE in reduces:
            raise ValueError(
                "kfac.curvature.class_conditional needs kfac.curvature.sharing: expand for a loss of tokens: reduce "
                "adds up a sample's tokens, which have different classes"
            )
        return self

    @model_validator(mode="after")
    def _one_finds_the_step(self) -> Self:
        solver = self.kfac.solver
        if solver is StepSolver.DIRECT:
            if self.optimizer is None:
                raise ValueError("optimizer: missing; expected a mapping with keys name, lr, …: it takes the step")
            return self
        found = f"while kfac.solver is {solver}"
        if self.optimizer is not None:
            raise ValueError(f"optimizer has no effect {found}, which finds the whole step: leave it out (null)")
        if self.engine.name is not EngineName.DDP:
            raise ValueError(
                f"engine.name ({self.engine.name}) must be ddp {found}: its products with the curvature differentiate "
                "the whole model forward, which needs every parameter on every rank"
            )
        if self.engine.sync_batchnorm:
            raise ValueError(
                f"engine.sync_batchnorm can't be true {found}: SyncBatchNorm has no forward-mode derivative"
            )
        if self.train.clip_grad_norm is not None:
            raise ValueError(f"train.clip_grad_norm has no effect {found}: no optimizer sees a gradient; leave it out")
        return self

    @model_validator(mode="after")
    def _chains_need_whole_gradients(self) -> Self:
        structure = self.kfac.inversion.structure
        if self.kfac.enabled and structure is Structure.BLOCK_TRIDIAGONAL and self.engine.name is not EngineName.DDP:
            raise ValueError(
                f"kfac.inversion.structure ({structure}) needs engine.name ddp, found {self.engine.name}: a "
                "layer's step takes the whole gradients of its neighbours"
            )
        return self

    @model_validator(mode="after")
    def _products_take_samples(self) -> Self:
        share = self.kfac.newton_options.products_fraction
        if share < 1 and self.loss.name.loss_terms is not LossTerms.SAMPLE:
            raise ValueError(
                f"kfac.newton.products_fraction ({share}) needs a loss with one term a sample, found {self.loss.name}: "
                "leave it out"
            )
        return self

    @property
    def first_order(self) -> OptimizerConfig:
        """The optimizer that moves the parameters: `optimizer`, or plain descent along the step of a solver."""
        return self.optimizer or OptimizerConfig(lr=Schedule(value=1.0), momentum=0.0)

    @property
    def learning_rate(self) -> Schedule:
        """The rate that a run logs."""
        return self.kfac.cg_options.lr if self.kfac.solver is StepSolver.CG else self.first_order.lr

    @model_validator(mode="after")
    def _variance_is_known(self) -> Self:
        if self.metrics.relative_variance and not self.first_order.knows_variance:
            raise ValueError(
                f"metrics.relative_variance needs an optimizer that averages gradients and their squares with one β, "
                f"found {self.first_order.name}: set optimizer.name to svag or msvag, or give adamw two equal betas"
            )
        return self

    @model_validator(mode="after")
    def _game_fits(self) -> Self:
        adversarial = self.loss.name is LossName.ADVERSARIAL
        if self.game is None:
            if adversarial:
                raise ValueError("loss.name adversarial is the loss of two players: add a game section (game: {})")
            return self
        if not adversarial:
            raise ValueError(f"loss.name ({self.loss.name}) is no game's: write adversarial, or leave the game out")
        if self.engine != EngineConfig():
            raise ValueError(
                "engine has no effect on a game, whose players are whole on every rank and averaged by the game "
                "itself: leave the section out"
            )
        if self.kfac.solver is not StepSolver.DIRECT:
            raise ValueError(
                f"kfac.solver ({self.kfac.solver}) minimises one model of one loss, which a game hasn't: leave it out"
            )
        if self.kfac.curvature.class_conditional is not None:
            raise ValueError("kfac.curvature.class_conditional needs a loss of class labels, which a game's is not")
        factor = self.game.discriminator.damping_factor
        if factor != 1 and not self.kfac.enabled:
            raise ValueError(
                f"game.discriminator.damping_factor ({factor}) has no effect without K-FAC: leave it out, or set "
                "kfac.enabled to true"
            )
        if self.train.accumulate != 1:
            raise ValueError(
                f"train.accumulate ({self.train.accumulate}) must be 1 in a game: both players' gradients of the whole "
                "batch are needed at once"
            )
        return self
