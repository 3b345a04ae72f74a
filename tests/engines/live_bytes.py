"""How many bytes of tensors an object keeps alive, by walking everything that the package's own objects refer to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.engines import Engine

# Not K-FAC's: the model, its gradients and the optimizer's state belong to the engine.
FOREIGN = (nn.Module, nn.Parameter, Engine, torch.optim.Optimizer)


def live_bytes(root: object) -> int:
    """Bytes of all storages reachable from `root`, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_of(root)}
    return sum(storages.values())


def tensors_of(root: object) -> Iterator[Tensor]:
    """Every tensor that containers and objects of the package hold."""
    seen: set[int] = set()
    left: list[Any] = [root]
    while left:
        found = left.pop()
        if id(found) in seen or isinstance(found, FOREIGN):
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            yield found
        elif isinstance(found, Mapping):
            left += [*found.keys(), *found.values()]
        elif isinstance(found, list | tuple | set | frozenset):
            left += found
        elif type(found).__module__.startswith("kfac_dist"):
            left += vars(found).values()


def bookkeeping(kfac: KFAC) -> list[Tensor]:
    """A number or a few a unit: weights, traces, places; the planner counts none of them."""
    matrices = {"average", "window", "_window"}
    parts = kfac._parts
    kept = (
        *(parts.averages, parts.reduction, parts.refresh, parts.trust_region, parts.uncovered),
        parts.damping.adaptation,
    )
    moments = () if parts.moments is None else (parts.moments.averages, parts.moments.reduction)
    return [
        value
        for owner in (*kept, *moments)
        for name, value in vars(owner).items()
        if isinstance(value, Tensor) and name not in matrices
    ]
