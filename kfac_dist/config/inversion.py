"""`kfac.inversion`: what is solved."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from kfac_dist.config.curvature import DType
from kfac_dist.config.schedules import Schedule
from kfac_dist.config.section import Count, CountOrZero, Flag, Section


class Solver(StrEnum):
    """How a damped factor is inverted."""

    CHOLESKY = "cholesky"
    EIGEN = "eigen"
    NEWTON_SCHULZ = "newton_schulz"


class Structure(StrEnum):
    """Which blocks of the Fisher matrix the inverse knows: layers by themselves, or with the layer that follows."""

    BLOCK_DIAGONAL = "block_diagonal"
    BLOCK_TRIDIAGONAL = "block_tridiagonal"


class InversionConfig(Section):
    """What is solved: the method, its damping, and when.

    Attributes:
        solver: `cholesky` and `newton_schulz` damp the factors (factored Tikhonov); `eigen` damps exactly.
        structure: `block_tridiagonal`, for chains of linear layers, takes account of neighbouring layers (Martens &
            Grosse 2015, §4.3). It is solved by `eigen`, and damps the factors all the same.
        damping: λ; a number or a schedule over steps.
        inverse_every: Steps between refreshes of one block's inverses (T_inv); a multiple of `factor_every`.
        stagger: Slots over which the blocks' refreshes spread inside one T_inv window; 1 refreshes all at once.
        inverse_lag: Steps between the refresh of an inverse and its first use, so that sharing overlaps training.
        early_refresh: At the start, inverses also refresh at this step and at 2, 4, 8, … times it, until the regular
            refreshes begin; those steps measure, too. 0 keeps the first batch's inverses until then.
        max_factor_dim: Factors larger than this are cut into near-equal diagonal blocks (Block K-FAC).
        inverse_dtype: Precision in which inverses (eigenbases) are kept and multiplied with gradients; solved they are
            in fp32.
        offload: Keep inverses in host memory, and bring each group of them to the device when it preconditions: two
            groups are there at a time. Costs their way over the bus in every step; on a CPU it costs and saves nothing.
    """

    solver: Solver = Solver.CHOLESKY
    structure: Structure = Structure.BLOCK_DIAGONAL
    damping: Schedule = Schedule(value=0.003)
    inverse_every: Count = 100
    stagger: Count = 1
    inverse_lag: CountOrZero = 0
    early_refresh: CountOrZero = 1
    max_factor_dim: Annotated[int, Field(ge=2, strict=True)] | None = None
    inverse_dtype: DType = DType.FLOAT32
    offload: Flag = False
