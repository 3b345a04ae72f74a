"""The rows that a sample adds to each block's factors, counted in a forward pass without memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kfac_dist.config.schema import Sharing, Target
from kfac_dist.curvature.blocks import Block
from kfac_dist.curvature.factors import Side
from kfac_dist.errors import KFACError
from kfac_dist.hooks import after_forward
from kfac_dist.inputs import Inputs, call, each, is_inputs, tensors
from kfac_dist.tasks import build_data

# BatchNorm refuses a batch of one.
_SAMPLES = 2
_META = torch.device("meta")


def count_rows(model: nn.Module, blocks: Sequence[Block], data: Target) -> tuple[dict[str, float], str]:
    """Return the rows of a sample by block, and why they aren't known if they aren't.

    Args:
        model: The model, on the device `meta`.
        blocks: Its blocks.
        data: The data, of which the first sample's shape counts.
    """
    try:
        inputs = sample_shapes(data)
    except (KFACError, OSError) as error:
        return {}, f"the data can't be read here ({' '.join(str(error).split())})"
    try:
        return rows_of(model, blocks, inputs), ""
    except Exception as error:  # whatever the user's model raises without values to look at
        return {}, f"the model can't be called without memory ({type(error).__name__}: {' '.join(str(error).split())})"


def rows_of(model: nn.Module, blocks: Sequence[Block], inputs: Inputs) -> dict[str, float]:
    """Return the rows of one sample by block, as a forward pass over a batch shows them; nothing is computed on `meta`.

    Blocks whose modules the model doesn't call are left out.
    """
    seen: defaultdict[str, float] = defaultdict(float)
    samples = len(next(iter(tensors(inputs).values())))
    handles = [
        after_forward(module, lambda _m, _a, output, block=block: _count(block, output, samples, seen))
        for block in blocks
        for module in block.modules
    ]
    try:
        with torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: rows / samples for name, rows in seen.items()}


def sample_shapes(data: Target) -> Inputs:
    """Return inputs of a batch without memory.

    Raises:
        KFACError: The data can't be built.
    """
    if "context" in data.args and isinstance(data.args["context"], int):  # tokens, which needn't be read
        return torch.empty(_SAMPLES, data.args["context"], dtype=torch.long, device=_META)
    dataset = build_data(data).train
    # Of a TensorDataset's tensors the last is the target, of another item's two parts the second.
    several = isinstance(dataset, TensorDataset) and len(dataset.tensors) > 2
    inputs: Any = tuple(dataset[0][:-1]) if several else dataset[0][0]
    if isinstance(inputs, list):
        inputs = tuple(inputs)
    if not is_inputs(inputs) or isinstance(inputs, list):
        inputs = torch.as_tensor(inputs)
    return each(lambda tensor: torch.empty(_SAMPLES, *tensor.shape, dtype=tensor.dtype, device=_META), inputs)


def _count(block: Block, output: Any, samples: int, seen: defaultdict[str, float]) -> None:
    tensor = output[0] if isinstance(output, tuple) else output
    if not isinstance(tensor, Tensor):
        return
    if block.sharing is Sharing.REDUCE and all(factor.side is not Side.F for factor in block.factors):
        seen[block.name] += samples
        return
    batch, d_out, _ = block.matrix_shape
    seen[block.name] += tensor.numel() / math.prod((batch, d_out))
