"""One step for one backward, and none between micro-batches: under every engine, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC
from kfac_dist.errors import ModelError
from tests.engines.zero_runs import Case, deepspeed_world
from tests.harness import run_ranks
from tests.preconditioner.workloads import place

SAMPLES = 24
CONFIG: dict[str, Any] = {
    "curvature": {"factor_every": 3, "decay": 0.5},
    "inversion": {"inverse_every": 3, "damping": 0.1},
    "update": {"kl_clip": None},
}
NARROW = 1  # fewer rows than ranks: some hold nothing of the layer


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, NARROW), nn.Tanh(), nn.Linear(NARROW, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SAMPLES, 4, generator=generator), torch.randint(0, 3, (SAMPLES,), generator=generator)


def attached(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> KFAC:
    return KFAC(model, CONFIG, optimizer=optimizer)


def backward(model: nn.Module, step: int = 0) -> None:
    inputs, labels = batch(step)
    F.cross_entropy(model(inputs), labels).backward()


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("steps_before", [0, 1, 3], ids=["measured", "not measured", "measured later"])
def test_a_second_step_for_one_backward_is_refused_and_changes_nothing(steps_before: int) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = attached(model)
    for step in range(steps_before):
        optimizer.zero_grad()
        backward(model, step)
        kfac.step()
        optimizer.step()
    optimizer.zero_grad()
    backward(model, steps_before)
    kfac.step()
    once = gradients(model)
    with pytest.raises(ModelError, match=r"twice.*once before each optimizer\.step"):
        kfac.step()
    for value, expected in zip(gradients(model), once, strict=True):
        assert torch.equal(value, expected)
    assert kfac.steps == steps_before + 1
    optimizer.step()
    optimizer.zero_grad()
    backward(model, steps_before + 1)
    kfac.step()  # the loop may go on
    assert kfac.steps == steps_before + 2


@pytest.mark.parametrize("set_to_none", [False, True])
def test_ordinary_loops_go_on(set_to_none: bool) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = attached(model)

    def closure() -> None:
        optimizer.zero_grad(set_to_none=set_to_none)
        backward(model, kfac.steps)
        kfac.step()

    for _ in range(4):
        closure()
        optimizer.step()
    for _ in range(3):  # a line search: several evaluations before the optimizer's step
        closure()
    optimizer.step()
    kfac.step()  # the optimizer has stepped: what a replayed graph writes leaves no other trace
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # gradients from elsewhere
    kfac.step()
    with torch.no_grad():
        for p in model.parameters():
            p.grad.fill_(1.0)
    kfac.step()
    assert kfac.steps == 10


def test_nothing_is_asked_where_nothing_has_a_gradient() -> None:
    model = build()
    kfac = attached(model)
    with torch.no_grad():
        kfac.step()
        kfac.step()
    assert kfac.steps == 2


def micro_batches(rank: int, size: int) -> list[slice]:
    width = SAMPLES // size // 3
    return [slice(rank * 3 * width + k * width, rank * 3 * width + (k + 1) * width) for k in range(3)]


def accumulate(
    model: nn.Module, kfac: KFAC, step: int, *, beside: bool, synchronize: Callable[[bool], None] | None = None
) -> None:
    """One step over three micro-batches; `kfac.step()` beside each of them, or after the last alone."""
    rank, size = place()
    inputs, labels = batch(step)
    for index, own in enumerate(micro_batches(rank, size)):
        last = index == 2
        kfac.micro_batch(first_sample=own.start, divisor=SAMPLES / size, terms=own.stop - own.start, last=last)
        with kfac.solver_access.engine.synchronize(last):
            loss = F.cross_entropy(model(inputs[own]), labels[own], reduction="sum") / (SAMPLES / size)
            loss.backward()
        if last or beside:
            kfac.step()


def in_ddp() -> nn.Module:
    return DistributedDataParallel(build()) if place()[1] > 1 else build()


def in_fsdp2() -> nn.Module:
    model = build()
    mesh = init_device_mesh("cpu", (place()[1],))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def engines() -> list[tuple[list[Tensor], list[str]]]:
    """For DDP and FSDP2: parameters after steps in both manners, and what was said of steps out of turn."""
    found = []
    for make in (in_ddp, in_fsdp2):
        trained: list[Tensor] = []
        for beside in (False, True):
            model = make()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            kfac = attached(model)
            for step in range(4):
                accumulate(model, kfac, step, beside=beside)
                optimizer.step()
                optimizer.zero_grad()
            assert kfac.steps == 4
            trained.append(torch.cat([whole(p).flatten() for p in model.parameters()]))
        said = []
        accumulate(model, kfac, 4, beside=True)
        for _ in range(2):
            with pytest.raises(ModelError) as error:
                kfac.step()
            said.append(str(error.value))
        optimizer.step()
        optimizer.zero_grad()
        kfac.micro_batch(last=False, divisor=SAMPLES)
        backward(model)
        kfac.step()
        optimizer.step()
        with pytest.raises(ModelError) as error:
            kfac.micro_batch(last=True)
        said.append(str(error.value))
        found.append((trained, said))
    return found


def whole(p: Tensor) -> Tensor:
    full = getattr(p, "full_tensor", None)
    return p.detach().clone() if full is None else full().detach()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_under_ddp_and_fsdp2_on_every_rank(ranks: int) -> None:
    for found in run_ranks(ranks, engines):
        for (guarded, beside), said in found:
            assert torch.equal(guarded, beside), "steps between micro-batches did something"
            assert "twice" in said[0]
            assert said[1] == said[0]
            assert "last=True" in said[2]


def zero() -> list[str]:
    said = []
    with deepspeed_world() as deepspeed:
        for stage in (1, 2, 3):
            case = Case(stage)
            model = build()
            config = case.deepspeed_config(place()[1])
            engine, *_ = deepspeed.initialize(model=model, optimizer=case.build_optimizer(model), config=config)
            kfac = attached(engine)
            inputs, labels = batch(0)
            engine.backward(F.cross_entropy(engine(inputs), labels))
            kfac.step()
            with pytest.raises(ModelError) as error:
                kfac.step()
            said.append(str(error.value))
            engine.step()
            kfac.micro_batch(last=False)
            engine.backward(F.cross_entropy(engine(inputs), labels))
            kfac.step()
            assert kfac.steps == 1
            with pytest.raises(ModelError) as error:
                engine.step()
            said.append(str(error.value))
            kfac.remove()
            engine.destroy()
    return said


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_under_zero(ranks: int) -> None:
    pytest.importorskip("deepspeed")
    for said in run_ranks(ranks, zero, timeout=200):
        assert all("twice" in message for message in said[::2])
        assert all("last=True" in message for message in said[1::2])


def test_accelerates_accumulate_takes_one_step() -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = build()
    kfac = attached(expected)
    backward(expected)
    kfac.step()
    for described in (True, False):
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=3, cpu=True)
        model = build()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
        kfac = attached(model, optimizer)
        start = [p.detach().clone() for p in model.parameters()]
        inputs, labels = batch(0)
        for own in micro_batches(0, 1):
            with accelerator.accumulate(model):
                if described:
                    kfac.micro_batch(first_sample=own.start, divisor=SAMPLES, last=accelerator.sync_gradients)
                accelerator.backward(F.cross_entropy(model(inputs[own]), labels[own]))
                if accelerator.sync_gradients and not described:
                    with pytest.warns(UserWarning, match="micro_batch"):
                        kfac.step()
                else:
                    kfac.step()
                optimizer.step()
                optimizer.zero_grad()
        assert kfac.steps == 1
        if described:
            for p, before, other in zip(model.parameters(), start, expected.parameters(), strict=True):
                torch.testing.assert_close(before - p.detach(), other.grad, rtol=1e-4, atol=1e-6)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
