"""Slices of parameters made whole on every rank: for checkpoints, not for the training step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.distributed.movement.gradient_layout import GradientLayout
from kfac_dist.distributed.movement.owner_buffer import Segment, SegmentLayout, share_segments


def gather_slices(
    comm: Communicator,
    layout: GradientLayout,
    local: Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    label: str,
) -> dict[str, Tensor]:
    """Give every rank every parameter of a layout whole, in one precision, in few collectives, however many parameters.

    Args:
        comm: The ranks of the layout.
        layout: Slices by the rank that holds them.
        local: By parameter name, what this rank holds of it: its slice, or all of what is replicated. What it holds
            nothing of may be missing.
        device: The tensors' device.
        dtype: Their precision.
        label: Name of the traffic.

    Returns:
        New tensors of the parameters' shapes, by name.
    """
    held = [(parameter, piece) for parameter in layout.parameters for piece in parameter.slices or ()]
    segments = SegmentLayout([Segment(f"{p.rank}/{of.name}", p.numel, p.rank) for of, p in held], layout.size)
    buffer = torch.zeros(segments.sharing_numel, device=device, dtype=dtype)
    for parameter, piece in held:
        if piece.rank == comm.rank:
            segments.view(buffer, f"{piece.rank}/{parameter.name}").copy_(local[parameter.name])
    if held:  # else every rank has everything, and the layout may be of fewer ranks
        share_segments(comm, buffer, segments, label=label).wait()
    whole = {
        parameter.name: local[parameter.name].to(dtype).clone().view(parameter.shape)
        if parameter.is_replicated
        else torch.zeros(parameter.shape, device=device, dtype=dtype)
        for parameter in layout.parameters
    }
    for parameter, piece in held:
        target = whole[parameter.name].view(-1)[piece.start : piece.stop]
        target.copy_(segments.view(buffer, f"{piece.rank}/{parameter.name}"))
    return whole
