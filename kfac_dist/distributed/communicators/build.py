"""The communicator that a backend's name stands for."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch.distributed as dist

from kfac_dist.config.schema import Backend
from kfac_dist.distributed.communicators.base import Communicator, SoloCommunicator
from kfac_dist.distributed.communicators.torch_communicator import TorchCommunicator
from kfac_dist.errors import ConfigError, ExtensionError

Make = Callable[[dist.ProcessGroup | None, float], Communicator]
# Communicators registered from outside of the package.
REGISTERED: dict[Backend, Make] = {}


def add_communicator(name: str, make: Make) -> None:
    """Add a communicator by name; see `kfac_dist.extensions.register_communicator`.

    Raises:
        ExtensionError: The name is taken or no name, or `make` can't make a communicator.
    """
    where = "register_communicator"
    if isinstance(make, type) or not callable(make):
        raise ExtensionError(
            f"{where}: found {make!r} for {name!r}; expected a function of (group, timeout_seconds) that returns a "
            "Communicator"
        )
    try:
        inspect.signature(make).bind(None, 1.0)
    except TypeError as error:
        raise ExtensionError(
            f"{where}: the maker of {name!r} can't be called with (group, timeout_seconds): {error}"
        ) from None
    REGISTERED[Backend.add(name, where)] = make


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
        ConfigError: The backend is MPI, and these ranks are not those of an MPI job on CPUs; or it is a registered one
            that makes something else.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return SoloCommunicator()
    if backend in REGISTERED:
        made = REGISTERED[backend](group, timeout_seconds)
        if not isinstance(made, Communicator):
            raise ConfigError(
                f"kfac.distribution.backend: {backend} made {type(made).__name__}, expected a class derived from "
                "kfac_dist.extensions.Communicator"
            )
        return made
    match backend:
        case Backend.TORCH:
            return TorchCommunicator.create(group, timeout_seconds, on_host=on_host)
        case Backend.MPI:
            from kfac_dist.distributed.communicators.mpi_communicator import MPICommunicator  # mpi4py is an extra

            return MPICommunicator.create(group, timeout_seconds)
