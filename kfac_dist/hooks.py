"""The one kind of hook that this package puts on other people's modules: a copy of the module doesn't have it.

`copy.deepcopy(model)`, `AveragedModel` and `torch.save(model)` work at any time, and make the plain model: its passes
are its own, and its pickle is read where this package isn't installed.

    module ── _forward_hooks ── _Hook            called as ever
       └───── __reduce_ex__  ── _WithoutHooks    for pickle and copy: the module's state without any _Hook

A class that copies its `__dict__` by itself (a parametrised module) gets a function in the hook's place that does
nothing.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

from torch import nn

from kfac_dist.errors import ModelError

_REDUCE = "__reduce_ex__"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Torch's attributes beside them, with the same keys.
_FLAGS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
# Takes any arguments and returns None, and is found wherever a pickle is read.
_NOTHING = nullcontext().__exit__


class Handle(Protocol):
    """A registered hook or callback; `remove` detaches it."""

    def remove(self) -> None:
        """Detach it."""


class HookHandle:
    """Takes one hook off its module; harmless when repeated.

    Args:
        module: The module.
        remove: Takes the hook out of the module's own lists.
    """

    def __init__(self, module: nn.Module, remove: Callable[[], None]) -> None:
        self._module = weakref.ref(module)
        self._remove = remove

    def remove(self) -> None:
        """Take the hook off."""
        self._remove()
        module = self._module()
        if module is not None and not any(_is_own(hook) for name in _HOOKS for hook in getattr(module, name).values()):
            vars(module).pop(_REDUCE, None)


def before_forward(
    module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False, prepend: bool = False
) -> HookHandle:
    """Register a hook as `Module.register_forward_pre_hook` does, but for this module alone and no copy of it.

    Args:
        module: The module.
        hook: Called with the module, its positional arguments and, `with_kwargs`, its keyword arguments.
        with_kwargs: Whether the hook takes keyword arguments.
        prepend: Whether it comes before the hooks that are there.

    Returns:
        A registered hook; `remove` detaches it.
    """
    _prepare(module)
    handle = module.register_forward_pre_hook(_Hook(hook), with_kwargs=with_kwargs, prepend=prepend)
    return HookHandle(module, handle.remove)


def after_forward(
    module: nn.Module, hook: Callable[..., Any], *, with_kwargs: bool = False, always_call: bool = False
) -> HookHandle:
    """Register a hook as `Module.register_forward_hook` does, but for this module alone and no copy of it.

    Args:
        module: The module.
        hook: Called with the module, its positional arguments, its keyword arguments (`with_kwargs`) and its output.
        with_kwargs: Whether the hook takes keyword arguments.
        always_call: Whether it is called after an exception, too.

    Returns:
        A registered hook; `remove` detaches it.
    """
    _prepare(module)
    handle = module.register_forward_hook(_Hook(hook), with_kwargs=with_kwargs, always_call=always_call)
    return HookHandle(module, handle.remove)


class _Hook:
    """Calls a function; a copied or unpickled one does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__name__ = "kfac_dist_hook"

    @property
    def __globals__(self) -> dict[str, Any]:
        """Refuse `torch.jit.script`, which compiles hooks, and asks for this first."""
        raise ModelError(
            "torch.jit.script can't compile the hooks of K-FAC: script a copy, torch.jit.script(copy.deepcopy(model)), "
            "or call kfac.remove() first"
        )

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _NOTHING

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class _WithoutHooks:
    """A module's own `__reduce_ex__`, for as long as it has hooks of this package."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, protocol: int) -> Any:
        module = self._module()
        assert module is not None  # whose attribute this is
        reduced = type(module).__reduce_ex__(module, protocol)
        return tuple(_plain(part) for part in reduced) if isinstance(reduced, tuple) else reduced

    def __deepcopy__(self, memo: dict[int, Any]) -> _WithoutHooks:
        module = self._module()
        assert module is not None
        return _WithoutHooks(memo.get(id(module), module))


def _prepare(module: nn.Module) -> None:
    """Make copies leave hooks out, and drop hooks that a copy has nevertheless."""
    for name in _HOOKS:
        hooks = getattr(module, name)
        for key in [key for key, hook in hooks.items() if _is_inert(hook)]:
            for flags in (hooks, *(getattr(module, other) for other in _FLAGS if other.startswith(name))):
                flags.pop(key, None)
    vars(module)[_REDUCE] = _WithoutHooks(module)


def _plain(part: object) -> object:
    """Return a part of a module's reduced value without hooks, wherever its `__dict__` is in it."""
    if type(part) is tuple:
        return tuple(_plain(inner) for inner in part)
    if not isinstance(part, dict) or not all(name in part for name in _HOOKS):
        return part
    own = {key for name in _HOOKS for key, hook in part[name].items() if _is_own(hook)}
    without = {name: _without(part[name], own) for name in (*_HOOKS, *_FLAGS) if name in part}
    return {key: value for key, value in (part | without).items() if key != _REDUCE}


def _without(entries: Mapping[int, Any], keys: set[int]) -> OrderedDict[int, Any]:
    return OrderedDict((key, value) for key, value in entries.items() if key not in keys)


def _is_own(hook: object) -> bool:
    return isinstance(hook, _Hook)


def _is_inert(hook: object) -> bool:
    return isinstance(getattr(hook, "__self__", None), nullcontext)
