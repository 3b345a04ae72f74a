"""Vectors over all trained parameters of a model: one flat tensor each, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class VectorSpace:
    """The space of a model's trained parameters, in the order of their names in the module.

    Args:
        module: The bare model, whole on this rank.

    Attributes:
        parameters: The trained parameters by name; tied ones count once.
        size: Entries of a vector.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._sizes = [p.numel() for p in self.parameters.values()]
        self.size = sum(self._sizes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a new vector with the given tensors by name, and zeros for missing ones."""
        vector = self.zeros()
        views = self.views(vector)
        found = [name for name in views if name in tensors]
        if found:
            torch._foreach_copy_([views[name] for name in found], [tensors[name].detach() for name in found])
        return vector

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector's parts by name, as writable views in the parameters' shapes."""
        parts = torch.split(vector, self._sizes)
        return {name: part.view(p.shape) for (name, p), part in zip(self.parameters.items(), parts, strict=True)}

    def point(self) -> Tensor:
        """Return the parameters' values, a new vector."""
        return self.flatten(self.parameters)

    def zeros(self) -> Tensor:
        """Return a new vector of zeros."""
        like = next(iter(self.parameters.values()))
        return torch.zeros(self.size, dtype=like.dtype, device=like.device)
