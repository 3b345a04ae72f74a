"""A rank that dies or stands still in the midst of anyone's collective is named in one line by the others."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from kfac_dist.config.yaml.load import dump_yaml
from tests.distributed.startup.test_rendezvous import free_port
from tests.started import Started
from tests.training.runs import launched, small_config

PATIENCE_SECONDS = 240
DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs pip install 'kfac_dist[deepspeed]'"
)


class Mortal(nn.Sequential):
    """Its process gets the signal BY on the last rank, at the place that DIES names."""

    def __init__(self) -> None:
        place = os.environ["DIES"]
        super().__init__(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 6))
        self.left = 4
        if os.environ["RANK"] == "0":
            return
        match place:
            case "optimizer":
                from kfac_dist.engines.fsdp2 import FSDP2Engine
                from kfac_dist.engines.zero.loop import ZeroLoopEngine

                for engine in (FSDP2Engine, ZeroLoopEngine):
                    engine.take_step = self._dying(engine.take_step)  # type: ignore[method-assign]
            case "evaluation":
                from kfac_dist.training import loop

                loop.evaluate = self._dying(loop.evaluate, calls=0)  # type: ignore[assignment]
            case "checkpoint":
                import torch.distributed.checkpoint as dcp

                dcp.save = self._dying(dcp.save, calls=0)  # type: ignore[assignment]
            case "forward":
                self[1].register_forward_pre_hook(lambda *_: self._die(4))
            case "averaging":
                self[0].register_full_backward_pre_hook(lambda *_: self._die(4))

    def _dying(self, function: Callable[..., Any], calls: int = 3) -> Callable[..., Any]:
        def dies(*args: Any, **kwargs: Any) -> Any:
            self._die(calls)
            return function(*args, **kwargs)

        return dies

    def _die(self, calls: int) -> None:
        self.left = min(self.left, calls) - 1
        if self.left < 0:
            os.kill(os.getpid(), int(os.environ["BY"]))

    def forward(self, pixels: Tensor) -> Tensor:
        outputs: Tensor = super().forward(pixels)
        return outputs


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("engine", "place", "by"),
    [
        pytest.param("zero3", "optimizer", signal.SIGKILL, marks=DEEPSPEED),
        pytest.param("zero1", "optimizer", signal.SIGKILL, marks=DEEPSPEED),
        pytest.param("zero1", "optimizer", signal.SIGSTOP, marks=DEEPSPEED),
        ("fsdp2", "optimizer", signal.SIGKILL),
        ("fsdp2", "evaluation", signal.SIGKILL),
        ("ddp", "averaging", signal.SIGKILL),
        ("fsdp2", "forward", signal.SIGKILL),
        ("ddp", "checkpoint", signal.SIGKILL),
    ],
)
def test_the_others_name_it_in_one_line(tmp_path: Path, engine: str, place: str, by: signal.Signals) -> None:
    config = tmp_path / "run.yaml"
    settings: dict[str, Any] = {
        "model": {"name": "tests.training.test_lost_ranks:Mortal", "args": {}},
        "engine": {"name": engine},
        "train": {"steps": 30, "clip_grad_norm": 1.0, "evaluate_every": 5},
        "checkpoint": {"every": 5},
    }
    if by is signal.SIGSTOP:  # its connections stay open: only time tells
        settings["run"] = {"timeout_seconds": 8}
    config.write_text(dump_yaml(small_config(tmp_path, kfac=True, **settings)))
    port = free_port()
    words = ["train", str(config), "--quiet"]
    mortal = {"DIES": place, "BY": str(int(by))}
    ranks = [Started(words, {**os.environ, **launched(rank, 2, port), **mortal}) for rank in range(2)]
    try:
        said, _ = ranks[0].communicate(timeout=PATIENCE_SECONDS)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert ranks[1].returncode == -signal.SIGKILL
    assert ranks[0].returncode == 2, said
    assert "Traceback" not in said
    assert len(errors) == 1
    assert errors[0].startswith("error [rank 0]: ")
    assert "no answer from rank 1; waiting: rank 0 in " in errors[0]
