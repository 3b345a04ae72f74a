"""A `KFAC` that measures once and changes no parameter, common to the doctor's checks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kfac_dist.config.schema import DType, Fisher, KFACConfig, Sharing, Structure, UpdateConfig
from kfac_dist.curvature.capture.shared_outputs import Samples
from kfac_dist.engines import Engine
from kfac_dist.preconditioner.kfac import KFAC
from kfac_dist.preconditioner.measure.measurement import PLACES
from kfac_dist.preconditioner.renewal import IDLE, MISMATCHED

Still = Callable[[nn.Module], object]
"""Sets the mode in which a model is measured: by default evaluation mode, in which nothing is drawn."""


def still_in_training(module: nn.Module) -> None:
    """Set training mode for a model that needs it, and evaluation mode for torch's own layers in it.

    These drop nothing then, and their batch norms leave samples apart.
    """
    module.train()
    for part in module.modules():
        if type(part).__module__.startswith("torch.nn."):
            part.training = False


@contextmanager
def measuring(
    model: nn.Module | Engine, config: KFACConfig, fisher: Fisher, *, sharing: Sharing | None = None
) -> Iterator[KFAC]:
    """Attach a `KFAC` whose factors are those of one measurement: all rows, whole factors, fp32; collective.

    A chain's layers are measured one by one: their factors are the same.

    Args:
        model: The model or its engine.
        config: The run's options; only those that define a factor are kept.
        fisher: Gradients that G is computed from.
        sharing: Replaces the run's weight-sharing setting.
    """
    changes: dict[str, Any] = {"fisher": fisher, "factor_every": 1, "stagger": 1, "decay": 0.0, "sample_fraction": 1.0}
    changes |= {"class_conditional": None}
    if sharing is not None:
        changes |= {"sharing": sharing, "sharing_overrides": {}}
    curvature = config.curvature.model_copy(update={**changes, "factor_dtype": DType.FLOAT32})
    inversion = config.inversion.model_copy(
        update={"inverse_every": 1, "stagger": 1, "inverse_lag": 0, "max_factor_dim": None, "splits": {}}
        | {"structure": Structure.BLOCK_DIAGONAL}
    )
    # Whole on the wire, too: packed triangles would be mirrored before their halves are compared.
    whole = {"communication_dtype": DType.FLOAT32, "pack_triangles": False}
    distribution = config.distribution.model_copy(update=whole)
    parts = {"curvature": curvature, "inversion": inversion, "distribution": distribution}
    with warnings.catch_warnings():
        # Findings say it.
        for message in (MISMATCHED, IDLE):
            warnings.filterwarnings("ignore", message=f".*{message}")
        yield from _attached(model, config, parts)


def _attached(model: nn.Module | Engine, config: KFACConfig, parts: dict[str, Any]) -> Iterator[KFAC]:
    kfac = KFAC(model, config.without_solver().model_copy(update={**parts, "update": UpdateConfig(kl_clip=None)}))
    try:
        yield kfac
    finally:
        kfac.remove()


def factors(kfac: KFAC) -> dict[str, Mapping[str, Tensor]]:
    """Return every unit's `sum` and `scalars` (weight, trace), those of all ranks together; collective."""
    state = kfac.state_dict()
    shares = float(state["shares"])  # a state holds one rank's equal share of the average over ranks
    return {
        name: {"sum": entry["sum"] * shares, "scalars": entry["scalars"] * shares}
        for name, entry in state["units"].items()
    }


def found_shared(kfac: KFAC) -> dict[str, Samples]:
    """Return the blocks whose outputs all samples share, as the first measured pass of several samples found them.

    They have no statistics from that pass: from the next one on they are measured, unless they are
    `Samples.SHARED`. Collective.
    """
    units = kfac.state_dict()["units"]
    known = {
        block.name: int(units[unit.name]["samples"])
        for block in kfac.monitor.plan.blocks.values()
        for unit in block.units
    }
    shared = {name: Samples(number % PLACES) for name, number in known.items() if number}
    return {name: samples for name, samples in shared.items() if samples is not Samples.OWN}
