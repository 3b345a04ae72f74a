"""Registration of code outside of the package: layers' blocks, solvers, transforms, engines, communicators, sinks.

A module of yours registers what it adds when it is imported; a run imports it by `extensions: [package.module]` in its
YAML file, a program by an import before it makes `KFAC`. Each registration names the version of this interface that it
was written for, `api_version=1`. The names in `__all__` keep their meaning as long as `API_VERSION` stays.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kfac_dist.config.schema import Backend as Backend
from kfac_dist.config.schema import EngineConfig as EngineConfig
from kfac_dist.curvature.blocks.base import Block as Block
from kfac_dist.curvature.blocks.base import KroneckerBlock as KroneckerBlock
from kfac_dist.curvature.blocks.base import dense as dense
from kfac_dist.curvature.blocks.layer_calls import LayerCall as LayerCall
from kfac_dist.curvature.blocks.layers.linear import InputFirstLinearBlock as InputFirstLinearBlock
from kfac_dist.curvature.blocks.layers.linear import LinearBlock as LinearBlock
from kfac_dist.curvature.blocks.rows import MicroBatch as MicroBatch
from kfac_dist.curvature.blocks.rows import batch_first as batch_first
from kfac_dist.curvature.blocks.table import add_block_type
from kfac_dist.curvature.factors import Side as Side
from kfac_dist.curvature.inverses.solvers import add_solver
from kfac_dist.distributed.communicators.base import Communicator as Communicator
from kfac_dist.distributed.communicators.base import SoloCommunicator as SoloCommunicator
from kfac_dist.distributed.communicators.base import Work as Work
from kfac_dist.distributed.communicators.build import add_communicator
from kfac_dist.distributed.communicators.build import build_communicator as build_communicator
from kfac_dist.distributed.communicators.torch_communicator import TorchCommunicator as TorchCommunicator
from kfac_dist.distributed.movement.gradient_layout import GradientLayout as GradientLayout
from kfac_dist.distributed.movement.gradient_layout import ParameterSlices as ParameterSlices
from kfac_dist.distributed.startup.bootstrap import World as World
from kfac_dist.engines.build import add_engine
from kfac_dist.engines.training_engine import TrainingEngine as Engine
from kfac_dist.errors import CollectiveError as CollectiveError
from kfac_dist.errors import ExtensionError as ExtensionError
from kfac_dist.preconditioner.precondition.transforms.base import Stack as Stack
from kfac_dist.preconditioner.precondition.transforms.base import Stage as Stage
from kfac_dist.preconditioner.precondition.transforms.base import State as State
from kfac_dist.preconditioner.precondition.transforms.base import Transform as Transform
from kfac_dist.preconditioner.precondition.transforms.table import add_transform
from kfac_dist.reporting.sinks import Sink as Sink
from kfac_dist.reporting.sinks import add_sink

API_VERSION = 1

__all__ = [
    "API_VERSION",
    "Backend",
    "Block",
    "CollectiveError",
    "Communicator",
    "Engine",
    "EngineConfig",
    "ExtensionError",
    "GradientLayout",
    "InputFirstLinearBlock",
    "KroneckerBlock",
    "LayerCall",
    "LinearBlock",
    "MicroBatch",
    "ParameterSlices",
    "Side",
    "Sink",
    "SoloCommunicator",
    "Stack",
    "Stage",
    "State",
    "TorchCommunicator",
    "Transform",
    "Work",
    "World",
    "batch_first",
    "build_communicator",
    "dense",
    "register_block",
    "register_communicator",
    "register_engine",
    "register_sink",
    "register_solver",
    "register_transform",
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
        ExtensionError: Another version, a type that has a block, or no block type; with a correction.
    """
    _check_version("register_block", api_version)
    add_block_type(layer_type, block_type)


