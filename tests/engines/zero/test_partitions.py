"""Gradients that DeepSpeed offloads are read once its copies to the host have ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist.engines.zero.partitions import FlatPartitions, ParameterPartitions
from tests.fake_ranks import fake_ranks

ARRIVED = torch.tensor([1.0, 2.0, 3.0])


class Copies:
    """A device whose copies end when somebody waits for them."""

    def __init__(self, places: list[Tensor]) -> None:
        self.places = places
        self.waits = 0

    def wait(self, *device: Any) -> None:
        self.waits += 1
        for place in self.places:
            place.copy_(ARRIVED)


def offloaded(stage: int, place: Tensor, **more: Any) -> Any:
    """An engine as far as partitions look at it, whose gradients lie at a place on the host."""
    parameter: Any = nn.Parameter(torch.zeros(3))
    parameter.ds_id, parameter.ds_numel, parameter.partition_numel = 0, 3, lambda: 3
    optimizer = SimpleNamespace(
        cpu_offload=True,
        offload_optimizer=True,
        bit16_groups=[[parameter]],
        fp16_groups=[[parameter]],
        params_in_partition=[[parameter]],
        offload_gradient_dict={0: [place]},
        norm_for_param_grads={0: 1.0},
        get_param_id=lambda _: 0,
        grad_partition_insertion_offset=[[{0: 0}]],
        grad_start_offset=[[{0: 0}]],
        partition_size=[3],
        _get_fp32_grad_state_partition=lambda *_: (place, None),
        **more,
    )
    engine = SimpleNamespace(optimizer=optimizer, module=nn.ParameterList([parameter]), seq_data_parallel_group=None)
    with fake_ranks(0, 1):
        found = (FlatPartitions if stage < 3 else ParameterPartitions)(engine)
    found.device = torch.device("cuda")
    return found


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("noted", [True, False])
def test_copies_to_the_host_have_ended(stage: int, noted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    place = torch.full((3,), float("nan"))
    copies, device = Copies([place]), Copies([place])
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(synchronize=device.wait))
    more = {"_wait_for_offload_copies": copies.wait, "_offload_gradient_safety_enabled": noted}
    partitions = offloaded(stage, place, **(more if noted or stage < 3 else {}))
    [(_, gradient)] = partitions.gradients()
    assert torch.equal(gradient, ARRIVED)
    assert (copies.waits, device.waits) == ((1, 0) if noted else (0, 1))


def test_nothing_is_waited_for_where_the_model_is_on_the_host() -> None:
    place = ARRIVED.clone()
    copies = Copies([place])
    partitions = offloaded(2, place, _wait_for_offload_copies=copies.wait, _offload_gradient_safety_enabled=True)
    partitions.device = torch.device("cpu")
    [(_, gradient)] = partitions.gradients()
    assert torch.equal(gradient, ARRIVED)
    assert copies.waits == 0
