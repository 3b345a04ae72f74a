"""Nothing non-finite enters the averages, and a step that is skipped leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC
from tests.harness import run_ranks
from tests.preconditioner.workloads import Run, part

EVERY_STEP = {"curvature": {"factor_every": 1, "decay": 0.5}, "inversion": {"inverse_every": 2, "damping": 0.05}}
MODES = [
    {"reduce_every": every, "reduction": reduction, "overlap": overlap}
    for every in ("refresh", "step")
    for reduction in ("all_reduce", "reduce_scatter")
    for overlap in (True, False)
]


def flat(state: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(state, Tensor):
        return {prefix: state.clone()}
    return {key: value for name, part in state.items() for key, value in flat(part, f"{prefix}/{name}").items()}


def poisoned_step(mode: dict[str, Any], poisoned: int) -> list[str]:
    """Take steps 0 to 3, feed an inf to rank 1 at `poisoned`, and return what of K-FAC's state that step changed."""
    run = Run("mlp", {**EVERY_STEP, "distribution": mode})
    run.train(poisoned)
    before = flat(run.kfac.state_dict())

    def plant(inputs: Tensor) -> Tensor:
        inputs = inputs.clone()
        if dist.get_rank() == 1:
            inputs[0, 0] = torch.inf
        return inputs

    run.gradients(poisoned, plant)
    run.kfac.step()
    after = flat(run.kfac.state_dict())
    # The refresh that this step did not do stays due; the next step with finite gradients does it.
    changed = [key for key, value in before.items() if not torch.equal(value, after[key])]
    refreshes = run.kfac.metrics()["refreshes"]
    run.step(poisoned + 1)
    due = poisoned % 2 == 0
    changed = sorted({key if "overdue" not in key else "overdue" for key in changed})
    assert run.kfac.metrics()["refreshes"] == refreshes + due or not due
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())
    run.close()
    return changed


def poisoned_steps() -> list[tuple[str, list[str]]]:
    return [(f"{mode} step {step}", poisoned_step(mode, step)) for mode in MODES for step in (2, 3)]


def test_an_inf_on_one_of_three_ranks_leaves_every_rank_as_it_was() -> None:
    for results in run_ranks(3, poisoned_steps, timeout=120):
        for case, changed in results:
            due = ["overdue"] if case.endswith("step 2") else []
            assert changed == ["/step", *due], case


FEATURES, HUGE = 5, 1e25


def dropped_batch(mode: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Measure once with a batch on rank 1 whose squares overflow although its gradients are finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 3, bias=False))
    with torch.no_grad():
        model[0].weight[:, 0] = 0  # so that the huge feature reaches neither the loss nor the other gradients
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(3)
    batch = torch.randn(6, FEATURES, generator=generator)[part(rank, size)][:2]
    if rank == 1:
        batch[:, 0] = HUGE
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = KFAC(model, {**EVERY_STEP, "distribution": mode}, optimizer=optimizer)
    kfac.micro_batch(divisor=2.0)
    outputs = model(batch)
    (outputs.square().sum() / 2 / 2).backward()
    model[0].weight.grad.clamp_(-1e6, 1e6)
    dist.all_reduce(model[0].weight.grad)
    kfac.step()
    state = kfac.state_dict()
    kfac.remove()
    factors = {key: unit["sum"][0] / unit["scalars"][0] for key, unit in state["units"].items()}
    return factors, batch, outputs.detach()


def dropped_batches() -> list[tuple[str, Any]]:
    return [(str(mode), dropped_batch(mode)) for mode in MODES]


def test_a_rank_that_drops_its_batch_leaves_the_average_of_the_others() -> None:
    by_rank = run_ranks(3, dropped_batches)
    for index, mode in enumerate(MODES):
        results = [rank[index][1] for rank in by_rank]
        inputs = torch.cat([results[rank][1] for rank in (0, 2)])
        gradients = torch.cat([results[rank][2] for rank in (0, 2)])  # of ½‖s‖²: the output itself
        for factors, _, _ in results:
            a, g = factors["0/A/0"].triu(), factors["0/G/0"].triu()
            torch.testing.assert_close(a, (inputs.T @ inputs / len(inputs)).triu(), msg=str(mode))
            torch.testing.assert_close(g, (gradients.T @ gradients / len(gradients)).triu(), msg=str(mode))


def overflowing_steps(reduce_every: str) -> tuple[list[str], list[str]]:
    """Two steps, one whose scaled loss overflows on the last rank alone, and a good one; what changed when."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
    config = {**EVERY_STEP, "distribution": {"reduce_every": reduce_every}}
    wrapped = DistributedDataParallel(model)
    kfac = KFAC(wrapped, config, optimizer=optimizer, grad_scaler=scaler)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        loss = wrapped(torch.randn(8, 4)).square().sum(1).mean() * factor
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        kfac.step()
        scaler.step(optimizer)
        scaler.update()

    step(1.0)
    step(1.0)
    state, parameters = flat(kfac.state_dict()), copy.deepcopy(model.state_dict())
    step(float("inf") if dist.get_rank() == dist.get_world_size() - 1 else 1.0)
    after = flat(kfac.state_dict())
    changed = [key for key in state if not torch.equal(state[key], after[key])]
    changed += [key for key, value in model.state_dict().items() if not torch.equal(value, parameters[key])]
    step(1.0)
    overdue = [key for key, value in flat(kfac.state_dict()).items() if key.endswith("/overdue") and value.any()]
    kfac.remove()
    return changed, overdue


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("reduce_every", ["refresh", "step"])
def test_a_grad_scaler_that_overflows_leaves_kfac_untouched(reduce_every: str, size: int) -> None:
    for changed, overdue in run_ranks(size, overflowing_steps, reduce_every):
        assert all(key == "/step" or key.endswith("/overdue") for key in changed), changed
        assert not overdue
