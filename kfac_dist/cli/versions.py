"""`kfac-dist version`."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version


def show_version() -> None:
    """Print the versions that a bug report needs."""
    for package in ("kfac_dist", "torch", "numpy", "deepspeed", "mpi4py"):
        try:
            print(f"{package:10} {version(package)}")
        except PackageNotFoundError:
            print(f"{package:10} not installed")
    print(f"{'python':10} {sys.version.split()[0]}")
