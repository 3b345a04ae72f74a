"""`kfac-dist config`: every key that a run's file may have."""

from __future__ import annotations

from typing import Annotated

import typer

from kfac_dist.cli.exits import exit_codes
from kfac_dist.config.yaml.reference import explain_key, reference_yaml


def config(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="A key or section to explain, such as kfac.inversion.damping.")
    ] = None,
) -> None:
    """Print all keys of a run's file as a commented file with their defaults, or explain one."""
    with exit_codes():
        print(reference_yaml().rstrip() if key is None else explain_key(key))
