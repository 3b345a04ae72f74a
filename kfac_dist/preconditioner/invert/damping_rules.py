"""A damping that follows the trust region: more where steps are cut, less where they fit.

    every step      ν, by which the trust region shortened the step, joins a sum on the device
    every T₁ steps, when inverses are refreshed anyway:    mean ν < 0.1 → λ ← rate·λ      mean ν > ½ → λ ← λ/rate

In a trust-region method λ is the multiplier of the constraint: steps of the damped model that lie outside of the region
say that λ is too small for it. Levenberg and Marquardt's own rule judges by the loss after the step, and needs another
pass and the model's prediction; solvers that have both use it (`optimizers.levenberg_marquardt`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kfac_dist.config.schema import AdaptConfig
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.errors import CheckpointError

CUT, FITTING = 0.1, 0.5
LABEL = "damping"


class DampingAdaptation:
    """Multiplies the configured damping.

    Args:
        config: The adaptation; None leaves the damping unchanged.
        communicator: The ranks, which decide together.
        device: Device of ν.
        dtype: Its precision.

    Attributes:
        factor: Factor of the configured damping.
    """

    def __init__(
        self,
        config: AdaptConfig | None,
        communicator: Communicator,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._config = config
        self._communicator = communicator
        self.factor = 1.0
        self._steps = 0
        self._scales = torch.zeros((), device=device, dtype=dtype)

    @property
    def active(self) -> bool:
        """Whether the configuration wants it."""
        return self._config is not None

    def note(self, scale: Tensor) -> None:
        """Take note of a step's ν; one that isn't finite, of a step that will be skipped, counts as cut to nothing."""
        if self.active:
            self._scales += torch.nan_to_num(scale, nan=0.0)
            self._steps += 1

    def judge(self) -> None:
        """Adapt the factor, if it is time to; collective then, and waits for the device."""
        if self._config is None or self._steps < self._config.every:
            return
        total = self._scales.clone()
        self._communicator.all_reduce(total, label=LABEL).wait()  # rows of ranks may have rounded differently
        mean = float(total) / (self._steps * self._communicator.size)
        if mean < CUT:
            self.factor = min(self.factor * self._config.rate, self._config.highest)
        elif mean > FITTING:
            self.factor = max(self.factor / self._config.rate, self._config.lowest)
        self._steps = 0
        self._scales.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the factor and the open window; the same on every rank."""
        return {
            "factor": torch.tensor(self.factor, dtype=torch.float64),
            "steps": torch.tensor(self._steps),
            "scales": self._scales.clone(),
        }

    def load_state_dict(self, values: Mapping[str, Tensor] | None) -> None:
        """Load the result of `state_dict`.

        Raises:
            CheckpointError: There is nothing to take, though the configuration wants a damping that adapts.
        """
        if not self.active:
            return
        if values is None:
            raise CheckpointError(
                "the K-FAC state has no adapted damping: it was saved without kfac.inversion.adapt; resume without it"
            )
        self.factor, self._steps = float(values["factor"]), int(values["steps"])
        self._scales.copy_(values["scales"])
