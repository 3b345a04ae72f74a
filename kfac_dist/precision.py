"""In which precision K-FAC works: fp32, or fp64 for models that have layers in it.

    factor_dtype auto ─┐ settled once, from the parameters of the covered layers     float64 if any of them is
                       ├─▶ working precision: window, weights, solves, vectors,      float64 if factors or inverses are
                       │   gradients' workspaces, payloads on their way
                       └─▶ inverse_dtype auto, communication_dtype auto              the working precision

Nothing depends on torch's default dtype, which is for the user's new tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kfac_dist.config.schema import DType, KFACConfig

_TORCH = {
    DType.AUTO: torch.float32,
    DType.FLOAT64: torch.float64,
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
}


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's name of a configured precision; of one that nothing has settled, fp32."""
    return _TORCH[dtype]


def itemsize(dtype: DType) -> int:
    """Return the bytes of a value."""
    return torch_dtype(dtype).itemsize


def settled(config: KFACConfig, parameters: Iterable[Tensor]) -> KFACConfig:
    """Return the configuration with every `auto` precision replaced by its value.

    Args:
        config: The configuration.
        parameters: Those of the covered layers.
    """
    factors = config.curvature.factor_dtype
    if factors is DType.AUTO:
        double = any(parameter.dtype is torch.float64 for parameter in parameters)
        factors = DType.FLOAT64 if double else DType.FLOAT32
    curvature = config.curvature.model_copy(update={"factor_dtype": factors})
    inverses = config.inversion.inverse_dtype
    wide = DType.FLOAT64 in (factors, inverses)
    common = DType.FLOAT64 if wide else DType.FLOAT32
    inversion = config.inversion.model_copy(update={"inverse_dtype": common if inverses is DType.AUTO else inverses})
    sent = config.distribution.communication_dtype
    distribution = config.distribution.model_copy(
        update={"communication_dtype": common if sent is DType.AUTO else sent}
    )
    return config.model_copy(update={"curvature": curvature, "inversion": inversion, "distribution": distribution})


def working(config: KFACConfig) -> torch.dtype:
    """Return the precision in which a settled configuration measures, solves and preconditions."""
    wide = DType.FLOAT64 in (config.curvature.factor_dtype, config.inversion.inverse_dtype)
    return torch.float64 if wide else torch.float32


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """Return a precision in which sums are made of values of this one: fp64 for fp64, else fp32."""
    return torch.promote_types(dtype, torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in fp32 if it has less, and in fp64 if it is."""
    return tensor.to(at_least_single(tensor.dtype))
