"""`kfac.inversion`: damping and inversion of the factors, and cuts of large ones (Block K-FAC)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from kfac_dist.config.kfac.curvature import DType
from kfac_dist.config.schedules import Damping, Schedule
from kfac_dist.config.section import MOST, Count, CountOrZero, Flag, Fraction, OpenNames, Section


class Solver(OpenNames):
    """Inversion of a damped factor: one of these, or a registered solver."""

    CHOLESKY = "cholesky"
    EIGEN = "eigen"
    NEWTON_SCHULZ = "newton_schulz"
    EKFAC = "ekfac"


class Structure(StrEnum):
    """Blocks of the inverse Fisher matrix: single layers, or each layer with the one that follows."""

    BLOCK_DIAGONAL = "block_diagonal"
    BLOCK_TRIDIAGONAL = "block_tridiagonal"


class AdaptConfig(Section):
    """A damping that follows the trust region of `update.kl_clip`: more if steps are cut, less if they fit.

    Attributes:
        every: Steps between adaptations; each takes place at the next refresh of inverses.
        rate: Factor that multiplies the damping while steps are cut to a tenth or less, and divides it while half of
            their length or more is left.
        lowest: Least factor of the configured damping.
        highest: Largest factor of the configured damping.
    """

    every: Count = 10
    rate: Annotated[float, Field(gt=1, le=MOST, strict=True, allow_inf_nan=False)] = 1.5
    lowest: Fraction = 0.1
    highest: Annotated[float, Field(ge=1, le=MOST, strict=True, allow_inf_nan=False)] = 1000.0


class SplitBy(StrEnum):
    """Parts that a layer has by its nature."""

    PER_HEAD = "per_head"
    PER_GROUP = "per_group"


class SplitConfig(Section):
    """Cuts of the factors of some layers.

    In YAML `per_head` and `per_group` may stand alone, and so may a number: that many parts of both factors.

    Attributes:
        by: `per_head` cuts G of the projections that produce attention's heads (q, k, v, also fused) and A of the
            output projection; `per_group` makes each group of a grouped convolution a separate unit.
        heads: `per_head` only: number of heads, if the model has no attribute for it.
        inputs: Parts of A: the number of nearly equal ones, or their sizes; a bias's coordinate belongs to the last.
        outputs: Parts of G, likewise.
    """

    by: SplitBy | None = None
    heads: Count | None = None
    inputs: Count | tuple[Count, ...] | None = None
    outputs: Count | tuple[Count, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        match data:
            case str():
                return {"by": data}
            case bool():
                return data
            case int():
                return {"inputs": data, "outputs": data}
            case list() | tuple():
                raise ValueError(f"sizes {list(data)} need a side: write {{outputs: {list(data)}}}, or inputs")
        return data

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        sized = self.inputs is not None or self.outputs is not None
        if (self.by is None) != sized:
            raise ValueError("give per_head, per_group, a number, or a mapping with inputs or outputs: one of them")
        if self.heads is not None and self.by is not SplitBy.PER_HEAD:
            raise ValueError("heads has no effect without by: per_head")
        return self


def refuse_idle(splits: dict[str, SplitConfig]) -> dict[str, SplitConfig]:
    """Refuse a last pattern that leaves its layers whole; an earlier one keeps them from those that come after it."""
    for pattern, split in list(splits.items())[-1:]:
        if split.by is None and all(_is_whole(parts) for parts in (split.inputs, split.outputs)):
            raise ValueError(
                f"{pattern!r}: 1 part cuts nothing: give inputs or outputs 2 or more, or leave these layers out of "
                "splits"
            )
    return splits


def _is_whole(parts: int | tuple[int, ...] | None) -> bool:
    return parts is None or parts == 1 or (isinstance(parts, tuple) and len(parts) == 1)


class InversionConfig(Section):
    """Inversion: the method, its damping, and its intervals.

    Attributes:
        solver: `cholesky` and `newton_schulz` damp the factors (factored Tikhonov); `eigen` damps exactly;
            `ekfac` does, and measures the eigenvalues of A ⊗ G instead of multiplying them (George et al. 2018).
            Or one that a module under `extensions` registers.
        structure: `block_tridiagonal`, for chains of linear layers, takes account of neighbouring layers (Martens &
            Grosse 2015, §4.3). It is solved by `eigen`, and damps the factors all the same.
        damping: λ; a number or a schedule over steps. A warm-up needs its start, `warmup_from`.
        adapt: Adaptation of λ to the trust region; null leaves it to the schedule alone.
        inverse_every: Steps between refreshes of one block's inverses (T_inv); a multiple of `factor_every`.
        stagger: Slots over which the blocks' refreshes are spread inside one T_inv window; 1 refreshes all at once. At
            most one for each step that measures, times `curvature.stagger`.
        inverse_lag: Steps between the refresh of an inverse and its first use: meanwhile it is solved in the background
            (by a separate thread, on a GPU on a separate stream) and sent. 0 solves and sends in one step.
        early_refresh: At the start, inverses also refresh at this step and at 2, 4, 8, … times it, until the regular
            refreshes begin; those steps also measure. 0 keeps the first batch's inverses until then.
        rescale_every: `ekfac` only: steps between measurements of the second moments in the eigenbasis; a divisor of
            `factor_every`. null measures them with the factors; 1 at every step, at the cost of a measurement.
        max_factor_dim: Factors larger than this are cut into near-equal diagonal blocks (Block K-FAC).
        splits: Pattern (`fnmatch`, on module names) to the cuts of the factors of these layers, before
            `max_factor_dim`; the first match wins, so that `name: 1` exempts layers from a later pattern.
        inverse_dtype: Precision in which inverses (eigenbases) are kept and multiplied with gradients; `auto` is that
            in which they are solved: float64 if factors are kept in it, else float32.
        offload: Keep inverses in host memory, and copy each group of them to the device when it preconditions, two
            groups at a time. Costs this transfer in every step; of no use on a CPU.
    """

    questions: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "How is it inverted?": ("solver", "structure"),
        "With how much damping?": ("damping", "adapt"),
        "How often?": ("inverse_every", "early_refresh", "stagger", "inverse_lag", "rescale_every"),
        "Where are factors cut?": ("max_factor_dim", "splits"),
        "How are inverses kept?": ("inverse_dtype", "offload"),
    }

    solver: Solver = Solver.CHOLESKY
    structure: Structure = Structure.BLOCK_DIAGONAL
    damping: Damping = Schedule(value=0.003)
    adapt: AdaptConfig | None = None
    inverse_every: Count = 100
    stagger: Count = 1
    inverse_lag: CountOrZero = 0
    early_refresh: CountOrZero = 1
    rescale_every: Count | None = None
    max_factor_dim: Annotated[int, Field(ge=2, strict=True)] | None = None
    splits: Annotated[dict[str, SplitConfig], AfterValidator(refuse_idle)] = Field(default_factory=dict)
    inverse_dtype: DType = DType.AUTO
    offload: Flag = False
