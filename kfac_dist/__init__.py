"""Distributed K-FAC for PyTorch: the public names, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kfac_dist.config.schema import KFACConfig

if TYPE_CHECKING:
    from kfac_dist.preconditioner.kfac import KFAC
    from kfac_dist.preconditioner.state_file import load_kfac, save_kfac

__version__ = "0.1.0"
__all__ = ["KFAC", "KFACConfig", "__version__", "load_kfac", "save_kfac"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; a command line that only prints help must not.
    if name == "KFAC":
        from kfac_dist.preconditioner.kfac import KFAC

        return KFAC
    if name in ("load_kfac", "save_kfac"):
        from kfac_dist.preconditioner import state_file

        return getattr(state_file, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
