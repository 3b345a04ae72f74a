"""Losses of the shipped runs: negative log-likelihoods, averaged over their terms.

A loss gives the *sum* over the terms of a micro-batch and, apart from it, the number of terms, because the two meet
only when the whole step is known: the mean runs over all ranks and micro-batches. Inside one sample the sum runs over
its features, so that a loss is `−log p(target | output)` up to a constant, as the Fisher matrix requires
(`kfac_dist.config.schema.LossName` knows p).

Shapes: outputs `[batch, ..., classes]` with targets `[batch, ...]` for classes; equal shapes `[batch, ...]` else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kfac_dist.config.schema import LossConfig, LossName
from kfac_dist.errors import DataError
from kfac_dist.tasks.game import discriminator_total


class Loss(ABC):
    """A negative log-likelihood, summed over terms, with the figure by which people judge its task.

    Attributes:
        metric: Name of the task's figure: `metric_sum` over the number of terms.
        evaluated: Name of the loss in evaluations.
        allowed: Allowed targets, in words; `{last}` is the number of classes less one.
        counts_on_device: Whether only the targets' values tell the number of terms, so that ranks must add them up.
    """

    metric: ClassVar[str]
    evaluated: ClassVar[str] = "loss"
    allowed: ClassVar[str] = "any number"
    counts_on_device: ClassVar[bool] = False

    @abstractmethod
    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the terms, a scalar."""

    @abstractmethod
    def metric_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over terms of the task's figure, a scalar."""

    def count(self, targets: Tensor) -> Tensor:
        """Return the number of terms, a scalar on the targets' device."""
        return torch.full((), targets.shape[0], device=targets.device)

    def labels(self, targets: Tensor) -> Tensor:
        """Return the classes that targets are, in their shape; below 0 where a position has none."""
        return targets

    def outside(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """Return where targets are no values that the likelihood knows, in the targets' shape.

        Args:
            targets: Any number of samples.
            outputs: Outputs of the model for any samples: their last dimension tells the number of classes.
        """
        return torch.zeros_like(targets, dtype=torch.bool)


class CrossEntropy(Loss):
    """Softmax cross-entropy with one label a sample."""

    metric = "accuracy"
    allowed = "a label from 0 to {last}"

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `−Σ log softmax(outputs)[target]`.

        Raises:
            DataError: The shapes don't fit, or the targets are no labels.
        """
        _check_labels("cross_entropy", outputs, targets, positions=False)
        return functional.cross_entropy(outputs, targets, reduction="sum")

    def outside(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """See `Loss.outside`."""
        return (targets < 0) | (targets >= outputs.shape[-1])

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the number of samples whose largest logit is the label's."""
        return (outputs.argmax(dim=-1) == targets).sum()


class TokenCrossEntropy(Loss):
    """Softmax cross-entropy with a label at every position; positions labelled `ignore_index` are not terms."""

    metric = "bits per token"
    counts_on_device = True
    allowed = "a label from 0 to {last}, or loss.ignore_index"

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `−Σ log softmax(outputs)[target]` over the valid positions.

        Raises:
            DataError: The shapes don't fit, or the targets are no labels.
        """
        _check_labels("token_cross_entropy", outputs, targets, positions=True)
        return functional.cross_entropy(
            outputs.flatten(0, -2), targets.flatten(), ignore_index=self.ignore_index, reduction="sum"
        )

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss in bits."""
        return self.total(outputs, targets) / math.log(2)

    def count(self, targets: Tensor) -> Tensor:
        """Return the number of valid positions, on the device."""
        return (targets != self.ignore_index).sum()

    def labels(self, targets: Tensor) -> Tensor:
        """See `Loss.labels`; `ignore_index` may be the number of a class."""
        return targets.masked_fill(targets == self.ignore_index, -1)

    def outside(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """See `Loss.outside`."""
        return ((targets < 0) | (targets >= outputs.shape[-1])) & (targets != self.ignore_index)


class SigmoidCrossEntropy(Loss):
    """Binary cross-entropy on logits, summed over a sample's pixels."""

    metric = "squared error"
    allowed = "a number from 0 to 1"

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `−Σ [x log σ(s) + (1 − x) log(1 − σ(s))]`.

        Raises:
            DataError: The shapes differ.
        """
        if outputs.shape != targets.shape:
            raise DataError(
                f"loss sigmoid_cross_entropy: the model's outputs have shape {tuple(outputs.shape)}, "
                f"the targets {tuple(targets.shape)}; an autoencoder's data needs `target: input`"
            )
        return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `Σ (x − σ(s))²`, the error that Hinton & Salakhutdinov (2006) report."""
        return (targets - torch.sigmoid(outputs)).square().sum()

    def outside(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """See `Loss.outside`."""
        return (targets < 0) | (targets > 1)


class SquaredError(Loss):
    """Half the squared error, summed over a sample's features: a Gaussian of unit variance."""

    metric = "squared error"

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `½ Σ (outputs − targets)²`.

        Raises:
            DataError: The shapes differ (the difference of broadcast tensors would be no error of anything).
        """
        if outputs.shape != targets.shape:
            raise DataError(
                f"loss mse: the model's outputs have shape {tuple(outputs.shape)}, the targets {tuple(targets.shape)}"
            )
        return functional.mse_loss(outputs, targets, reduction="sum") / 2

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `Σ (outputs − targets)²`."""
        return (outputs - targets).square().sum()


class Adversarial(Loss):
    """A discriminator's loss over pairs of logits, of a real sample and a made one; see `tasks.game`.

    Targets play no part in it. A game is evaluated by its samples, not by this loss: `tasks.judge`.
    """

    metric = "classifier score"
    evaluated = "Fréchet distance"

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `−Σ log σ(s_real) + log σ(−s_made)`.

        Raises:
            DataError: The outputs are no pairs.
        """
        if outputs.ndim != 2 or outputs.shape[1] != 2:
            raise DataError(
                f"loss adversarial: the model's outputs have shape {tuple(outputs.shape)}, expected the "
                "discriminator's logits of pairs, [batch, 2]"
            )
        return discriminator_total(outputs)

    def metric_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return for how many pairs the discriminator finds the real sample the likelier one."""
        return (outputs[:, 0] > outputs[:, 1]).sum()


def build_loss(config: LossConfig) -> Loss:
    """Return the loss that a configuration names."""
    match config.name:
        case LossName.CROSS_ENTROPY:
            return CrossEntropy()
        case LossName.TOKEN_CROSS_ENTROPY:
            return TokenCrossEntropy(config.ignore_index)
        case LossName.SIGMOID_CROSS_ENTROPY:
            return SigmoidCrossEntropy()
        case LossName.MSE:
            return SquaredError()
        case LossName.ADVERSARIAL:
            return Adversarial()


def _check_labels(name: str, outputs: Tensor, targets: Tensor, *, positions: bool) -> None:
    """Refuse outputs and targets that torch would refuse in other words, or take for something else."""
    if targets.dtype not in (torch.int64, torch.uint8):
        raise DataError(f"loss {name}: the targets are {targets.dtype}, expected labels in torch.int64")
    shaped = outputs.ndim >= 2 if positions else outputs.ndim == 2
    if not shaped or outputs.shape[:-1].numel() != targets.numel():
        labels = "batch, positions" if positions else "batch"
        raise DataError(
            f"loss {name}: the model's outputs have shape {tuple(outputs.shape)}, the targets {tuple(targets.shape)}; "
            f"expected outputs [{labels}, classes] and targets [{labels}]"
        )
