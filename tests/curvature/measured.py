"""What tests of the curvature share: a KFAC that keeps only the last measurement, and its factors as dense matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.curvature.factors import FactorKind, Side
from kfac_dist.curvature.gram import complete


def build_kfac(
    model: nn.Module, *, inversion: Mapping[str, Any] | None = None, scaler: Any = None, **curvature: Any
) -> KFAC:
    """K-FAC that measures and refreshes at every step, remembers nothing (decay 0) and doesn't clip."""
    config = {
        "curvature": {"factor_every": 1, "decay": 0.0, **curvature},
        "inversion": {"inverse_every": 1, **(inversion or {})},
        "update": {"kl_clip": None},
    }
    return KFAC(model, config, grad_scaler=scaler)


def factors(kfac: KFAC) -> dict[str, Tensor]:
    """S/w of every factor by `block/side`, in float64 and symmetric: `[batch, n, n]`, or `[batch, n]` for a diagonal.

    Pieces of a factor that was cut lie on the diagonal of a zero matrix.
    """
    averages, found = kfac._parts.averages, {}
    for name, block in kfac.monitor.plan.blocks.items():
        for side in Side:
            units = [unit for unit in block.units if unit.side is side]
            if not units:
                continue
            quotients = []
            for unit in units:
                weight = averages.scalars[0, averages.layout.index(unit)].double()
                sums = averages.sums(unit).double().clone() / weight
                quotients.append(complete(sums) if unit.kind is FactorKind.DENSE else sums)
            if len(quotients) == 1:
                found[f"{name}/{side}"] = quotients[0]
                continue
            n, batch = units[-1].stop, units[0].batch
            whole = torch.zeros(batch, n, n, dtype=torch.float64)
            for unit, quotient in zip(units, quotients, strict=True):
                whole[:, unit.start : unit.stop, unit.start : unit.stop] = quotient
            found[f"{name}/{side}"] = whole
    return found


def measure(
    model: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor], *, kfac: KFAC | None = None, **curvature: Any
) -> dict[str, Tensor]:
    """The factors after one ordinary step: forward, K-FAC's own backward, the loss's backward, `step`."""
    own = build_kfac(model, **curvature) if kfac is None else kfac
    model.zero_grad()
    outputs = model(inputs)
    own.fisher_backward(outputs)
    loss(outputs).backward()
    own.step()
    found = factors(own)
    if kfac is None:
        own.remove()
    return found


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compare by the size of the whole tensor: entries of a Gram matrix cancel, its norm doesn't."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-12)
    assert float(error) < tolerance, f"relative error {float(error):.2e}"
