"""Reactions to steps whose loss, gradients or statistics are not finite."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kfac_dist.config.section import MOST, Count, CountOrZero, Section


class DivergenceConfig(Section):
    """Reactions to steps whose loss or gradients are not finite: all ranks skip them, and more if they go on.

    A skipped step's gradients count as zeros, and its statistics as never measured. At the next logged step the damping
    of K-FAC is raised; later logged steps without a skip lower it again. Of a step that is taken, a rank may have to
    drop statistics that aren't finite: the logged window counts as one with a skip.

    Attributes:
        skips: Steps skipped in a row, or logged windows in a row with dropped statistics, after which the run goes back
            to its newest checkpoint.
        damping_factor: Factor by which a skip multiplies the damping; logged steps without a skip divide by it again.
        rollbacks: How often the run may go back; then, or without a checkpoint, it ends as diverged.
    """

    skips: Count = 10
    damping_factor: Annotated[float, Field(ge=1, le=MOST, strict=True, allow_inf_nan=False)] = 10.0
    rollbacks: CountOrZero = 2
