"""Outputs that all samples share: found in the graph, measured where that is exact, and left alone elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.curvature.capture.shared_outputs import Samples, consumers_of, samples_of
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
        # Windows of images, normalised, as wide as there are samples.
        (lambda a, x: a / a.norm(dim=-1, keepdim=True), (2 * SAMPLES, LENGTH, SAMPLES), Samples.OWN),
        (lambda a, x: {"x": [x + a.mT]}, (WIDTH, LENGTH), Samples.SHARED),
        # One sample's rows, put back into their place among the others'.
        (lambda a, x: x.index_add(0, torch.tensor([2]), a), (1, LENGTH, WIDTH), Samples.OWN),
        (lambda a, x: torch.cat([a, x[1:]]), (1, LENGTH, WIDTH), Samples.OWN),
        (lambda a, x: x.index_put((torch.tensor([2]),), a), (1, LENGTH, WIDTH), Samples.OWN),
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


@pytest.mark.parametrize("lookup", ["each", "one", "none"])
def test_nothing_is_said_of_models_that_are_measured(lookup: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_steps(lookup, (4,))


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


class Relative(nn.Module):
    """Attention scores with a table of relative positions that goes through a linear layer once for all samples."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], rows: int = 6, *, data: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(rows, WIDTH))
        self.register_buffer("index", torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None] + LENGTH - 1)
        self.query, self.position = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)
        self.use, self.data = use, data

    def forward(self, inputs: Tensor) -> Tensor:
        table = inputs.flatten(0, 1) if self.data else self.table
        weights = self.use(self.query(inputs), self.position(self.norm(table)))
        return self.head(inputs + weights.reshape(*inputs.shape[:2], -1).sum(-1, keepdim=True))


INDEX = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None] + LENGTH - 1

USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, p: q @ p.T,
    "linear": lambda q, p: nn.functional.linear(q, p),
    "mm": lambda q, p: q.flatten(0, 1) @ p.T,
    "bmm": lambda q, p: torch.bmm(q, p.T.repeat(len(q), 1, 1)),
    "einsum": lambda q, p: torch.einsum("btd,rd->btr", q, p),
    "merged": lambda q, p: torch.bmm(q.flatten(0, 1).expand(1, -1, -1), p.T[None]),
    "gather": lambda q, p: (q @ p.T).gather(2, INDEX.expand(len(q), -1, -1)),
    "selected": lambda q, p: q[:, :, None] * p.index_select(0, INDEX.flatten()).view(LENGTH, LENGTH, WIDTH),
    "indexed": lambda q, p: (q[:, :, None] * torch.sigmoid(p[INDEX])).sum(-1),
    "looked up": lambda q, p: q + nn.functional.embedding(torch.zeros(len(q), LENGTH, dtype=torch.long), p),
    "halves": lambda q, p: torch.cat([(q @ half.T) for half in p.chunk(2)], -1),
    "attention": lambda q, p: nn.functional.scaled_dot_product_attention(q[:, None], p[None, None], p[None, None]),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("samples", [2, SAMPLES])
def test_tables_that_samples_share_are_found_however_they_are_used(use: str, samples: int) -> None:
    model = Relative(USES[use])
    kfac = build_kfac(model)
    inputs = torch.randn(samples, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="the outputs of position, norm are shared|the outputs of norm, position are"):
        outputs = model(inputs)
    outputs.square().sum(-1).mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    kfac.step()
    kept = {n for n, p in model.named_parameters() if torch.equal(p.grad, plain[n])}
    assert kept == {"table", "norm.weight", "norm.bias", "position.weight", "position.bias"}


