"""The four optimizers of "Dissecting Adam": estimates against simulation, steps against numbers worked out by hand."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_dist.errors import ConfigError, ModelError
from kfac_dist.optimizers.dissected import (
    MSSD,
    MSVAG,
    SSD,
    SVAG,
    DissectedAdam,
    bias_correction,
    gradient_variance,
    mean_variance,
)
from tests.harness import run_ranks

METHODS: dict[str, type[DissectedAdam]] = {"ssd": SSD, "mssd": MSSD, "svag": SVAG, "msvag": MSVAG}


def build(name: str, parameters: Any, lr: float = 0.1, beta: float = 0.9, weight_decay: float = 0.0) -> DissectedAdam:
    options = {} if name == "ssd" else {"beta": beta}
    return METHODS[name](parameters, lr=lr, weight_decay=weight_decay, **options)


def take(optimizer: DissectedAdam, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_the_estimates_have_the_mean_and_the_variance_that_the_paper_derives(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    samples, true_mean, sigma = 200_000, 0.4, 1.7
    mean, square = torch.zeros(samples), torch.zeros(samples)
    for step in range(25):
        gradient = true_mean + sigma * torch.randn(samples, generator=generator)
        mean.lerp_(gradient, 1 - beta)
        square.lerp_(gradient.square(), 1 - beta)
        if step in (0, 1, 4, 24):
            rho = mean_variance(beta, step)
            corrected = mean / bias_correction(beta, step)
            assert corrected.mean() == pytest.approx(true_mean, abs=0.02)
            assert corrected.var() == pytest.approx(rho * sigma**2, rel=0.02)
            squared, variance = gradient_variance(mean, square, beta, step)
            torch.testing.assert_close(squared, corrected.square())
            assert variance.mean() == pytest.approx(sigma**2 if step else 0.0, rel=0.02)
    assert rho == pytest.approx((1 - beta) / (1 + beta), rel=0.2)  # its limit


# β = ½, gradients 2 and 1: m̃ = 1, 1; ṽ = 2, 3/2; m = 2, 4/3; v = 4, 2; ρ = 1, 5/9; s = 0, 1/2.
BY_HAND = {
    "ssd": (1.0, 1.0),
    "mssd": (1.0, 1.0),
    "svag": (2.0, (16 / 9) / (16 / 9 + 1 / 2)),
    "msvag": (2.0, (16 / 9) / (16 / 9 + 5 / 18) * 4 / 3),
}


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_by_hand(name: str) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = build(name, [parameter], lr=1.0, beta=0.5)
    first, second = BY_HAND[name]
    take(optimizer, [parameter], [torch.tensor([2.0])])
    assert parameter.item() == pytest.approx(-first, rel=1e-6)
    take(optimizer, [parameter], [torch.tensor([1.0])])
    assert parameter.item() == pytest.approx(-first - second, rel=1e-6)


def test_the_sign_of_the_average_is_not_that_of_the_last_gradient() -> None:
    signs = []
    for name in ("ssd", "mssd"):
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = build(name, [parameter], lr=1.0)
        for gradient in (5.0, -0.1):
            take(optimizer, [parameter], [torch.tensor([gradient])])
        signs.append(parameter.item())
    assert signs == [0.0, -2.0]


@pytest.mark.parametrize("name", METHODS)
def test_what_has_no_gradient_stays_where_it_is(name: str) -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = build(name, [parameter])
    for _ in range(3):
        take(optimizer, [parameter], [torch.tensor([0.0, 3.0])])
    assert parameter[0] == 1
    assert parameter[1] < 1


@pytest.mark.parametrize("name", ["svag", "msvag"])
def test_factors_are_between_zero_and_one(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    size = 1000
    parameter = nn.Parameter(torch.zeros(size))
    optimizer = build(name, [parameter], lr=1.0)
    scale = torch.logspace(-25, 15, size)
    for step in range(20):
        gradient = scale * (torch.randn(size, generator=generator) + (torch.arange(size) % 3))
        parameter.data.zero_()
        take(optimizer, [parameter], [gradient])
        whole = gradient
        if name == "msvag":
            whole = optimizer.state[parameter]["exp_avg"] / bias_correction(0.9, step)
        factors = torch.where(whole == 0, 0.0, -parameter.detach() / whole)
        assert factors.isfinite().all()
        assert 0 <= factors.min() <= factors.max() <= 1 + 1e-6
    assert factors.max() > 0.9  # where means dominate
    assert 0 < factors[scale > 1e-15].min() < 0.1


def _plain_loop(name: str, start: list[Tensor], steps: list[list[Tensor]], lr: float, beta: float, decay: float) -> Any:
    """The paper's algorithms, element by element in float64, for each parameter by itself."""
    results = [value.double().clone() for value in start]
    for index, parameter in enumerate(results):
        mean, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
        for step, gradients in enumerate(steps):
            gradient = gradients[index].double()
            mean = beta * mean + (1 - beta) * gradient
            square = beta * square + (1 - beta) * gradient**2
            m, v = mean / (1 - beta ** (step + 1)), square / (1 - beta ** (step + 1))
            rho = (1 - beta) * (1 + beta ** (step + 1)) / ((1 + beta) * (1 - beta ** (step + 1)))
            s = (v - m**2).clamp(min=0) / (1 - min(rho, 0.9999))
            update = {
                "ssd": gradient.sign(),
                "mssd": m.sign(),
                "svag": m**2 / (m**2 + s) * gradient,
                "msvag": m**2 / (m**2 + rho * s) * m,
            }[name]
            parameter.mul_(1 - lr * decay).sub_(lr * torch.nan_to_num(update))
    return results


