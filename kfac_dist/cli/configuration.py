"""Options that commands share: a configuration and its overrides, as arguments and as they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kfac_dist.config.schema import Config, Target
from kfac_dist.config.yaml.document import override
from kfac_dist.config.yaml.load import load_config, resolve
from kfac_dist.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="YAML file of the run, or the name of a shipped one (kfac-dist init --list). It may name code, which is "
        "imported and run: use files that you trust.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values that replace the file's: kfac.inversion.damping=0.01"),
]


def load(path: Path, overrides: list[str] | None, options: dict[str, str | None]) -> Config:
    """Read the configuration; a command's own options win over everything else."""
    top = [
        override(tuple(key.split(".")), json.dumps(value), f"command line (--{key.rpartition('.')[2]})")
        for key, value in options.items()
        if value is not None
    ]
    return resolve(load_config(path, overrides or (), top=top))


def check_targets(config: Config, *, build: bool = False) -> None:
    """Find model and data and check the engine: that needs no data's files and no weights' memory.

    Args:
        config: The run.
        build: Whether to call a model of the user's own, too; else only its signature is looked at. Shipped ones are
            built.
    """
    import torch
    from torch import nn

    from kfac_dist.config.yaml.targets import load_target
    from kfac_dist.engines import check_sections
    from kfac_dist.preconditioner.precondition.transforms.table import check_transforms
    from kfac_dist.reporting.sinks import check_sinks
    from kfac_dist.tasks import DATA, MODELS, DataSplits

    on_cpu = config.run.device == "cpu" or not torch.cuda.is_available()
    check_sections(config.engine, config.train, on_cpu=on_cpu)
    check_sinks(config.metrics.sinks)
    check_transforms(config.kfac.update.transforms)
    load_target(config.data, DATA, "data", DataSplits)
    load_target(config.model, MODELS, "model", nn.Module)
    if build or not config.model.is_code:
        model_of_shapes(config.model)


def model_of_shapes(target: Target) -> nn.Module:
    """Build a model without memory for its weights where its code allows that."""
    import torch

    from kfac_dist.tasks import build_model

    try:
        with torch.device("meta"):
            return build_model(target)
    except ConfigError:  # perhaps because it reads values, which a tensor without memory hasn't
        return build_model(target)
