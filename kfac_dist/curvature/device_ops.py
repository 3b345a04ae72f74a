"""Small operations without host synchronisation on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def free_to_read(device: torch.device) -> bool:
    """Whether the host can look at a value without waiting for the device; plain branches are quicker then."""
    return device.type == "cpu"


def zero_unless(condition: Tensor, values: Tensor) -> None:
    """Zero `values` in place where the 0-dim `condition` is false, without asking the device."""
    if not free_to_read(values.device):
        values.masked_fill_(~condition, 0)
    elif not condition:
        values.zero_()


def scalar(value: Tensor) -> Tensor | float:
    """Return a 0-dim tensor as a number where reading it is free: scalar kernels are quicker."""
    return value.item() if free_to_read(value.device) else value


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor to the device without waiting for it."""
    if device.type == "cpu" or host.device.type != "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
