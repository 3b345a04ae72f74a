"""K-FAC's state beside the checkpoints of users' own loops: DeepSpeed's tags, and torch.distributed.checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard

from kfac_dist import KFAC, load_kfac, save_kfac
from kfac_dist.errors import CheckpointError
from tests.harness import run_ranks
from tests.training.runs import deepspeed_ends_here, launched

pytest.importorskip("deepspeed")

CONFIG = {
    "curvature": {"factor_every": 1, "likelihood": "categorical"},
    "inversion": {"damping": 0.1, "inverse_every": 2},
    "update": {"kl_clip": None},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def initialize() -> tuple[Any, KFAC]:
    import deepspeed

    model = network()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, KFAC(engine, CONFIG)


def run(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        inputs, labels = batch(step)
        loss = nn.functional.cross_entropy(engine(inputs), labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def _deepspeed_tag(directory: str) -> None:
    os.environ.update(launched(dist.get_rank(), dist.get_world_size()), DS_ACCELERATOR="cpu")
    import sys

    import deepspeed  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    with deepspeed_ends_here():
        engine, kfac = initialize()
        run(engine, range(5))
        engine.save_checkpoint(directory, tag="five", client_state={"kfac": kfac.state_dict()})
        save_kfac(kfac, Path(directory) / "five" / "kfac.pt")
        expected = run(engine, range(5, 9))
        kfac.remove()
        for beside in (False, True):
            engine, kfac = initialize()
            _, client = engine.load_checkpoint(directory, tag="five")
            if beside:
                load_kfac(kfac, Path(directory) / "five" / "kfac.pt")
            else:
                kfac.load_state_dict(client["kfac"])
            assert kfac.steps == 5
            assert run(engine, range(5, 9)) == expected
            kfac.remove()


def _on_others(directory: str) -> None:
    model = network()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    kfac = KFAC(model, CONFIG, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    file = Path(directory) / "five" / "kfac.pt"
    load_kfac(kfac, file)
    saved = torch.load(file, weights_only=True)
    for name, unit in kfac.state_dict()["units"].items():
        torch.testing.assert_close(unit["sum"] * 2, saved["units"][name]["sum"] * 3)  # an average is W shares
        assert torch.equal(unit["payload"], saved["units"][name]["payload"])
    dcp.save({"model": model.state_dict(), "kfac": kfac.sharded_state_dict()}, checkpoint_id=f"{directory}/dcp")
    kfac.remove()


def _from_shards(directory: str) -> int:
    model = network()
    fully_shard(model)
    kfac = KFAC(model, CONFIG, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    state = {"model": model.state_dict(), "kfac": kfac.sharded_state_dict()}
    dcp.load(state, checkpoint_id=f"{directory}/dcp")
    kfac.load_sharded_state_dict(state["kfac"])
    saved = torch.load(Path(directory) / "five" / "kfac.pt", weights_only=True)
    for name, unit in kfac.state_dict()["units"].items():
        assert torch.equal(unit["payload"], saved["units"][name]["payload"])
    steps = kfac.steps
    kfac.remove()
    return steps


def test_state_travels_with_deepspeeds_tags_and_with_dcp(tmp_path: Path) -> None:
    run_ranks(3, _deepspeed_tag, str(tmp_path), timeout=120)
    run_ranks(2, _on_others, str(tmp_path))
    assert run_ranks(3, _from_shards, str(tmp_path)) == [5, 5, 5]


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    model = network()
    kfac = KFAC(model, CONFIG, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match=r"can't read .*none\.pt"):
        load_kfac(kfac, tmp_path / "none.pt")
    save_kfac(kfac, tmp_path / "deep" / "kfac.pt")
    whole = (tmp_path / "deep" / "kfac.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"can't read .*half\.pt"):
        load_kfac(kfac, tmp_path / "half.pt")
