"""`kfac`: the sections of the preconditioner together."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from kfac_dist.config.curvature import CurvatureConfig
from kfac_dist.config.distribution import DistributionConfig
from kfac_dist.config.inversion import InversionConfig
from kfac_dist.config.section import Flag, Section
from kfac_dist.config.update import UpdateConfig


class KFACConfig(Section):
    """Everything that `KFAC` needs besides the model."""

    enabled: Flag = True
    curvature: CurvatureConfig = Field(default_factory=CurvatureConfig)
    inversion: InversionConfig = Field(default_factory=InversionConfig)
    distribution: DistributionConfig = Field(default_factory=DistributionConfig)
    update: UpdateConfig = Field(default_factory=UpdateConfig)

    @model_validator(mode="after")
    def _intervals_fit(self) -> Self:
        statistics, refresh = self.curvature.factor_every, self.inversion.inverse_every
        if refresh % statistics:
            raise ValueError(
                f"inversion.inverse_every ({refresh}) must be a multiple of curvature.factor_every ({statistics}), "
                "so that a refresh has fresh statistics"
            )
        if self.inversion.stagger > refresh // statistics:
            raise ValueError(
                f"inversion.stagger ({self.inversion.stagger}) may be at most inverse_every / factor_every "
                f"({refresh // statistics}): every slot refreshes at a step that measures"
            )
        if self.inversion.inverse_lag >= refresh // self.inversion.stagger:
            raise ValueError(
                f"inversion.inverse_lag ({self.inversion.inverse_lag}) must be shorter than the time between two "
                f"refreshes ({refresh // self.inversion.stagger} steps)"
            )
        return self
