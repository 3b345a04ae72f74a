"""The communicator that a backend's name stands for."""

from __future__ import annotations

import torch.distributed as dist

from kfac_dist.config.schema import Backend
from kfac_dist.distributed.communicators.base import Communicator, SoloCommunicator
from kfac_dist.distributed.communicators.torch_communicator import TorchCommunicator


def build_communicator(
    timeout_seconds: float,
    group: dist.ProcessGroup | None = None,
    backend: Backend = Backend.TORCH,
    *,
    on_host: bool = False,
) -> Communicator:
    """K-FAC's communicator over `group` (default: the world); a solo one without torch.distributed or with one rank.

    Collective over `group`. With `on_host` it sends tensors in host memory also where the group has GPUs.

    Raises:
        ConfigError: The backend is MPI, and these ranks are not those of an MPI job on CPUs.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return SoloCommunicator()
    match backend:
        case Backend.TORCH:
            return TorchCommunicator.create(group, timeout_seconds, on_host=on_host)
        case Backend.MPI:
            from kfac_dist.distributed.communicators.mpi_communicator import MPICommunicator  # mpi4py is an extra

            return MPICommunicator.create(group, timeout_seconds)
