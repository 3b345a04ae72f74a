"""A call that Ctrl-C ends leaves nothing behind that changes torch's functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kfac_dist.compat.torch import function_modes
from kfac_dist.curvature.capture.call_mode import CallMode, leave_ended_calls
from kfac_dist.preconditioner.kfac import KFAC


class Interrupted(nn.Module):
    """Raises an error in its first forward pass."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error: BaseException | None = error

    def forward(self, inputs: Tensor) -> Tensor:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return inputs


class Attends(nn.Module):
    """Attention whose input comes by a hook, so that the error is raised during its call."""

    def __init__(self, interrupted: Interrupted) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.interrupted = interrupted

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, _ = self.attention(inputs, inputs, inputs, need_weights=False)
        return self.head(outputs.mean(1))


def _model(kind: str, error: BaseException) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    interrupted = Interrupted(error)
    if kind == "layers":
        return nn.Sequential(nn.Linear(4, 5), interrupted, nn.Linear(5, 3)), torch.randn(8, 4)
    return Attends(interrupted), torch.randn(8, 3, 4)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), ValueError("x")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("kind", ["layers", "attention"])
def test_an_interrupted_pass_changes_nothing_after_it(kind: str, error: BaseException) -> None:
    own, inputs = _model(kind, error)
    plain, _ = _model(kind, error)
    kfac, wanted = (KFAC(model, {"update": {"kl_clip": None}}) for model in (own, plain))
    plain_linear = F.linear
    if isinstance(own, Attends):  # after K-FAC's own hook, within the call
        interrupted = own.interrupted
        own.attention.register_forward_pre_hook(lambda _, args: (interrupted(args[0]), *args[1:]))
    with pytest.raises(type(error)):
        own(inputs)
    assert F.linear is plain_linear
    for mode in function_modes():
        assert isinstance(mode, CallMode)
        assert mode.over
    for module in plain.modules():
        if isinstance(module, Interrupted):
            module.error = None
    targets = torch.randint(3, (8,))
    for model, each in ((own, kfac), (plain, wanted)):
        F.cross_entropy(model(inputs), targets).backward()
        each.step()
    assert function_modes() == []
    assert kfac.coverage.mismatched == {}
    for parameter, other in zip(own.parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(parameter.grad, other.grad)
    kfac.remove()
    wanted.remove()


class _Passing(TorchFunctionMode):
    """Runs functions as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _OfOneCall(_Passing, CallMode):
    """The same, for one call."""


def test_modes_of_ended_calls_leave_the_top_of_the_stack_alone() -> None:
    mode = _OfOneCall()

    def begins(*_: object) -> None:
        mode.begin()

    layer = nn.Linear(2, 2)
    layer.register_forward_pre_hook(begins)
    layer(torch.zeros(1, 2))  # a call that ended without a hook after it
    assert mode.over
    another = _Passing()
    with another:
        leave_ended_calls()
        assert function_modes() == [mode, another]
    leave_ended_calls()
    assert function_modes() == []


def test_a_mode_is_not_over_while_its_call_runs() -> None:
    seen = []
    mode = _OfOneCall()
    layer = nn.Sequential(nn.Linear(2, 2))
    layer.register_forward_pre_hook(lambda *_: mode.begin())
    layer[0].register_forward_hook(lambda *_: seen.append((mode.over, function_modes() == [mode])))
    layer.register_forward_hook(lambda *_: mode.end())
    layer(torch.zeros(1, 2))
    assert seen == [(False, True)]
    assert mode.over
    assert function_modes() == []
