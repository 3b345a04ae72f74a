"""Registration of code outside of the package: layer types' blocks and metric sinks.

A module of yours registers what it adds when it is imported; a run imports it by `extensions: [package.module]` in its
YAML file, a program by an import before it makes `KFAC`. Each registration names the version of this interface that it
was written for, `api_version=1`. What `__all__` lists here keeps its meaning as long as `API_VERSION` stays.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from kfac_dist.curvature.blocks.base import Block as Block
from kfac_dist.curvature.blocks.base import KroneckerBlock as KroneckerBlock
from kfac_dist.curvature.blocks.base import dense as dense
from kfac_dist.curvature.blocks.layer_calls import Use as Use
from kfac_dist.curvature.blocks.layers.linear import InputFirstLinearBlock as InputFirstLinearBlock
from kfac_dist.curvature.blocks.layers.linear import LinearBlock as LinearBlock
from kfac_dist.curvature.blocks.rows import MicroBatch as MicroBatch
from kfac_dist.curvature.blocks.rows import batch_first as batch_first
from kfac_dist.curvature.blocks.table import add_block_type
from kfac_dist.curvature.factors import Side as Side
from kfac_dist.errors import ExtensionError as ExtensionError
from kfac_dist.reporting.sinks import Sink as Sink
from kfac_dist.reporting.sinks import add_sink

API_VERSION = 1

__all__ = [
    "API_VERSION",
    "Block",
    "ExtensionError",
    "InputFirstLinearBlock",
    "KroneckerBlock",
    "LinearBlock",
    "MicroBatch",
    "Side",
    "Sink",
    "Use",
    "batch_first",
    "dense",
    "register_block",
    "register_sink",
]


def register_block(layer_type: type[nn.Module] | str, block_type: type[Block], *, api_version: int) -> None:
    """Give a layer type a block: from now on every `KFAC` covers layers of this type, and of those that derive from it.

    The block's factors are saved and resumed like any other's, by the layer's name. At the first measured step its
    rows are compared with the gradient that autograd finds: a block that is wrong leaves its layer's gradient plain.

    Args:
        layer_type: The layer's class, or its full name as `package.module.Class` where that need not be imported.
        block_type: A class that derives from `KroneckerBlock`, or from `Block`; made of `(name, module, sharing)`.
        api_version: The `API_VERSION` that the block was written for.

    Raises:
        ExtensionError: Another version, a type that has a block, or no block type; says what to write.
    """
    _check_version("register_block", api_version)
    add_block_type(layer_type, block_type)


def register_sink(name: str, make: Callable[..., Sink], *, api_version: int) -> None:
    """Add a metric sink, which a run chooses by `metrics.sinks: {name: {argument: value}}`.

    Args:
        name: Lower-case letters, digits and '_'.
        make: A class that derives from `Sink`, or what returns one; called on rank 0 with the run's directory, the
            number of steps that a resumed run has done, and the YAML file's arguments by keyword.
        api_version: The `API_VERSION` that the sink was written for.

    Raises:
        ExtensionError: Another version, a name that is taken, or no sink; says what to write.
    """
    _check_version("register_sink", api_version)
    add_sink(name, make)


def _check_version(function: str, version: int) -> None:
    if version != API_VERSION:
        raise ExtensionError(
            f"{function}: found api_version={version!r}, this kfac_dist has {API_VERSION}: see what has changed in "
            f"docs/extending.md, then write api_version={API_VERSION}"
        )
