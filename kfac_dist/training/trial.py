"""A pass over the first samples, before anything is distributed: do model, loss and data fit each other?

Errors that would otherwise occur in the first step, on some ranks while others wait, occur here on all. The pass
leaves no trace in the model's buffers, its gradients or the random generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfac_dist.distributed.communicators.lost import first_line
from kfac_dist.errors import CollectiveError, DataError, ModelError
from kfac_dist.tasks import Loss
from kfac_dist.training.data.batches import InMemorySource, Source
from kfac_dist.training.passes import explained, forward, loss_total, unused_parameters, user_line

# Enough for layers that normalise over the batch.
SAMPLES = 2
WHERE = "the first samples"


@dataclass(frozen=True)
class Trial:
    """The result of the trial pass.

    Attributes:
        outputs: The model's outputs, detached.
        unused: Trained parameters that the loss doesn't depend on.
    """

    outputs: Tensor
    unused: list[str]


def try_out(model: nn.Module, loss: Loss, data: Source, test: Source) -> Trial:
    """Pass the first samples through model and loss, forward and back, and those of the test data forward.

    Args:
        model: The model on its device, not yet wrapped.
        loss: The loss.
        data: The training data.
        test: The test data, at which a run would otherwise look when it is over.

    Raises:
        ModelError: Nothing is trained, or the model returns no tensor.
        DataError: The model or the loss refuses the data.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            "the model has no trained parameter: "
            + ("requires_grad is false everywhere" if any(True for _ in model.parameters()) else "it has none at all")
        )
    [(inputs, targets)] = data.fetch([torch.arange(min(SAMPLES, len(data)))], seed=0)
    with _without_trace(model):
        with explained(WHERE, model, inputs, targets):
            outputs = forward(model, inputs)
            loss_total(loss, outputs, targets, model).backward()
        unused = unused_parameters(model)
        _try_evaluation(model, loss, test)
    return Trial(outputs.detach(), unused)


def try_two_passes(model: nn.Module, loss: Loss, data: Source, prepare: Callable[[nn.Module], object]) -> str | None:
    """Say why a second pass through model and loss, forward and back, isn't the first one's like; None if it is.

    A model may keep a pass's results, whose graph the second backward pass then finds freed, or refuse
    to be differentiated at all outside of training mode.

    Args:
        model: The model on its device.
        loss: The loss.
        data: The training data.
        prepare: Sets the mode in which it is tried; the model is left in the mode in which it was.
    """
    [(inputs, targets)] = data.fetch([torch.arange(min(SAMPLES, len(data)))], seed=0)
    training, reached = model.training, list[list[str]]()
    with _without_trace(model):
        try:
            prepare(model)
            for _ in range(2):
                loss_total(loss, forward(model, inputs), targets, model).backward()
                reached.append(unused_parameters(model))
                model.zero_grad()
        except (CollectiveError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's code, which may say no in any way
            return f"{type(error).__name__}: {first_line(error)}{user_line(error)}"
        finally:
            model.train(training)
    if lost := sorted(set(reached[1]) - set(reached[0])):
        return f"the second of two passes brings no gradient to {', '.join(lost[:3])}{' and others' * (len(lost) > 3)}"
    return None


@torch.no_grad()
def _try_evaluation(model: nn.Module, loss: Loss, test: Source) -> None:
    [(inputs, targets)] = test.fetch([torch.arange(min(SAMPLES, len(test)))], seed=0)
    training = model.training
    model.eval()
    with explained("the first test samples", model, inputs, targets):
        loss.metric_sum(outputs := forward(model, inputs), targets)
        loss.total(outputs, targets)
    model.train(training)


def check_targets(loss: Loss, data: Source, outputs: Tensor) -> None:
    """Refuse targets that are no values of the loss's likelihood, if the data is in memory; waits for the device.

    Args:
        loss: The loss.
        data: The training data.
        outputs: Outputs of the model for any samples.

    Raises:
        DataError: Names the first sample.
    """
    found = outside_targets(loss, data.targets, outputs) if isinstance(data, InMemorySource) else []
    if found:
        sample, value = found[0]
        raise DataError(
            f"sample {sample} of the training data has the target {value}; "
            f"expected {loss.allowed.format(last=outputs.shape[-1] - 1)}"
        )


def outside_targets(loss: Loss, targets: Tensor, outputs: Tensor) -> list[tuple[int, str]]:
    """Return the samples of `[samples, ...]` with a target that the loss doesn't know, each with the first of them."""
    outside = loss.outside(targets, outputs).reshape(len(targets), -1)
    rows = targets.reshape(len(targets), -1)
    samples = outside.any(dim=1).nonzero().flatten().tolist()
    return [(sample, f"{rows[sample][outside[sample]][0].item():g}") for sample in samples]


@contextmanager
def _without_trace(model: nn.Module) -> Iterator[None]:
    kept = [buffer.clone() for buffer in model.buffers()]
    devices = [p.device for p in model.parameters() if p.is_cuda][:1]
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(model.buffers(), kept, strict=True):
                    buffer.copy_(value)
            for parameter in model.parameters():
                parameter.grad = None
