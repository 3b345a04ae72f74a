"""One forward and backward pass of a micro-batch, and messages for its failures.

The model and the data are the user's, so that torch's own messages ("mat1 and mat2 shapes cannot be multiplied") have
to be completed: by the step, by what the model was given, and by the line of the model that failed.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from kfac_dist.distributed.communicators.lost import first_line, is_of_lost_ranks, lost_ranks
from kfac_dist.errors import DataError, KFACError, ModelError
from kfac_dist.inputs import Inputs, call, tensors
from kfac_dist.tasks import Loss

# Exceptions of models for data that they can't take; any other is a bug and keeps its traceback.
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError)
_TORCH = str(Path(torch.__file__).parent)


def forward(model: nn.Module, inputs: Inputs) -> Tensor:
    """Call the model.

    Raises:
        ModelError: It returns something else than a tensor.
    """
    outputs = call(model, inputs)
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"the model returns {type(outputs).__name__}; a run's model returns one tensor, the outputs that the loss "
            "takes: return that one"
        )
    return outputs


def loss_total(loss: Loss, outputs: Tensor, targets: Tensor, module: nn.Module) -> Tensor:
    """Return the sum of the loss's terms, in float32 for any precision of the model.

    Raises:
        ModelError: It doesn't depend on any trained parameter.
    """
    total = loss.total(full_precision(outputs), full_precision(targets))
    if not total.requires_grad:
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        raise ModelError(
            "the model has no trained parameter: requires_grad is false everywhere"
            if frozen
            else "the loss doesn't depend on any trained parameter: does the model detach its outputs?"
        )
    return total


def full_precision(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 if it has less."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@contextmanager
def explained(where: str, module: nn.Module, inputs: Inputs, targets: Tensor) -> Iterator[None]:
    """Turn torch's refusal of a micro-batch into one message that names the step, the shapes and the line.

    Args:
        where: The micro-batch, such as `step 3`.
        module: The bare model.
        inputs: The model's inputs.
        targets: The loss's targets.

    Raises:
        DataError: The model or the loss refused the tensors.
        CollectiveError: Another rank has left.
    """
    try:
        yield
    except KFACError as error:
        raise type(error)(f"{where}: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as error:
        reason = first_line(error)
        if is_of_lost_ranks(error):
            raise lost_ranks(where, error) from error
        raise DataError(
            f"{where}: model or loss refuse the data: {reason}{user_line(error)}; {_inputs(inputs)}, "
            f"targets {_tensor(targets)}{_first_weight(module)}"
        ) from error


def unused_parameters(module: nn.Module) -> list[str]:
    """Return the trained parameters that the last backward pass gave no gradient."""
    return [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


def refuse_unused(where: str, names: list[str]) -> None:
    """Refuse, under DDP, a model whose loss leaves parameters out: the other ranks would wait for their gradients.

    Raises:
        ModelError: There are such parameters.
    """
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ModelError(
            f"{where}: the loss doesn't depend on {', '.join(names[:3])}{more}, whose gradients DDP waits for: set "
            "engine.find_unused_parameters: true, or freeze them with requires_grad_(False)"
        )


def user_line(error: Exception) -> str:
    """Return ` (file:line)`, the innermost line of an error outside of torch and of this package, if there is one."""
    own = str(Path(__file__).parents[1])
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_TORCH, own, "<"))
    ]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _inputs(inputs: Inputs) -> str:
    if isinstance(inputs, Tensor):
        return f"inputs {_tensor(inputs)}"
    return ", ".join(f"{name} {_tensor(tensor)}" for name, tensor in tensors(inputs).items())


def _tensor(tensor: Tensor) -> str:
    text = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    # A failed kernel has made reading the device impossible; the host's values can be reported.
    if tensor.device.type == "cpu" and tensor.numel() and not tensor.is_complex():
        text += f" from {tensor.min().item():.4g} to {tensor.max().item():.4g}"
    return text


def _first_weight(module: nn.Module) -> str:
    first = next(iter(module.named_parameters()), None)
    if first is None:
        return ""
    name, weight = first
    return f"; the model's first parameter is {name}, {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
