"""`kfac`: the sections of the preconditioner together."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from kfac_dist.config.kfac.curvature import CurvatureConfig, DType, Fisher, Uncovered
from kfac_dist.config.kfac.distribution import DistributionConfig, Placement, Reduction
from kfac_dist.config.kfac.inversion import InversionConfig, Solver, SplitBy, Structure
from kfac_dist.config.kfac.solver import CGConfig, NewtonConfig, StepSolver
from kfac_dist.config.kfac.update import Direction, UpdateConfig
from kfac_dist.config.schedules import ScheduleKind
from kfac_dist.config.section import Flag, Section

# Defaults of newton: the paper's intervals.
_NEWTON: dict[str, tuple[type[Section], dict[str, Any]]] = {
    "curvature": (CurvatureConfig, {"factor_every": 1, "decay_ramp": True}),
    "inversion": (InversionConfig, {"inverse_every": 20}),
}


def _filled(data: dict[str, Any], name: str, kind: type[Section], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return options in which a section has defaults of its own for the keys that it doesn't name."""
    section = data.get(name, {})
    if isinstance(section, dict):
        return {**data, name: {**defaults, **section}}
    if isinstance(section, kind):
        missing = {key: value for key, value in defaults.items() if key not in section.model_fields_set}
        return {**data, name: section.model_copy(update=missing)}
    return data