def register_solver(name: str, invert: Callable[[Tensor, Tensor], Tensor], *, api_version: int) -> None:
    """Add a solver, which `kfac.inversion.solver` then names.

    `invert` gets dense factors with their damping, equal sizes in one batch, `[k, n, n]`, which it may overwrite, and
    the last inverses of the same factors, at first the identity or zero; it returns the inverses `[k, n, n]`, or what
    preconditions well in their place. Of the result the symmetric part is taken. Where it raises, or returns what
    isn't finite or has no positive diagonal, Cholesky inverts, and the factor is named with the reason. Diagonal
    factors aren't given to it. Inverses are saved and resumed as those of `cholesky`; a solver has no other state.

    Args:
        name: Lower-case letters, digits and '_'.
        invert: A function of `(matrices, previous)`.
        api_version: The `API_VERSION` that the solver was written for.

    Raises:
        ExtensionError: Another version, a name that is taken, or nothing to call; says what to write.
    """
    _check_version("register_solver", api_version)
    add_solver(name, invert)


def register_transform(name: str, make: Callable[..., Transform], *, api_version: int) -> None:
    """Add a transform of gradient matrices, which a run selects by `kfac.update.transforms: {name: {}}`.

    It gets the matrices of like layers together, on the ranks that precondition them, before the inverse, behind it, or
    behind what sets the step's length, as its `stage` says. What it keeps from step to step is saved and resumed by
    the layer's name, on any number of ranks and under any engine.

    Args:
        name: Lower-case letters, digits and '_'.
        make: A class derived from `Transform`, or a function that returns one; called with the YAML file's arguments by
            keyword.
        api_version: The `API_VERSION` that the transform was written for.

    Raises:
        ExtensionError: Another version, a name that is taken, or no transform; with a correction.
    """
    _check_version("register_transform", api_version)
    add_transform(name, make)


def register_communicator(
    name: str, make: Callable[[ProcessGroup | None, float], Communicator], *, api_version: int
) -> None:
    """Add a communicator for K-FAC's collectives, which `kfac.distribution.backend` then names.

    It is made by all ranks together, where there is more than one; a class that derives from `TorchCommunicator` by its
    `create`.

    Args:
        name: Lower-case letters, digits and '_'.
        make: A function of `(group, timeout_seconds)`, of the ranks that average gradients (None: all) and of how long
            a collective may wait; returns a `Communicator` over them.
        api_version: The `API_VERSION` that the communicator was written for.

    Raises:
        ExtensionError: Another version, a name that is taken, or nothing to call; says what to write.
    """
    _check_version("register_communicator", api_version)
    add_communicator(name, make)


def register_engine(name: str, make: Callable[[nn.Module, EngineConfig, World], Engine], *, api_version: int) -> None:
    """Add an engine, which `engine.name` then names.

    Args:
        name: Lower-case letters, digits and '_'.
        make: A class derived from `Engine`, or a function that returns one; called on every rank with the model, on its
            device, the `engine` section and the ranks. The optimizer is built of the parameters of its `module`.
        api_version: The `API_VERSION` that the engine was written for.

    Raises:
        ExtensionError: Another version, a name that is taken, or no engine; with a correction.
    """
    _check_version("register_engine", api_version)
    add_engine(name, make)


def register_sink(name: str, make: Callable[..., Sink], *, api_version: int) -> None:
    """Add a metric sink, which a run chooses by `metrics.sinks: {name: {argument: value}}`.

    Args:
        name: Lower-case letters, digits and '_'.
        make: A class derived from `Sink`, or a function that returns one; called on rank 0 with the run's directory,
            the number of steps that a resumed run has done, and the YAML file's arguments by keyword.
        api_version: The `API_VERSION` that the sink was written for.

    Raises:
        ExtensionError: Another version, a name that is taken, or no sink; with a correction.
    """
    _check_version("register_sink", api_version)
    add_sink(name, make)


def _check_version(function: str, version: int) -> None:
    if version != API_VERSION:
        raise ExtensionError(
            f"{function}: found api_version={version!r}, this kfac_dist has {API_VERSION}: see the changes in "
            f"docs/extending.md, then write api_version={API_VERSION}"
        )
