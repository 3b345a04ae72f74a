"""Gradients at labels drawn from the model, for parameters without a block: the makings of their diagonal Fisher.

Each micro-batch's labels go back from the model's outputs to these parameters alone, without the loss's divisor; the
sums over samples are added up over micro-batches here, and over ranks by the diagonal Fisher. Labels belong to global
samples, so that the sum doesn't depend on which rank holds which.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SampledLabelGradients:
    """One step's sums of gradients.

    Args:
        module: The model, which holds its parameters whole.
        names: The parameters.
        device: Their device.
        dtype: Precision of the sums.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        parameters = dict(module.named_parameters())
        self._parameters = [parameters[name] for name in names]
        # The sums, and the number of terms that they run over, for one all-reduce.
        self.total = torch.zeros(sum(p.numel() for p in self._parameters) + 1, device=device, dtype=dtype)

    def reset(self) -> None:
        """Begin a step."""
        self.total.zero_()

    @torch.no_grad()
    def add(self, outputs: Tensor, labels: Tensor, terms: float) -> None:
        """Send a micro-batch's labels back.

        Args:
            outputs: The model's outputs, still attached to their graph.
            labels: Gradients of the terms' negative log-likelihoods at the outputs, for drawn labels.
            terms: Their number.
        """
        gradients = torch.autograd.grad(outputs, self._parameters, labels, retain_graph=True, allow_unused=True)
        views = self.total[:-1].split([p.numel() for p in self._parameters])
        for view, gradient in zip(views, gradients, strict=True):
            if gradient is not None:
                view.add_((gradient.to_dense() if gradient.is_sparse else gradient).flatten())
        self.total[-1] += terms
