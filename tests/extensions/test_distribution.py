"""The registered communicator and engine of `examples/extensions/` beside the built-in ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from examples.extensions.communicator import COLLECTIVES
from examples.extensions.engine import OneAllReduce
from kfac_dist import KFAC
from kfac_dist.training import train
from tests.extensions.parts import ONE_AND_TWO, OPTIONS, RATE, as_launched, batches, linear_model, options_with, trained
from tests.harness import run_ranks
from tests.training.runs import final_model, losses, small_config

assert OneAllReduce  # registered by its import


def counted() -> tuple[list[Tensor], list[Tensor], dict[Any, int], dict[str, Any]]:
    wanted, _ = trained(linear_model(), OPTIONS)
    before = len(COLLECTIVES)
    assert before == 0
    model = linear_model()
    wrapped = DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    kfac = KFAC(wrapped, options_with("distribution", backend="counted"))
    for inputs, labels in batches(5):
        cross_entropy(wrapped(inputs), labels).backward()
        kfac.step()
        optimizer.step()
        optimizer.zero_grad()
    traffic = kfac.communicator.traffic.snapshot()
    counts = dict(COLLECTIVES)
    COLLECTIVES.clear()
    kfac.remove()
    return wanted, [p.detach() for p in model.parameters()], counts, traffic


@ONE_AND_TWO
def test_the_communicator_counts_the_collectives_of_an_equal_run(ranks: int) -> None:
    for wanted, found, counts, traffic in run_ranks(ranks, counted):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
        if ranks == 1:
            assert counts == {}  # one rank talks to nobody
            continue
        totals = Counter[str]()
        for (kind, label), count in counts.items():
            assert kind in ("all_reduce", "broadcast")
            totals[label] += count
        assert {"factors", "inverses"} <= set(totals)
        assert {label: traffic[label][0] for label in totals} == totals


def train_by(directory: str, engine: str) -> None:
    as_launched()
    train(small_config(directory, kfac=True, engine={"name": engine}, checkpoint={"every": 12}), quiet=True)


@ONE_AND_TWO
def test_the_engine_trains_as_ddp_does(ranks: int, tmp_path: Path) -> None:
    for name in ("ddp", "one_all_reduce"):
        run_ranks(ranks, train_by, str(tmp_path / name), name)
    wanted, found = (losses(tmp_path / name / "small") for name in ("ddp", "one_all_reduce"))
    assert len(found) == 12
    assert found == pytest.approx(wanted, rel=1e-5)
    end = final_model(tmp_path / "ddp/small")
    for name, value in final_model(tmp_path / "one_all_reduce/small").items():
        torch.testing.assert_close(value, end[name], rtol=1e-4, atol=1e-6)