class KFACConfig(Section):
    """Everything that `KFAC` needs besides the model.

    `solver` computes the step. With any other solver than `direct`, the direct step's trust region is not used:
    `update.kl_clip` is then null. Under `newton` statistics are measured every step and inverted every 20, and
    `curvature.decay_ramp` is on, unless the sections say otherwise.

    Attributes:
        enabled: Whether K-FAC is used at all.
        solver: Method that finds the step: the optimizer from the preconditioned gradient, or a solver of K-FAC's.
    """

    enabled: Flag = True
    solver: StepSolver = StepSolver.DIRECT
    curvature: CurvatureConfig = Field(default_factory=CurvatureConfig)
    inversion: InversionConfig = Field(default_factory=InversionConfig)
    distribution: DistributionConfig = Field(default_factory=DistributionConfig)
    update: UpdateConfig = Field(default_factory=UpdateConfig)
    newton: NewtonConfig | None = None
    cg: CGConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_clip_without_lr(cls, data: Any) -> Any:
        """Switch the KL clip, on by default, off for solvers that set the step's length themselves."""
        if not isinstance(data, dict) or data.get("solver", StepSolver.DIRECT) in (None, StepSolver.DIRECT):
            return data
        update = data.get("update", {})
        if isinstance(update, UpdateConfig) and not {"kl_clip", "kl_clip_lr"} & update.model_fields_set:
            update = update.model_copy(update={"kl_clip": None})
        elif isinstance(update, dict) and not {"kl_clip", "kl_clip_lr"} & set(update):
            update = {**update, "kl_clip": None}
        return {**data, "update": update}

    @model_validator(mode="before")
    @classmethod
    def _orthogonal_steps_need_roots(cls, data: Any) -> Any:
        """Have factors solved by `eigen`, and no output gradients measured where none are whitened."""
        update = data.get("update") if isinstance(data, dict) else None
        update = update.model_dump(exclude_unset=True) if isinstance(update, UpdateConfig) else update
        if not isinstance(update, dict) or update.get("direction") != Direction.ORTHOGONAL:
            return data
        orthogonal = update.get("orthogonal")
        one_sided = isinstance(orthogonal, dict) and orthogonal.get("power_g") == 0
        filled = _filled(data, "inversion", InversionConfig, {"solver": Solver.EIGEN})
        return _filled(filled, "curvature", CurvatureConfig, {"fisher": Fisher.INPUT_ONLY}) if one_sided else filled

    @model_validator(mode="after")
    def _orthogonal_steps_fit(self) -> Self:
        if self.update.direction is not Direction.ORTHOGONAL:
            return self
        needed = {
            "solver": (self.solver, StepSolver.DIRECT),
            "inversion.solver": (self.inversion.solver, Solver.EIGEN),
            "inversion.structure": (self.inversion.structure, Structure.BLOCK_DIAGONAL),
            "curvature.uncovered": (self.curvature.uncovered, Uncovered.PLAIN),
        }
        for key, (found, value) in needed.items():
            if found != value:
                raise ValueError(
                    f"{key} ({found}) must be {value} while update.direction is orthogonal, whose roots need "
                    "eigenvalues of single layers, and whose other parameters take the step of update.first_order"
                )
        if self.curvature.fisher is Fisher.INPUT_ONLY and self.update.orthogonal_options.power_g:
            raise ValueError(
                "curvature.fisher input_only measures no output gradients, which update.orthogonal.power_g "
                f"({self.update.orthogonal_options.power_g:g}) whitens: set it to 0, or use another fisher"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _newton_measures_every_step(cls, data: Any) -> Any:
        """Give the sections that newton reads its own defaults."""
        if not isinstance(data, dict) or data.get("solver") != StepSolver.NEWTON:
            return data
        filled = data
        for name, (kind, defaults) in _NEWTON.items():
            filled = _filled(filled, name, kind, defaults)
        return filled

    @model_validator(mode="after")
    def _options_belong_to_solver(self) -> Self:
        if self.cg is not None and self.solver is not StepSolver.CG:
            raise ValueError(f"cg has no effect while solver is {self.solver}: leave it out, or set solver to cg")
        if self.newton is not None and self.solver is not StepSolver.NEWTON:
            raise ValueError(
                f"newton has no effect while solver is {self.solver}: leave it out, or set solver to newton"
            )
        if self.solver is StepSolver.DIRECT:
            return self
        if not self.enabled:
            raise ValueError(f"solver {self.solver} builds on K-FAC: set enabled to true, or solver to direct")
        if self.update.kl_clip is not None:
            raise ValueError(
                f"update.kl_clip ({self.update.kl_clip}) has no effect while solver is {self.solver}, which finds the "
                "step's length from its quadratic model: leave it out"
            )
        return self

    def without_solver(self) -> Self:
        """Return the same options with the direct solver, for measuring alone and for training without a solver."""
        return self.model_copy(update={"solver": StepSolver.DIRECT, "cg": None, "newton": None})

    @model_validator(mode="after")
    def _chains_are_whole(self) -> Self:
        if self.inversion.structure is Structure.BLOCK_DIAGONAL:
            return self
        needed = {
            "inversion.solver": (self.inversion.solver, Solver.EIGEN),
            "inversion.max_factor_dim": (self.inversion.max_factor_dim, None),
            "inversion.splits": (self.inversion.splits or None, None),
            "inversion.stagger": (self.inversion.stagger, 1),
            "inversion.inverse_dtype": (
                self.inversion.inverse_dtype,
                DType.FLOAT32 if self.inversion.inverse_dtype is DType.BFLOAT16 else self.inversion.inverse_dtype,
            ),
            "inversion.offload": (self.inversion.offload, False),
            "curvature.class_conditional": (self.curvature.class_conditional, None),
            "distribution.reduction": (self.distribution.reduction, Reduction.ALL_REDUCE),
        }
        for key, (found, value) in needed.items():
            if found != value:
                allowed = "null" if value is None else str(value).lower()
                raise ValueError(
                    f"{key} ({str(found).lower()}) must be {allowed} while inversion.structure is "
                    "block_tridiagonal, whose layers are solved with their neighbours"
                )
        if self.distribution.placement not in (Placement.AUTO, Placement.REPLICATED):
            raise ValueError(
                f"distribution.placement ({self.distribution.placement}) must be auto or replicated while "
                "inversion.structure is block_tridiagonal: a layer's step takes the gradients of its neighbours"
            )
        if self.curvature.fisher is Fisher.INPUT_ONLY:
            raise ValueError(
                "curvature.fisher input_only has no G while inversion.structure is block_tridiagonal, which needs that "
                "of neighbouring layers: use another fisher"
            )
        return self

    @model_validator(mode="after")
    def _newton_fits_inversion(self) -> Self:
        if self.solver is not StepSolver.NEWTON:
            return self
        inversion, search = self.inversion, self.newton_options.gamma_every
        if inversion.damping.kind is not ScheduleKind.CONSTANT or inversion.damping.warmup_steps:
            raise ValueError(
                "inversion.damping must be a plain number while solver is newton: it is where λ starts, and the "
                "Levenberg-Marquardt rule moves it"
            )
        lowest, highest = self.newton_options.damping_bounds
        if not lowest <= inversion.damping.value <= highest:
            raise ValueError(
                f"inversion.damping ({inversion.damping.value}) is where λ starts while solver is newton, and lies "
                f"outside of newton.damping_bounds ([{lowest}, {highest}]): move it inside, or widen the bounds"
            )
        if search % inversion.inverse_every:
            raise ValueError(
                f"newton.gamma_every ({search}) must be a multiple of inversion.inverse_every "
                f"({inversion.inverse_every}): a search compares inverses of the same statistics; 0 keeps γ"
            )
        if search and (inversion.stagger > 1 or inversion.inverse_lag):
            raise ValueError(
                "newton.gamma_every needs all inverses at once and in time: set inversion.stagger to 1 and "
                "inversion.inverse_lag to 0, or newton.gamma_every to 0"
            )
        return self

    @model_validator(mode="after")
    def _one_moves_the_damping_of_cg(self) -> Self:
        options, damping = self.cg_options, self.inversion.damping
        moves = damping.kind is not ScheduleKind.CONSTANT or damping.warmup_steps
        if self.solver is StepSolver.CG and options.adapt_every and options.damping is None and moves:
            raise ValueError(
                f"cg.adapt_every ({options.adapt_every}) moves λ, and so does the schedule of inversion.damping, where "
                "it begins: give cg.damping a number, which leaves the schedule to the preconditioner, or leave "
                "cg.adapt_every out"
            )
        return self

    @property
    def newton_options(self) -> NewtonConfig:
        """The section `newton`, or its defaults."""
        return self.newton or NewtonConfig()

    @model_validator(mode="after")
    def _graft_has_its_parts(self) -> Self:
        graft = self.update.graft
        if graft is not None and self.solver is not StepSolver.DIRECT:
            raise ValueError(
                f"update.graft has no effect while solver is {self.solver}, which finds the step's length from its "
                "quadratic model: leave it out"
            )
        if graft is not None and self.inversion.structure is Structure.BLOCK_TRIDIAGONAL:
            raise ValueError(
                "update.graft measures layers one by one, and inversion.structure block_tridiagonal couples them: "
                "leave one of them out"
            )
        if graft is not None and self.curvature.uncovered is not Uncovered.PLAIN:
            raise ValueError(
                "update.graft lets parameters without a block take the first-order step, so that curvature.uncovered: "
                f"{self.curvature.uncovered} would have no effect: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _adaptation_has_a_region(self) -> Self:
        if self.inversion.adapt is not None and self.update.kl_clip is None:
            raise ValueError(
                "inversion.adapt follows the trust region, and there is none while update.kl_clip is null: give it a "
                "value, or leave inversion.adapt out"
            )
        return self

    @property
    def cg_options(self) -> CGConfig:
        """The section `cg`, or its defaults."""
        return self.cg or CGConfig()

    @model_validator(mode="after")
    def _intervals_fit(self) -> Self:
        statistics, refresh = self.curvature.factor_every, self.inversion.inverse_every
        if refresh % statistics:
            raise ValueError(
                f"inversion.inverse_every ({refresh}) must be a multiple of curvature.factor_every ({statistics}), "
                "so that a refresh has fresh statistics"
            )
        parts, slots = self.curvature.stagger, self.inversion.stagger
        if slots > refresh // statistics * parts:
            raise ValueError(
                f"inversion.stagger ({slots}) may be at most inverse_every / factor_every, times curvature.stagger "
                f"({refresh // statistics * parts}): every slot refreshes at a step that measures it"
            )
        if slots % parts:
            raise ValueError(
                f"inversion.stagger ({slots}) must be a multiple of curvature.stagger ({parts}): layers that are "
                "measured at different steps refresh at different steps"
            )
        if self.inversion.inverse_lag >= refresh:
            raise ValueError(
                f"inversion.inverse_lag ({self.inversion.inverse_lag}) must be shorter than the time between two "
                f"refreshes of a layer, inverse_every ({refresh} steps)"
            )
        return self

    @model_validator(mode="after")
    def _groups_fit_classes(self) -> Self:
        apart = [pattern for pattern, split in self.inversion.splits.items() if split.by is SplitBy.PER_GROUP]
        if apart and self.curvature.class_conditional is not None:
            raise ValueError(
                f"inversion.splits ({apart[0]}: per_group) and curvature.class_conditional exclude each other: a "
                "layer's classes are combined over all of its groups; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _rescaling_fits(self) -> Self:
        inversion, curvature = self.inversion, self.curvature
        rescale = inversion.rescale_every
        if inversion.solver is not Solver.EKFAC:
            if rescale is not None:
                raise ValueError(
                    f"inversion.rescale_every has no effect on solver {inversion.solver}, which measures no second "
                    "moments: leave it out, or set inversion.solver to ekfac"
                )
            return self
        if curvature.fisher is Fisher.INPUT_ONLY:
            raise ValueError(
                "inversion.solver ekfac needs the gradients of single samples, and curvature.fisher input_only "
                "measures no output gradients: use eigen, or another fisher"
            )
        if curvature.stagger > 1:
            raise ValueError(
                f"curvature.stagger ({curvature.stagger}) must be 1 while inversion.solver is ekfac, whose second "
                "moments are measured in all layers at once"
            )
        if inversion.offload:
            raise ValueError(
                "inversion.offload and inversion.solver ekfac exclude each other: bases that are measured in are never "
                "idle; leave offload out, or use eigen"
            )
        if rescale is not None and curvature.factor_every % rescale:
            raise ValueError(
                f"inversion.rescale_every ({rescale}) must divide curvature.factor_every ({curvature.factor_every}), "
                "so that steps that measure factors measure the second moments, too"
            )
        return self