class Biased(nn.Module):
    """A bias of relative positions by a network of its own, whose hidden layer is overwritten by its activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("places", torch.randn(1, 5, 2))
        self.bias = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 1))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        bias = self.bias(self.places).view(-1)[INDEX]
        return torch.softmax(inputs @ inputs.mT + bias, -1) @ self.head(inputs)


def test_every_layer_of_a_shared_network_is_found() -> None:
    model = Biased()
    kfac = build_kfac(model)
    with pytest.warns(UserWarning, match=r"the outputs of bias\.0, bias\.2 are shared"):
        model(torch.randn(SAMPLES, LENGTH, WIDTH)).square().sum().div(SAMPLES).backward()
    kfac.remove()


OWN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "in the samples' order": lambda q, p: q * p.view_as(q),
    "scores of a sample's own": lambda q, p: torch.bmm(q, p.view_as(q).mT),
    "turned": lambda q, p: q.flatten(0, 1) * p,
}


@pytest.mark.parametrize("use", OWN)
def test_rows_of_samples_are_none_that_they_share(use: str) -> None:
    model = Relative(OWN[use], data=True)
    kfac = build_kfac(model)
    inputs = torch.randn(SAMPLES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac.micro_batch(terms=SAMPLES)  # nothing else tells it from the positions
        model(inputs).square().sum(-1).mean().backward()
        kfac.step()
    assert set(kfac._parts.measurement.samples().values()) == {Samples.OWN}


EXPERTS = 4
ROUTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # Of [N, E] scores: gates times masks, as in NLLB-MoE's top-2 router.
    "gates": lambda x, s: s.amax(-1, keepdim=True) * nn.functional.one_hot(s.argmax(-1), EXPERTS),
    "experts first": lambda x, s: (s.amax(-1) * nn.functional.one_hot(s.argmax(-1), EXPERTS).T).T,
    # Every expert sees every row.
    "dense": lambda x, s: torch.einsum("end,ne->ned", x.expand(EXPERTS, -1, -1), s).sum(-1),
    "in the middle": lambda x, s: (x.sum(-1)[:, None, None] * s[:, :, None]).sum(-1),
}


class Routed(nn.Module):
    """Sequences laid end to end for a router over as many experts as a part of the batch has samples."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], tokens: slice = slice(None)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.router = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.head, self.use, self.tokens = nn.Linear(EXPERTS, 2), use, tokens

    def forward(self, inputs: Tensor) -> Tensor:
        rows = self.before(inputs).flatten(0, 1)
        routed = torch.zeros(len(rows), EXPERTS)
        kept = torch.arange(len(rows))[self.tokens]
        routed = routed.index_add(0, kept, self.use(rows[kept], self.router(rows[kept]).softmax(-1)))
        return self.head(routed).view(*inputs.shape[:2], 2)


def routed_factors(model: Routed, parts: int, inputs: Tensor) -> dict[str, Tensor]:
    kfac = build_kfac(model, loss_terms="token")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index, part in enumerate(inputs.chunk(parts)):
            kfac.micro_batch(divisor=inputs[..., 0].numel(), terms=part[..., 0].numel(), last=index + 1 == parts)
            (model(part).square().sum() / inputs[..., 0].numel()).backward()
        kfac.step()
    kfac.remove()
    assert set(kfac._parts.measurement.samples().values()) == {Samples.OWN}
    return factors(kfac)


@pytest.mark.parametrize("use", ROUTED)
def test_as_many_experts_as_samples(use: str) -> None:
    """Factors of a batch of 8 are those of two parts of 4, where 4 experts have rows of 4 samples."""
    inputs = torch.randn(2 * EXPERTS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    wanted, found = (routed_factors(Routed(ROUTED[use]), parts, inputs) for parts in (1, 2))
    for name, value in wanted.items():
        assert float(value.abs().max()) > 0
        assert_close(found[name], value)


def test_as_many_experts_as_samples_and_tokens_left_out() -> None:
    inputs = torch.randn(EXPERTS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    found = routed_factors(Routed(ROUTED["gates"], slice(1, None)), 1, inputs)
    assert float(found["router/G"].abs().max()) > 0


class Given(nn.Module):
    """Positions that the caller passes in, without a dimension for the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = nn.Embedding(2 * SAMPLES, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, inputs: Tensor, places: Tensor) -> Tensor:
        return self.head(torch.tanh(inputs + self.positions(places)))


@pytest.mark.parametrize("dims", [1, 2])
def test_given_positions_twice_as_many_as_samples_are_shared(dims: int) -> None:
    kfac = build_kfac(model := Given(), loss_terms="token")
    places = torch.arange(2 * SAMPLES)
    model(torch.randn(SAMPLES, 2 * SAMPLES, WIDTH), places.view((1,) * (dims - 1) + (-1,))).sum().backward()
    kfac.step()
    found = kfac._parts.measurement.samples()
    kfac.remove()
    assert {found[name] for name in found if name.startswith("positions")} == {
        Samples.PREPEND if dims == 1 else Samples.EXPAND
    }
