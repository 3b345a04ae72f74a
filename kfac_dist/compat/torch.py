"""Private names of torch, each behind a function that says its purpose; nothing else in the package uses one.

A name that some supported release lacks has a second way here. (`torch._foreach_*` are documented, and not private.)
"""

from __future__ import annotations

import copy
import inspect
import operator
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.fx
from torch import Tensor, nn, overrides
from torch.autograd import Variable
from torch.autograd.graph import Node, _get_grad_fn_or_grad_acc, saved_tensors_hooks
from torch.distributed import distributed_c10d as c10d
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils.hooks import RemovableHandle

__all__ = [
    "AnyBatchNorm",
    "TorchDispatchMode",
    "after_backward",
    "backward_pass_id",
    "base_of",
    "break_graph",
    "checkpointed_region",
    "compile_anew",
    "eagerly",
    "forward_hooks",
    "function_modes",
    "gradient_shapes",
    "holds",
    "in_backward",
    "is_batched",
    "load_dcp",
    "of_the_loop",
    "own_parameters",
    "parameters_of",
    "pop_function_mode",
    "push_function_mode",
    "ranks_normalized_over",
    "register_first_hook",
    "running_node",
    "save_dcp",
    "saved_names",
    "schema_of",
    "shorten_unchosen_timeouts",
    "storage_info_type",
    "times_written",
    "tree_leaves",
    "uncompiled",
    "will_be_reached",
    "will_run",
    "with_parameters",
]


# ---- autograd


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, as `torch.utils.checkpoint` asks it."""
    return backward_pass_id() != -1


def backward_pass_id() -> int:
    """Return the number of the backward pass that runs in this thread, -1 if none does."""
    return torch._C._current_graph_task_id()


def after_backward(callback: Callable[[], None]) -> None:
    """Have a function called at the end of the backward pass that runs, as DDP and FSDP have theirs."""
    Variable._execution_engine.queue_callback(callback)


def register_first_hook(tensor: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call a function with the gradient of a tensor, before any other hook on it changes the gradient."""
    handle: RemovableHandle = tensor.register_hook(hook)
    hooks = cast("dict[int, Any]", tensor._backward_hooks)
    others = {number: other for number, other in hooks.items() if number != handle.id}
    first = hooks.pop(handle.id)
    hooks.clear()  # autograd reads it by insertion, whatever an OrderedDict says of its order
    hooks[handle.id] = first
    hooks.update(others)
    return handle


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for many, as under `vmap` and `is_grads_batched=True`, or is one of `torch.func`'s."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def running_node() -> Node | None:
    """Return the node of the graph that the backward pass is about to run, or runs."""
    return torch._C._current_autograd_node()


def will_run(node: Node) -> bool:
    """Return whether the backward pass that runs now runs a node.

    Raises:
        RuntimeError: `torch.autograd.grad` was asked for the gradient of this very leaf.
    """
    return torch._C._will_engine_execute_node(node)


_SAVED: dict[type, tuple[str, ...]] = {}


def saved_names(kind: type) -> tuple[str, ...]:
    """Return the attributes by which nodes of a kind show the tensors that they have saved."""
    if kind not in _SAVED:
        _SAVED[kind] = tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))
    return _SAVED[kind]


def holds(node: Any, name: str) -> bool:
    """Whether a node still has a tensor that it saved; tensors packed by hooks are not unpacked for the answer."""
    try:
        saved = getattr(node, name)
    except RuntimeError:  # custom functions refuse to answer once they are freed
        return False
    parts: Iterable[Any] = saved if isinstance(saved, tuple) else (saved,)
    # Releases without `SavedTensor.data` can't be asked: saved tensors count as still there.
    return any(getattr(p, "data", True) is not None or getattr(p, "unpack_hook", None) is not None for p in parts)


def of_the_loop() -> bool:
    """Whether the current pass is of a training loop, rather than of a tool that examines the model.

    `torch.func` transforms (per-sample gradients, Jacobians), `torch.jit.trace`, `torch.export`, `torch.fx` and fake
    tensors don't run a model on a batch, and none of their gradients reaches a parameter.
    """
    if torch.compiler.is_dynamo_compiling():
        # Not by `is_exporting()`, which is true in compiled code, at least from 2.7 to 2.13.
        return not (_KNOWS_EXPORTS and torch.compiler._is_exporting_flag)
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
        and not (torch.compiler.is_exporting() if _KNOWS_EXPORTS else torch.compiler.is_compiling())
        and not _fx_tracing()
    )


