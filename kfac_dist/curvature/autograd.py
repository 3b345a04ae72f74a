"""Whose view an output is: the tensor whose gradient stands for it, however it is overwritten later."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kfac_dist.compat.torch import base_of
from kfac_dist.compat.torch import checkpointed_region as checkpointed_region
from kfac_dist.compat.torch import compile_anew as compile_anew
from kfac_dist.compat.torch import in_backward as in_backward
from kfac_dist.compat.torch import of_the_loop as of_the_loop


def below_view(
    output: Tensor, arrange: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """Return the tensor to ask for its gradient: of an output that is another tensor's view, that other tensor.

    Overwriting a view (an in-place activation behind a linear layer on tokens) takes the view's own node out of the
    graph; the node of the tensor below stays, and its gradient is that of the values before they were overwritten.
    """
    base = base_of(output)
    if base is None or not base.requires_grad or base.is_leaf:
        return output, arrange
    if base.numel() != output.numel() or not base.is_contiguous():
        return output, arrange
    shape, stride, offset = output.shape, output.stride(), output.storage_offset() - base.storage_offset()

    def view(grad: Tensor) -> Tensor:
        own = grad.contiguous().as_strided(shape, stride, offset)
        return own if arrange is None else arrange(own)

    return base, view