def _gradients(shapes: list[tuple[int, ...]], steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(shape, generator=generator) + 0.3 for shape in shapes] for _ in range(steps)]


SHAPES: list[tuple[int, ...]] = [(3, 5), (7,), (), (2, 3, 2), (1, 4)]


@pytest.mark.parametrize("name", METHODS)
def test_all_parameters_together_step_like_each_by_itself(name: str) -> None:
    start = [torch.full(shape, 2.0) for shape in SHAPES]
    parameters = [nn.Parameter(value.clone()) for value in start]
    optimizer = build(name, parameters, lr=0.01, weight_decay=0.1)
    steps = _gradients(SHAPES, 12)
    for gradients in steps:
        take(optimizer, parameters, gradients)
    expected = _plain_loop(name, start, steps, 0.01, 0.9, 0.1)
    torch.testing.assert_close([p.detach().double() for p in parameters], expected, rtol=1e-5, atol=1e-5)


def test_parameters_that_a_step_leaves_out_count_their_own_steps() -> None:
    together = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = build("msvag", together)
    apart = nn.Parameter(torch.zeros(2))
    lone = build("msvag", [apart])
    for step in range(6):
        gradient = torch.tensor([1.0, float(step)])
        together[0].grad, together[1].grad = gradient.clone(), gradient.clone() if step % 2 else None
        optimizer.step()
        if step % 2:
            take(lone, [apart], [gradient])
    assert torch.equal(together[1], apart)
    assert [int(optimizer.state[p]["step"]) for p in together] == [6, 3]


@pytest.mark.parametrize("name", METHODS)
def test_a_loaded_state_goes_on_bit_for_bit(name: str) -> None:
    parameters = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = build(name, parameters, weight_decay=0.01)
    steps = _gradients(SHAPES, 8)
    for gradients in steps[:4]:
        take(optimizer, parameters, gradients)
    again = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = build(name, again, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for gradients in steps[4:]:
        take(optimizer, parameters, gradients)
        take(resumed, again, gradients)
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))


class Kernels(TorchDispatchMode):
    """Counts operations on anything but the counts of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0][0] if isinstance(args[0], list) else args[0]
        if isinstance(first, Tensor) and first.device.type == "meta":
            self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", METHODS)
def test_kernels_are_as_many_for_forty_parameters_and_none_reads_a_value(name: str) -> None:
    """Tensors on the meta device have no values: whoever reads one fails."""
    found = []
    for number in (2, 40):
        parameters = [nn.Parameter(torch.zeros(3, device="meta")) for _ in range(number)]
        optimizer = build(name, parameters, weight_decay=0.1)
        gradients = [torch.zeros(3, device="meta")] * number
        take(optimizer, parameters, gradients)
        for parameter in parameters:
            parameter.grad = torch.zeros(3, device="meta")
        with Kernels() as kernels:
            optimizer.step()
        found.append({key: count for key, count in kernels.calls.items() if "foreach" in key})
        assert not {key for key in kernels.calls if "foreach" not in key and "detach" not in key}
    assert found[0] == found[1]
    assert 2 < sum(found[0].values()) < 16


def test_a_grad_scaler_skips_what_overflowed() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = build("msvag", [parameter])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf"), 2.0):
        optimizer.zero_grad()
        scaler.scale((parameter * torch.tensor([1.0, -2.0])).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert parameter.isfinite().all()
    assert int(optimizer.state[parameter]["step"]) == 2
    assert optimizer.state[parameter]["exp_avg"].tolist() == pytest.approx([0.29, -0.58])


def test_a_closure_is_called() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = build("ssd", [parameter], lr=0.5)

    def loss() -> float:
        parameter.grad = torch.tensor([3.0])
        return 7.0

    assert optimizer.step(loss) == 7.0
    assert parameter.item() == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "MSVAG: lr is -1.0, expected a number >= 0"),
        ({"beta": 0.0}, "MSVAG: beta is 0.0, expected a number > 0 and < 1"),
        ({"beta": 1.0}, "MSVAG: beta is 1.0, expected a number > 0 and < 1"),
        ({"weight_decay": float("nan")}, "MSVAG: weight_decay is nan, expected a number >= 0"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MSVAG([nn.Parameter(torch.ones(1))], **{"lr": 0.1, **options})


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = build("msvag", table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ModelError, match="the gradient is sparse"):
        optimizer.step()


def _batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(12, 5, generator=generator), torch.randn(12, 4, generator=generator)) for _ in range(10)]


def _model() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2, bias=False), nn.Linear(2, 4))


def _train(name: str, *, sharded: bool) -> dict[str, Tensor]:
    model = _model()
    rank, size = 0, 1
    if sharded:
        rank, size = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh("cpu", (size,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = build(name, model.parameters(), lr=0.01, weight_decay=0.1)
    for inputs, targets in _batches():
        own = slice(rank * 12 // size, (rank + 1) * 12 // size)
        optimizer.zero_grad()
        (model(inputs[own]) - targets[own]).square().mean().backward()
        optimizer.step()
    return {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).detach()
        for key, value in model.state_dict().items()
    }


def _train_sharded() -> dict[str, dict[str, Tensor]]:
    return {name: _train(name, sharded=True) for name in METHODS}


def test_rows_of_fully_shard_step_like_one_process() -> None:
    """Seven, four and two rows on three ranks: uneven, and none at all."""
    expected = {name: _train(name, sharded=False) for name in METHODS}
    for found in run_ranks(3, _train_sharded):
        for name in METHODS:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
