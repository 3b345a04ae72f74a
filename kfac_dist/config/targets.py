"""`model` and `data`: from a name in the configuration to a callable, and the call.

A name is a shipped one, or `package.module:callable` of the user's own code, looked up from the working directory as
`python -m` does; so a user's model needs no registration and no fork.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Literal

from kfac_dist.config.schema import Target
from kfac_dist.config.spelling import did_you_mean
from kfac_dist.errors import ConfigError, KFACError

Kind = Literal["model", "data"]


def load_target(target: Target, shipped: Mapping[str, Callable[..., Any]], kind: Kind) -> Callable[..., Any]:
    """Find the callable that a target names, and check that it takes the target's arguments.

    Raises:
        ConfigError: An unknown name, a module or attribute that is missing or fails to import, something that can't
            be called, or arguments that its signature refuses.
    """
    if ":" in target.name:
        found = _imported(target.name, kind)
    elif target.name in shipped:
        found = shipped[target.name]
    else:
        raise ConfigError(
            f"{kind}.name: found {target.name!r}{did_you_mean(target.name, shipped)}; "
            f"expected one of {', '.join(sorted(shipped))}, or your own as package.module:callable"
        )
    _check_arguments(found, target, kind)
    return found


def build_target(target: Target, shipped: Mapping[str, Callable[..., Any]], kind: Kind) -> Any:
    """Find the callable that a target names and call it with the target's arguments.

    Raises:
        ConfigError: See `load_target`; also if the callable raises: its message, and the line for a user's own.
    """
    factory = load_target(target, shipped, kind)
    try:
        return factory(**target.args)
    except KFACError:
        raise
    except Exception as error:  # a wrong argument may show as anything, and the run can't start either way
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if target.name in shipped else f" ({type(error).__name__} in {frame.filename}:{frame.lineno})"
        raise ConfigError(f"{kind}.args: {target.name} refuses them: {error}{where}") from error


def _imported(name: str, kind: Kind) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    where = f"{kind}.name: found {name!r}"
    parts = [*module_name.split("."), *attribute.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{where}, expected package.module:callable, both sides made of Python names")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(f"{where}, but importing {module_name} fails: {error}; install what it needs") from error
        raise ConfigError(
            f"{where}, but there is no module {error.name!r}: modules are looked up in {folder} and among the "
            "installed packages"
        ) from None
    except Exception as error:  # the user's own code: whatever it raises, the run can't start, and this says where
        raise ConfigError(f"{where}, but importing {module_name} raises {type(error).__name__}: {error}") from error
    found: Any = module
    owner = module_name
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [known for known in dir(found) if not known.startswith("_")]
            raise ConfigError(f"{where}, but {owner} has no {part!r}{did_you_mean(part, public)}")
        found, owner = getattr(found, part), f"{owner}.{part}"
    if not callable(found):
        raise ConfigError(f"{where}, which is {type(found).__name__}, not something to call")
    target: Callable[..., Any] = found
    return target


def _check_arguments(found: Callable[..., Any], target: Target, kind: Kind) -> None:
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return  # a callable written in C may not tell; the call itself will
    parameters = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    problems = [
        f"{kind}.args.{name}: {target.name} takes no such argument{did_you_mean(name, parameters)}"
        f"; it takes {', '.join(parameters) or 'none'}"
        for name in target.args
        if name not in parameters and not takes_any
    ]
    problems += [
        f"{kind}.args.{name}: missing; {target.name} needs it"
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in target.args
    ]
    problems += [
        f"{kind}.name: {target.name} takes {parameter.name} by position only, which a configuration can't give"
        for parameter in signature.parameters.values()
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty
    ]
    if problems:
        raise ConfigError("\n".join(problems))
