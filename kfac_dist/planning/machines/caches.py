"""The share of K-FAC's operands that a model's own step leaves in the caches: little.

Between two of K-FAC's steps a model goes forward and back, so that gradients, inverses and averages come from memory
again. A benchmark that repeats one product would find them in a cache.
"""

from __future__ import annotations

import torch

# More than a processor's last cache, of which a busy machine leaves a rank its share, holds between two steps.
_BYTES = 256_000_000


class Caches:
    """A device's caches, and how they are emptied.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._other = torch.zeros(_BYTES // 4, device=device)

    def evict(self) -> None:
        """Read and write something else, and wait until that is done."""
        self._other.add_(1.0)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
