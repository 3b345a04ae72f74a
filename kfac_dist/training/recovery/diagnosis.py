"""Diagnosis of a loss that isn't finite: made afterwards, so that ordinary steps wait for nothing.

The first such step is known from the logged window. Its samples follow from the plan of the data, are fetched again,
and tell whether the data or the optimization is to blame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.errors import DataError
from kfac_dist.inputs import tensors
from kfac_dist.training.data.batches import Stream
from kfac_dist.training.data.sampler import Position, micro_batches


def blame_data(stream: Stream, position: Position, step: int, communicator: Communicator) -> None:
    """Raise if the samples of a step hold a value that isn't finite; collective.

    Args:
        stream: This rank's data.
        position: First sample of the step's batch.
        step: Its number, from 1.
        communicator: The ranks.

    Raises:
        DataError: On every rank: the step, and the samples by their index in the training data.
    """
    indices = next(iter(stream.sampler.epoch(position))).indices
    parts = [indices[p.start : p.stop] for p in micro_batches(len(indices), stream.rank, stream.world_size, 1)]
    own = [
        (int(index), what, value)
        for part, (inputs, targets) in zip(parts, stream.source.fetch(parts, seed=0), strict=True)
        for what, values in (*tensors(inputs).items(), ("target", targets))
        for index, value in not_finite(values, part)
    ]
    found = sorted(entry for entries in communicator.gather_objects(own, label="diagnosis") for entry in entries)
    if found:
        index, what, value = found[0]
        more = len({entry[0] for entry in found}) - 1
        also = f" (and {more} other sample{'s' if more > 1 else ''} of this batch)" if more else ""
        raise DataError(
            f"step {step}: sample {index} of the training data has {value} in its {what}{also}; "
            "`kfac-dist doctor` lists all such samples"
        )


def not_finite(values: Tensor, indices: Tensor) -> list[tuple[int, str]]:
    """Return the samples that hold a NaN or an infinity, each with the first such value; waits for the device.

    Args:
        values: `[samples, ...]`.
        indices: The samples' indices in the data.
    """
    if not values.is_floating_point():
        return []
    rows = values.reshape(len(values), -1)
    bad = ~torch.isfinite(rows)
    samples = bad.any(dim=1).nonzero().flatten().tolist()
    return [(int(indices[sample]), f"{rows[sample][bad[sample]][0].item():g}") for sample in samples]
