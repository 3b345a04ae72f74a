"""What hooks have to ask autograd: in which pass and checkpointed region they run, and whose view an output is."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import checkpoint


def below_view(
    output: Tensor, arrange: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """Return the tensor to ask for its gradient: of an output that is another tensor's view, that other tensor.

    Overwriting a view (an in-place activation behind a linear layer on tokens) takes the view's own node out of the
    graph; the node of the tensor below stays, and its gradient is that of the values before they were overwritten.
    """
    base = output._base
    if base is None or not base.requires_grad or base.is_leaf:
        return output, arrange
    if base.numel() != output.numel() or not base.is_contiguous():
        return output, arrange
    shape, stride, offset = output.shape, output.stride(), output.storage_offset() - base.storage_offset()

    def view(grad: Tensor) -> Tensor:
        own = grad.contiguous().as_strided(shape, stride, offset)
        return own if arrange is None else arrange(own)

    return base, view


def compile_anew() -> None:
    """Have torch.compile see that modules have hooks now.

    What was compiled before the hooks were there would never run them, nor would what was compiled for a copy without
    hooks: by default, compiled code is not asked whether a module had some.
    """
    if "torch._dynamo" not in sys.modules:
        return
    config = torch._dynamo.config
    if hasattr(config, "skip_nnmodule_hook_guards"):
        config.skip_nnmodule_hook_guards = False
    torch.compiler.reset()


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, as `torch.utils.checkpoint` asks it."""
    return torch._C._current_graph_task_id() != -1


def checkpointed_region() -> object | None:
    """Return what identifies the region of non-re-entrant activation checkpointing that runs now, or None.

    `torch.utils.checkpoint` installs hooks on saved tensors that close over the region's frame: the frame itself in the
    first forward pass, a weak reference to it when the region is computed again. Nothing public tells the region, and
    an input that a checkpointed layer held would undo what checkpointing saves.
    """
    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if not hooks:
        return None
    pack = inspect.unwrap(hooks[0])
    if pack.__module__ != checkpoint.__name__ or not pack.__closure__:
        return None
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__, strict=True))
    if "frame" in cells:
        return cast(object, cells["frame"].cell_contents)
    return cast(object, cells["target_frame_ref"].cell_contents()) if "target_frame_ref" in cells else None