# 2.6 only knows of compiling, and the function that detects tracing by `torch.fx` has changed its name.
_KNOWS_EXPORTS = hasattr(torch.compiler, "is_exporting")
_fx_tracing: Callable[[], bool] = getattr(
    torch.fx._symbolic_trace, "is_fx_symbolic_tracing", torch.fx._symbolic_trace.is_fx_tracing
)


def will_be_reached(parameter: Tensor) -> bool:
    """Whether the backward pass that runs now will bring a parameter a gradient."""
    with torch.enable_grad():
        return torch._C._will_engine_execute_node(_get_grad_fn_or_grad_acc(parameter))


def base_of(tensor: Tensor) -> Tensor | None:
    """Return the tensor whose view this is, None if it is no view."""
    return tensor._base


def times_written(tensors: Iterable[Tensor]) -> int:
    """Return how often tensors have been written into, all together and by any view; the device is not asked."""
    return sum(map(_VERSION, tensors))


_VERSION = operator.attrgetter("_version")


def gradient_shapes(node: Node) -> list[tuple[int, ...]]:
    """Return the shapes of the gradients that a node of the graph takes: those of its operation's outputs."""
    return [tuple(output.shape) for output in cast(Any, node)._input_metadata]


def ranks_normalized_over(norm: nn.SyncBatchNorm) -> int:
    """Return over how many ranks' samples a call of a norm takes its statistics, 1 where it takes none."""
    if not norm.training or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size(norm.process_group)


def checkpointed_region() -> object | None:
    """Return an object that identifies the current region of non-re-entrant activation checkpointing, or None.

    `torch.utils.checkpoint` installs hooks on saved tensors that close over the region's frame: the frame itself in the
    first forward pass, a weak reference to it when the region is computed again. There is no public name for the
    region, and an input that a checkpointed layer held would undo the savings of checkpointing.
    """
    pack = _top_pack_hook()
    if pack is None:
        return None
    pack = inspect.unwrap(pack)
    if pack.__module__ != checkpoint.__name__ or not pack.__closure__:
        return None
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__, strict=True))
    if "frame" in cells:
        return cast(object, cells["frame"].cell_contents)
    return cast(object, cells["target_frame_ref"].cell_contents()) if "target_frame_ref" in cells else None


if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):

    def _top_pack_hook() -> Any | None:
        """Return the hook that packs what operations save now, None if there is none."""
        hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return hooks[0] if hooks else None

else:  # torch 2.6 and 2.7 don't tell which hooks are on top: note it, as they are entered and left

    class _Entered(threading.local):
        """The pairs of hooks that this thread is inside of, the outermost first."""

        def __init__(self) -> None:
            self.hooks: list[saved_tensors_hooks] = []

    _entered = _Entered()
    _enter, _leave = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__

    def _noted_enter(self: saved_tensors_hooks) -> None:
        _enter(self)
        _entered.hooks.append(self)

    def _noted_leave(self: saved_tensors_hooks, *error: object) -> None:
        _leave(self, *error)
        _entered.hooks.pop()

    saved_tensors_hooks.__enter__ = _noted_enter  # type: ignore[method-assign]
    saved_tensors_hooks.__exit__ = _noted_leave  # type: ignore[method-assign]

    def _top_pack_hook() -> Any | None:
        """Return the hook that packs what operations save now, None if there is none."""
        return _entered.hooks[-1].pack_hook if _entered.hooks else None


# ---- modules made by torch.compile


# Determined in advance: this runs inside of code that is being compiled.
_BREAKS_TAKE_REASONS = torch.__version__ >= "2.7"


def compile_anew() -> None:
    """Make torch.compile take new hooks of modules into account.

    Code compiled before the hooks were registered, or for a copy without hooks, would never run them: by default,
    compiled code has no guard on a module's hooks.
    """
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds
        return
    config = torch._dynamo.config
    if hasattr(config, "skip_nnmodule_hook_guards"):
        config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()


def break_graph(reason: str) -> None:
    """End the piece of a model that is being compiled, for a reason that `fullgraph=True` shows."""
    if _BREAKS_TAKE_REASONS:
        torch._dynamo.graph_break(msg=reason)
    else:
        torch._dynamo.graph_break()


