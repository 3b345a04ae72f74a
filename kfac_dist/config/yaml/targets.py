"""`model` and `data`: from a name in the configuration to a callable, and the call.

A name is a shipped one, or `package.module:callable` of the user's own code, looked up from the working directory as
`python -m` does; so a user's model needs no registration and no fork. That makes a configuration a program: looking a
name up imports its module, and building it calls it. Callables that can't make a model or data, such as os:system, are
not called.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from kfac_dist.config.schema import Target
from kfac_dist.errors import ConfigError, KFACError, did_you_mean

Kind = Literal["model", "data"]


def load_target(
    target: Target, shipped: Mapping[str, Callable[..., Any]], kind: Kind, makes: type = object
) -> Callable[..., Any]:
    """Find the callable that a target names, and check that it takes the target's arguments; calls nothing.

    Args:
        target: The target; its module is imported.
        shipped: The callables that a name stands for.
        kind: Section that the target belongs to.
        makes: Type that the callable should return.

    Raises:
        ConfigError: An unknown name, a module or attribute that is missing or fails to import, something that can't
            be called or can't return `makes`, or arguments that its signature refuses.
    """
    if target.is_code:
        found = _imported(target.name, kind)
        _check_product(found, target, kind, makes)
    elif target.name in shipped:
        found = shipped[target.name]
    else:
        raise ConfigError(
            f"{kind}.name: found {target.name!r}{did_you_mean(target.name, shipped)}; "
            f"expected one of {', '.join(sorted(shipped))}, or your own as package.module:callable"
        )
    _check_arguments(found, target, kind)
    return found


def build_target(target: Target, shipped: Mapping[str, Callable[..., Any]], kind: Kind, makes: type = object) -> Any:
    """Find the callable that a target names and call it with the target's arguments; see `load_target`.

    Raises:
        ConfigError: See `load_target`; also if the callable raises: its message, and the line for a user's own.
    """
    factory = load_target(target, shipped, kind, makes)
    try:
        return factory(**target.args)
    except KFACError:
        raise
    except Exception as error:  # a wrong argument may show as anything, and the run can't start either way
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if target.name in shipped else f" ({type(error).__name__} in {frame.filename}:{frame.lineno})"
        said = f"{error}{where}".strip()
        if not target.args:  # then it isn't they that are wrong
            raise ConfigError(f"{kind}.name: {target.name} fails: {said}") from error
        raise ConfigError(f"{kind}.args: {target.name} refuses them: {said}") from error


def import_module(name: str, where: str) -> types.ModuleType:
    """Import a module of the user's own, looked up from the working directory, too.

    Args:
        name: Its full name.
        where: The key that names it and the value found there, for messages.

    Raises:
        ConfigError: There is none, or importing it fails.
    """
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(f"{where}, but importing {name} fails: {error}; install its requirements") from error
        raise ConfigError(
            f"{where}, but there is no module {error.name!r}: modules are looked up in {folder} and among the "
            "installed packages"
        ) from None
    # The user's own code: after any exception the run can't start, and this says where. A script may end itself.
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}, but importing {name} raises {type(error).__name__}: {error}") from error


def _imported(name: str, kind: Kind) -> Callable[..., Any]:
    module_name, _, attribute = name.partition(":")
    where = f"{kind}.name: found {name!r}"
    parts = [*module_name.split("."), *attribute.split(".")]
    if not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{where}, expected package.module:callable, both sides made of Python names")
    found: Any = import_module(module_name, where)
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


def _check_product(found: Callable[..., Any], target: Target, kind: Kind, makes: type) -> None:
    """Refuse a callable whose module or annotation shows that it returns something else."""
    if makes is object or _needs_positions(found):
        return
    where = f"{kind}.name: found {target.name!r}"
    expected = f"{makes.__module__.partition('.')[0]}'s {makes.__qualname__}"
    source = found.func if isinstance(found, functools.partial) else found
    if isinstance(source, types.BuiltinFunctionType) or _is_standard(source):
        raise ConfigError(f"{where}, which no {expected} can come from, and which is not called: it is part of Python")
    made: object = source if isinstance(source, type) else _promised(source)
    if not isinstance(made, type) or issubclass(made, makes) or issubclass(makes, made):
        return
    if made is source and isinstance(made.__new__, types.FunctionType):
        return  # it may make anything
    verb = "makes" if made is source else "says that it returns"
    raise ConfigError(f"{where}, which {verb} {made.__module__}.{made.__qualname__}, expected a maker of {expected}")


def _needs_positions(found: Callable[..., Any]) -> bool:
    """Whether a callable can't be called from a configuration anyway, which is the better thing to say."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters)


def _is_standard(found: object) -> bool:
    """Whether something comes with Python: its module does, and isn't one of the user's of the same name."""
    name = str(getattr(found, "__module__", "")).partition(".")[0]
    if name not in sys.stdlib_module_names:
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return True
    below = Path(file).resolve().parts
    standard = Path(sysconfig.get_path("stdlib")).resolve().parts
    return below[: len(standard)] == standard and not {"site-packages", "dist-packages"} & set(below[len(standard) :])


def _promised(found: Callable[..., Any]) -> object:
    """Return the class that a callable's annotation says that it returns; None if it doesn't say, or says several."""
    try:
        promised = typing.get_type_hints(found).get("return")
    except Exception:  # names that only a type checker knows; then it says nothing
        return None
    origin = typing.get_origin(promised) or promised
    return None if origin in (Any, typing.Union, types.UnionType) else origin


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
