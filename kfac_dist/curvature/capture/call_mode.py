"""Function modes that the hooks of a module enter before its call and leave after it.

Torch runs no hook after a call that KeyboardInterrupt or SystemExit ends, and takes no mode off the stack from inside
of it. Such a mode finds that the frame of its call has ended: it does nothing any more, and the next mode takes it off.
"""

from __future__ import annotations

import inspect
from types import FrameType

import torch
from torch.overrides import TorchFunctionMode

from kfac_dist.compat.torch import function_modes, pop_function_mode, push_function_mode


class CallMode(TorchFunctionMode):
    """A mode for one call of a module, which enters it by `begin` in a hook and leaves it by `end` in another."""

    def __init__(self) -> None:
        super().__init__()
        self._frame: FrameType | None = None
        self._over = False

    def begin(self) -> None:
        """Enter the mode; called in a hook that runs before the module's forward."""
        if torch.compiler.is_dynamo_compiling():  # follows modes that enter and exit, and has no frames
            self.__enter__()  # type: ignore[no-untyped-call]
            return
        leave_ended_calls()
        self._frame = _frame_of_call()
        push_function_mode(self)

    def end(self) -> None:
        """Leave the mode."""
        if torch.compiler.is_dynamo_compiling():
            self.undo()
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            return
        self._over, self._frame = True, None
        self.undo()
        leave_ended_calls()

    @property
    def over(self) -> bool:
        """Whether the call has ended: its frame isn't below this one, in the thread whose mode it is."""
        if self._frame is not None and not _runs(self._frame):
            self._over, self._frame = True, None
        return self._over

    def undo(self) -> None:
        """Undo the changes of `begin` besides the stack; may be called twice."""


def leave_ended_calls() -> None:
    """Take the modes of calls that have ended off the stack, down to the first that is still needed."""
    while (modes := function_modes()) and isinstance(modes[-1], CallMode) and modes[-1].over:
        modes[-1].undo()
        pop_function_mode()


def _frame_of_call() -> FrameType | None:
    """Return the frame of the module's call in which this hook runs; None if something else calls hooks."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and frame.f_code is not torch.nn.Module.__call__.__code__:
        frame = frame.f_back
    return frame


def _runs(frame: FrameType) -> bool:
    running = inspect.currentframe()
    while running is not None and running is not frame:
        running = running.f_back
    return running is not None