def eagerly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that `torch.compile` leaves as it is, where its compiler is mistaken about bases of views."""
    return function if _KNOWS_BASES else cast(Callable[..., Any], torch.compiler.disable(function))


_KNOWS_BASES = torch.__version__ >= "2.13"


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module inside the result of `torch.compile(model)`: the same parameters under shorter names."""
    return cast(nn.Module, model._orig_mod) if type(model).__name__ == "OptimizedModule" else model


# ---- function modes


def function_modes() -> list[Any]:
    """Return this thread's function modes, the innermost last."""
    return list(overrides._get_current_function_mode_stack())


def push_function_mode(mode: overrides.TorchFunctionMode) -> None:
    """Put a function mode on this thread's stack."""
    overrides._push_mode(mode)


def pop_function_mode() -> None:
    """Take the innermost function mode off this thread's stack."""
    overrides._pop_mode()


# ---- process groups


def shorten_unchosen_timeouts() -> None:
    """Give process groups that were made without a timeout that of the default group.

    Torch gives such groups, as DeepSpeed's and a device mesh's are, its own default of 10 or 30 minutes, and not the
    default group's: a rank that stands still would keep the others waiting for as long.
    """
    if not dist.is_initialized():
        return
    unchosen = {c10d.default_pg_timeout, c10d.default_pg_nccl_timeout}
    default = c10d.GroupMember.WORLD
    chosen = next(iter(_timeouts(default)), None)
    if chosen is None:
        return
    for group in list(c10d._world.pg_map):
        if group is not default and _timeouts(group) & unchosen:
            c10d._set_pg_timeout(chosen, group)


def _timeouts(group: Any) -> set[timedelta]:
    """Return the timeouts of a group's backends."""
    backends = [group._get_backend(device) for device in group._device_types]
    return {backend.options._timeout for backend in backends if hasattr(backend, "options")}


# ---- modules, operations, checkpoints


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None] | None:
    """Return a module's own parameters; None if it has buffers or modules of its own beside them."""
    return None if module._buffers or module._modules else dict(module._parameters)


def with_parameters(
    module: nn.Module, parameters: Mapping[str, nn.Parameter | None], *, own_buffers: bool = False
) -> nn.Module:
    """Return a shallow copy of a module that has these parameters instead of its own, and perhaps copies of buffers."""
    changed = copy.copy(module)
    changed._parameters = dict(parameters)
    if own_buffers:
        changed._buffers = {name: None if value is None else value.clone() for name, value in module._buffers.items()}
    return changed


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters by name, also those that it registered as None."""
    return dict(module._parameters)


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the hooks that a module runs before and after its forward."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def schema_of(operation: Any) -> Any:
    """Return the schema, name and arguments, of an operation that a `TorchDispatchMode` sees."""
    return operation._schema


def storage_info_type() -> type[Any]:
    """Return the class by which a checkpoint's table of contents says where a value lies."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo


def save_dcp(state: dict[str, Any], *, no_dist: bool, process_group: Any, **options: Any) -> None:
    """Write a checkpoint by `torch.distributed.checkpoint`; `no_dist`: for this process alone."""
    import torch.distributed.checkpoint as dcp

    if _DCP_CAN_BE_ALONE:
        dcp.save(state, process_group=process_group, no_dist=no_dist, **options)
    else:
        dcp.save_state_dict(state, process_group=process_group, no_dist=no_dist, **options)


def load_dcp(state: dict[str, Any], **options: Any) -> None:
    """Read a checkpoint by `torch.distributed.checkpoint`, each process for itself."""
    import torch.distributed.checkpoint as dcp

    if _DCP_CAN_BE_ALONE:
        dcp.load(state, no_dist=True, **options)
    else:
        dcp.load_state_dict(state, no_dist=True, **options)


# In 2.6 only the functions that `save` and `load` have replaced accept that a process is alone.
_DCP_CAN_BE_ALONE = torch.__version__ >= "2.7"
if not _DCP_CAN_BE_ALONE:
    # Not around the call: filters belong to all threads, and checkpoints are written in one of their own.
    for _name in ("save_state_dict", "load_state_dict"):
        warnings.filterwarnings("ignore", message=f"`{_name}` is deprecated", category=FutureWarning)
