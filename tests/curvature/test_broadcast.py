"""Outputs that all samples share: found in the graph, measured where that is exact, and left alone elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.curvature.broadcast import Samples, consumers_of, samples_of
from tests.curvature.measured import assert_close, build_kfac, factors

SAMPLES, LENGTH, WIDTH = 4, 3, 5


def judge(combine: Callable[[Tensor, Tensor], Tensor], *shape: int, samples: int = SAMPLES) -> Samples:
    """What is said of a layer's output of some shape that is combined with `[B, T, d]` data."""
    shared = torch.randn(shape, requires_grad=True) * 1.0
    data = torch.randn(samples, LENGTH, WIDTH, requires_grad=True) * 1.0
    return samples_of(shared.grad_fn, consumers_of(combine(shared, data)), samples)


@pytest.mark.parametrize(
    ("combine", "shape", "expected"),
    [
        (lambda a, x: x + a, (SAMPLES, LENGTH, WIDTH), Samples.OWN),
        (lambda a, x: x + a, (1, LENGTH, WIDTH), Samples.EXPAND),
        (lambda a, x: x + a, (LENGTH, WIDTH), Samples.PREPEND),
        (lambda a, x: (x - a) * a, (LENGTH, WIDTH), Samples.PREPEND),
        (lambda a, x: x + a[None], (LENGTH, WIDTH), Samples.SHARED),
        (lambda a, x: x + a, (WIDTH,), Samples.SHARED),
        (lambda a, x: x + a.tanh(), (LENGTH, WIDTH), Samples.SHARED),
        (lambda a, x: (x + a, a), (1, LENGTH, WIDTH), Samples.EXPAND),
        (lambda a, x: x + a.expand_as(x), (1, LENGTH, WIDTH), Samples.EXPAND),
        (lambda a, x: x + a[:, None], (SAMPLES, WIDTH), Samples.OWN),  # one for each sample
        (lambda a, x: x * a, (SAMPLES, 1, WIDTH), Samples.OWN),
        (lambda a, x: x + a.view(SAMPLES, LENGTH, WIDTH), (SAMPLES * LENGTH, WIDTH), Samples.OWN),
        (lambda a, x: x.transpose(0, 1) + a, (LENGTH, SAMPLES, WIDTH), Samples.OWN),
        (lambda a, x: {"x": [x + a.mT]}, (WIDTH, LENGTH), Samples.SHARED),
        (lambda a, x: a.sum() + 0 * a, (LENGTH, WIDTH), Samples.OWN),  # never meets the samples
    ],
)
def test_what_the_graph_says(
    combine: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], expected: Samples
) -> None:
    assert judge(combine, *shape) is expected


def test_as_many_positions_as_samples() -> None:
    shared = judge(lambda a, x: x + a, LENGTH, WIDTH, samples=LENGTH)
    assert shared is Samples.PREPEND


class Positions(nn.Module):
    """Tokens and positions; these are looked up once for all samples, or once for each."""

    def __init__(self, lookup: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(7, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.head, self.lookup = nn.Linear(WIDTH, 2), lookup

    def forward(self, tokens: Tensor) -> Tensor:
        ids = torch.arange(LENGTH)
        given = {"each": ids.expand_as(tokens), "one": ids[None]}.get(self.lookup, ids)
        found = self.positions(given)
        return self.head(torch.tanh(self.tokens(tokens) + (torch.sin(found) if self.lookup == "indirect" else found)))


def two_steps(lookup: str, parts: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """Factors and gradient of the positions at the second step; the first finds out what is shared."""
    kfac = build_kfac(model := Positions(lookup), inversion={"damping": 0.05}, loss_terms="token")
    tokens = torch.randint(7, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        model.zero_grad()
        for index, part in enumerate(tokens.split(parts)):
            kfac.micro_batch(divisor=tokens.numel(), terms=part.numel(), last=index + 1 == len(parts))
            (model(part).square().sum() / tokens.numel()).backward()
        plain = model.positions.weight.grad.clone()
        kfac.step()
    kfac.remove()
    return {k: v for k, v in factors(kfac).items() if k.startswith("positions")}, model.positions.weight.grad / plain


@pytest.mark.parametrize("lookup", ["one", "none"])
@pytest.mark.parametrize("parts", [(4,), (2, 2), (3, 1)])
def test_shared_positions_are_measured_sample_by_sample(lookup: str, parts: tuple[int, ...]) -> None:
    wanted, _ = two_steps("each", (4,))
    found, ratio = two_steps(lookup, parts)
    for name, value in wanted.items():
        assert_close(found[name], value)
    assert float((ratio - 1).abs().max()) > 0.1


def test_what_cannot_be_told_apart_keeps_its_plain_gradient() -> None:
    with pytest.warns(UserWarning, match="the outputs of positions are shared by all samples"):
        found, ratio = two_steps("indirect", (4,))
    assert_close(ratio, torch.ones_like(ratio), 1e-5)
    assert all(bool((value == 0).all() | value.isnan().all()) for value in found.values())


def test_nothing_is_said_of_models_without() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_steps("each", (4,))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_resumed_run_knows_what_is_shared(after: int) -> None:
    """It measures what the run that never stopped measures, from its first step on."""
    tokens = torch.randint(7, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))

    def step(kfac: KFAC, model: nn.Module) -> None:
        model.zero_grad()
        (model(tokens).square().sum() / tokens.numel()).backward()
        kfac.step()

    models = [Positions("none"), Positions("none")]
    kfacs = [build_kfac(model, decay=0.5, loss_terms="token") for model in models]
    for _ in range(after):
        step(kfacs[0], models[0])
    kfacs[1].load_state_dict(kfacs[0].state_dict())
    for kfac, model in zip(kfacs, models, strict=True):
        step(kfac, model)
        kfac.remove()
    for name, value in factors(kfacs[0]).items():
        assert torch.equal(value.nan_to_num(-1), factors(kfacs[1])[name].nan_to_num(-1)), name
