"""The samples' place in what a layer is given: told by what the model has done to its inputs, not by shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC
from kfac_dist.curvature.capture.constants import Constants
from kfac_dist.curvature.capture.provenance import Provenance, readings_number, readings_of
from kfac_dist.curvature.capture.samples import PassShapes, TensorDim
from tests.curvature.measured import assert_close, build_kfac, factors
from tests.harness import run_ranks

B, T, D, C = 4, 8, 6, 5

# Of an input [B, T, D]: what comes out still has each sample's values in places of its own.
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "turned": lambda x: x.transpose(0, 1),
    "turned, by name": lambda x: torch.transpose(x, dim0=1, dim1=0),
    "permuted": lambda x: x.permute(1, 0, 2),
    "a matrix's T": lambda x: x.flatten(1).T.unflatten(0, (T, D)).movedim(2, 1),
    "folded": lambda x: x.flatten(0, 1),
    "turned and folded": lambda x: x.transpose(0, 1).reshape(-1, D),
    "turned and copied": lambda x: x.transpose(0, 1).contiguous().view(T * B, D),
    "patches": lambda x: x.reshape(B, 2, 4, D).transpose(1, 2).reshape(B * 4, 2, D),
    "as many as samples": lambda x: x.reshape(B * 2, 4, D),
    "heads": lambda x: x.view(B, T, 2, 3).transpose(1, 2).reshape(B * 2, T, 3),
    "heads, time first": lambda x: x.transpose(0, 1).reshape(T, B * 2, 3).transpose(0, 1),
    "of three": lambda x: torch.cat([x, x, x], dim=-1).reshape(B, T, 3, D).permute(2, 1, 0, 3).unbind(0)[1],
    "chunks": lambda x: x.transpose(0, 1).chunk(2, dim=-1)[1],
    "cut": lambda x: x.transpose(0, 1)[1:5, :, ::2],
    "one step": lambda x: x.transpose(0, 1)[3],
    "a row in front": lambda x: torch.cat([x[:, :1] * 1.0, x], dim=1).transpose(0, 1),
    "padded": lambda x: F.pad(x, (0, 2)).transpose(0, 1),
    "stacked": lambda x: torch.stack([x[:, step] for step in range(T)]),
    "stacked behind": lambda x: torch.stack([x[:, step] for step in range(T)], dim=1).flatten(0, 1),
    "views one after the other": lambda x: torch.cat([x[:, 0], x[:, 1], x[:, 2]]),
    "repeated": lambda x: x[:, 0].repeat(3, 1),
    "tiled behind": lambda x: x[:, 0].tile(2, 3, 1),
    "beams": lambda x: x[:, 0].repeat_interleave(3, 0),
    "expanded": lambda x: x.transpose(0, 1)[:, None].expand(T, 3, B, D).reshape(T * 3, B, D),
    "summed": lambda x: x.transpose(0, 1).sum(0, keepdim=True).expand(T, B, D) / T,
    "row by row": lambda x: (x.transpose(0, 1) + torch.zeros(T, 1, D)).clone(),
    "beside another": lambda x: torch.zeros(T, 1, D) + x.mean(1)[None],
    "einsum": lambda x: torch.einsum("btd,de->tbe", x, torch.eye(D)),
    "matmul": lambda x: x.transpose(0, 1) @ torch.eye(D),
    "bmm": lambda x: torch.bmm(torch.eye(T).expand(B, T, T), x),
    "one layer": lambda x: F.linear(x.transpose(0, 1), torch.eye(D)),
    "images": lambda x: F.avg_pool2d(x.view(B, 1, T, D), 2).flatten(2),
}


def followed(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Provenance, Tensor]:
    """A model that hands `function(x)` to a layer and returns its input."""

    class Model(nn.Module):
        def forward(self, given: Tensor) -> Tensor:
            constants.provenance.called("layer", moved := function(given))
            seen.append(moved)
            return given * 1.0

    seen: list[Tensor] = []
    constants = Constants(model := Model(), ((x,), {}))
    with constants:
        output = model(x)
    constants.provenance.ended(output)
    return constants.provenance, seen[0]


@pytest.mark.parametrize("name", MOVES)
def test_samples_are_followed(name: str) -> None:
    x = torch.arange(1.0, B + 1)[:, None, None].expand(B, T, D).clone().requires_grad_()
    provenance, moved = followed(MOVES[name], x)
    for place in (TensorDim("inputs", 0), TensorDim("outputs", 0)):
        [reading] = provenance.readings(place)["layer"]
        first = reading.applied(moved, B, max(moved.ndim - 1, 1))
        assert len(first) in (B, moved.shape[0])
        rows = first.reshape(B, -1)
        kept = rows != 0
        assert kept.any(dim=1).all()
        assert torch.equal(rows[kept], torch.arange(1.0, B + 1)[:, None].expand_as(rows)[kept])
        assert readings_of(readings_number((reading, None, reading))) == (reading, None, reading)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[torch.tensor([2, 0])],  # some samples
        lambda x: x[x[..., 0] > 0] * 2.0,  # some positions
        lambda x: x.flatten(0, 1)[torch.arange(8)].relu(),
        lambda x: x.flatten(0, 1).index_select(0, torch.arange(8)) + 1.0,
        lambda x: x.transpose(0, 1)[:, torch.tensor([1, 3])],
    ],
)
def test_rows_that_an_index_picks_are_by_themselves(function: Callable[[Tensor], Tensor]) -> None:
    provenance, _ = followed(function, torch.randn(B, T, D).requires_grad_())
    [reading] = provenance.readings(TensorDim("inputs", 0))["layer"]
    assert reading is not None
    assert reading.picked
    assert readings_of(readings_number((reading, reading))) == (reading, reading)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, None, torch.tensor([0, 1])],
        lambda x: torch.ones(B, T, D),
        lambda x: x.permute(1, 0, 2).reshape(2, T // 2, B, D).permute(0, 2, 1, 3).reshape(2 * B * T // 2, D),  # between
        lambda x: x.view(B, T, D).view_as(torch.empty(T, B, D)),  # samples cut to pieces
        lambda x: torch.nested.nested_tensor(list(x)).to_padded_tensor(0.0),
    ],
)
def test_what_is_not_known_is_left_open(function: Callable[[Tensor], Tensor]) -> None:
    provenance, _ = followed(function, torch.randn(B, T, D).requires_grad_())
    assert provenance.readings(TensorDim("inputs", 0)) == {}


@pytest.mark.parametrize(
    ("function", "left_open"),
    [
        (lambda x: F.linear(x, torch.eye(D)).relu(), True),
        (lambda x: F.layer_norm(x, (D,)) * x.mean(-1, keepdim=True), True),
        (lambda x: (x @ x.mT).softmax(-1) @ x, False),
        (lambda x: F.scaled_dot_product_attention(x, x, x), False),
        (lambda x: torch.einsum("btd,bsd->bts", x, x) @ x, False),
        (lambda x: F.linear(x.mT, torch.eye(T)).mT, False),  # mixes time
        (lambda x: x - x.mean(1, keepdim=True), False),
        (lambda x: x.cumsum(dim=1), False),
        (lambda x: F.conv1d(x.mT, torch.ones(D, D, 1)).mT, False),
        (lambda x: nn.LSTM(D, D, batch_first=True)(x)[0], False),
    ],
)
def test_a_dimension_that_is_mixed_is_not_the_samples(function: Callable[[Tensor], Tensor], left_open: bool) -> None:
    constants = Constants(nn.Module(), ((x := torch.randn(B, T, D).requires_grad_(),), {}))
    with constants:
        output = function(x)
    constants.provenance.ended(output)
    assert constants.provenance.leaves_open(PassShapes(((B, T, D),), ((B, T, D),))) is left_open


class Between(nn.Module):
    """An embedding of pixels or tokens, a layer and a norm that are given it as `turn` says, and a class a sample."""

    def __init__(self, turn: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.turn = turn
        self.first, self.inner, self.norm, self.last = (
            nn.Linear(D, D),
            nn.Linear(D, D),
            nn.LayerNorm(D),
            nn.Linear(D, C),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Of [B, 16, D], whatever is done in between."""
        hidden = self.first(x)
        match self.turn:
            case "patches":  # [4·B, 4, D], as in MobileViT
                hidden = hidden.reshape(len(x), 4, 4, D).transpose(1, 2).reshape(len(x) * 4, 4, D)
                hidden = self.norm(self.inner(hidden).tanh()).reshape(len(x), 4, 4, D).transpose(1, 2).flatten(1, 2)
            case "time first":  # [16, B, D]
                hidden = self.norm(self.inner(hidden.transpose(0, 1)).tanh()).transpose(0, 1)
            case "time first, folded":  # [16·B, D]
                hidden = self.norm(self.inner(hidden.transpose(0, 1).flatten(0, 1)).tanh())
                hidden = hidden.unflatten(0, (16, -1)).transpose(0, 1)
        return self.last(hidden.mean(1))

    def rows(self, seen: Tensor) -> Tensor:
        """What a layer in between saw or gave, as [B, T, D]."""
        match self.turn:
            case "patches":
                return seen.unflatten(0, (-1, 4)).flatten(1, 2)
            case "time first":
                return seen.transpose(0, 1)
        return seen.unflatten(0, (16, -1)).transpose(0, 1)


TURNS = ["patches", "time first", "time first, folded"]


@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("turn", TURNS)
def test_reduce_sums_over_a_samples_own_positions(turn: str, size: int) -> None:
    model, x = Between(turn), torch.randn(size, 16, D, generator=torch.Generator().manual_seed(size))
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        for layer in (model.inner, model.norm)
    ]
    loss = F.cross_entropy(model(x), torch.arange(size) % C)
    (ia, iout), (na, nout) = seen
    ig, ng = (model.rows(grad) * size for grad in torch.autograd.grad(loss, (iout, nout)))
    for handle in handles:
        handle.remove()
    kfac = build_kfac(model, sharing="reduce")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(model(x), torch.arange(size) % C).backward()
        kfac.step()
    found = factors(kfac)
    kfac.remove()
    mean = F.pad(model.rows(ia).mean(1), (0, 1), value=1.0)
    assert_close(found["inner/A"][0], mean.mT @ mean / size)
    assert_close(found["inner/G"][0], ig.sum(1).mT @ ig.sum(1) / size)
    scale = (F.layer_norm(model.rows(na), (D,)) * ng).sum(1)
    units = torch.stack([scale, ng.sum(1)], dim=-1)
    expected = torch.einsum("bdi,bdj->dij", units, units) / size
    assert_close(next(found[key] for key in found if key.startswith("norm/")).reshape(D, 2, 2), expected)


class Parts(nn.Module):
    """Layers for a function to use."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.use = use
        self.conv, self.group, self.head = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, C)
        self.linear, self.rms, self.last = nn.Linear(D, D), nn.RMSNorm(D), nn.Linear(D, C)
        self.recurrent, self.attention = nn.LSTM(D, D), nn.MultiheadAttention(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def frames(x: Tensor) -> Tensor:
    """Images of two channels, `[B, T, 2, 4, 4]`."""
    return x[..., None, None, None] * torch.linspace(-1, 1, 192).view(D, 2, 4, 4) @ torch.ones(4, 4) / 4


USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "frames, time outside": lambda m, x: m.head(
        m.group(m.conv(frames(x).sum(2).transpose(0, 1).flatten(0, 1))).mean((2, 3)).unflatten(0, (T, -1)).mean(0)
    ),
    "rows of a recurrent layer": lambda m, x: m.last(
        m.rms(m.linear(m.recurrent(x.transpose(0, 1))[0].reshape(-1, D))).unflatten(0, (T, -1)).mean(0)
    ),
    "either way in turn": lambda m, x: m.last(
        (m.linear(x).tanh() + m.linear(x.transpose(0, 1)).transpose(0, 1)).mean(1)
    ),
    "two views": lambda m, x: m.last(m.rms(m.linear(torch.cat([x.mean(1), x.amax(1)]))).unflatten(0, (2, -1)).sum(0)),
    "attention over patches, time first": lambda m, x: m.last(
        m.attention(*[m.linear(x.reshape(len(x) * 2, 4, D)).transpose(0, 1)] * 3)[0]
        .transpose(0, 1)
        .reshape(len(x), -1, D)
        .mean(1)
    ),
}


def some(m: Any, x: Tensor, rows: Tensor) -> Tensor:
    """A layer for some of all positions, as experts have it."""
    hidden = x.flatten(0, 1)
    return m.last(hidden.index_add(0, rows, m.linear(hidden[rows]).tanh()).unflatten(0, x.shape[:2]).mean(1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("solver", ["cholesky", "ekfac"])
@pytest.mark.parametrize("fisher", ["empirical", "type2"])
def test_rows_of_an_expert_are_by_themselves_also_where_samples_divide_their_number(
    sharing: str, solver: str, fisher: str
) -> None:
    """Seven rows or eight of four samples: each counts for itself."""
    x = torch.randn(4, T, D, generator=torch.Generator().manual_seed(4))
    for number in (7, 8):
        rows = torch.randperm(4 * T, generator=torch.Generator().manual_seed(number))[:number]
        model = Parts(lambda m, given, rows=rows: some(m, given, rows))
        seen: list[Tensor] = []
        handle = model.linear.register_forward_hook(
            lambda module, args, output, seen=seen: seen.extend([*args, output])
        )
        outputs = model(x)
        handle.remove()
        probability = outputs.detach().softmax(-1)
        columns = [probability - F.one_hot(torch.arange(4) % C, C)]
        if fisher == "type2":
            columns = [probability[:, own, None].sqrt() * (torch.eye(C)[own] - probability) for own in range(C)]
        grads = [torch.autograd.grad(outputs, seen[1], column, retain_graph=True)[0] for column in columns]
        inversion = {"solver": solver, "damping": 0.1}
        kfac = build_kfac(model, sharing=sharing, fisher=fisher, likelihood="categorical", inversion=inversion)
        outputs = model(x)
        kfac.fisher_backward(outputs)
        F.cross_entropy(outputs, torch.arange(4) % C).backward()
        kfac.step()
        found = factors(kfac)
        kfac.remove()
        inputs = F.pad(seen[0].detach(), (0, 1), value=1.0)
        assert_close(found["linear/A"][0], inputs.mT @ inputs / number)
        assert_close(found["linear/G"][0], sum(grad.mT @ grad for grad in grads) / 4)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("use", USES)
def test_reduced_factors_of_a_batch_are_the_mean_of_its_samples(use: str, size: int) -> None:
    x = torch.randn(size, T, D, generator=torch.Generator().manual_seed(size))
    model = Parts(USES[use])
    kfac, whole, single = build_kfac(model, sharing="reduce"), {}, []
    for own in (slice(None), *(slice(index, index + 1) for index in range(size))):
        model.zero_grad()
        F.cross_entropy(model(x[own]), torch.arange(size)[own] % C).backward()
        kfac.step()
        found = {name: value for name, value in factors(kfac).items() if not value.isnan().any()}
        whole, single = (whole, [*single, found]) if whole else (found, [])
    kfac.remove()
    assert len(whole) >= 4
    largest = max(float(value.norm()) for name, value in whole.items() if name.endswith("G"))
    for name, value in whole.items():
        mean = torch.stack([found[name] for found in single]).mean(0)
        assert float((value - mean).norm()) <= 1e-4 * float(mean.norm()) + 1e-10 * largest, name


def trained(turn: str, solver: str, likelihood: dict[str, Any]) -> list[Tensor]:
    """Parameters after three steps on this rank's part of 8 samples; 4 on each of two."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = Between(turn)
    wrapped = DistributedDataParallel(model) if size > 1 else model
    kfac = KFAC(
        wrapped,
        {
            "curvature": {"factor_every": 1, "sharing": "reduce", **likelihood},
            "inversion": {"inverse_every": 1, "damping": 0.1, "solver": solver},
            "update": {"kl_clip": None},
        },
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 16, D, generator=torch.Generator().manual_seed(3)), torch.arange(8) % C
    own = slice(rank * 8 // size, (rank + 1) * 8 // size)
    for _ in range(3):
        optimizer.zero_grad()
        kfac.micro_batch(first_sample=own.start)
        outputs = wrapped(x[own])
        kfac.fisher_backward(outputs)
        F.cross_entropy(outputs, y[own]).backward()
        kfac.step()
        optimizer.step()
    kfac.remove()
    return [parameter.detach() for parameter in model.parameters()]


RUNS = [
    (turn, solver, likelihood)
    for turn in TURNS
    for solver, likelihood in (
        ("cholesky", {}),
        ("ekfac", {}),
        ("cholesky", {"fisher": "type2", "likelihood": "categorical"}),
    )
]


def trained_on_ranks() -> list[list[Tensor]]:
    return [trained(*run) for run in RUNS]


def test_two_ranks_give_what_one_gives() -> None:
    """B = 4 on each: `[16, 4, d]` is both that of 16 steps of 4 samples and that of 4 patches of each."""
    [first, _] = run_ranks(2, trained_on_ranks)
    for run, found in zip(RUNS, first, strict=True):
        for one, two in zip(trained(*run), found, strict=True):
            assert_close(two.double(), one.double(), tolerance=2e-5)


def test_where_nothing_tells_a_layer_is_named() -> None:
    model, x = Between("patches"), torch.randn(4, 16, D, generator=torch.Generator().manual_seed(4))
    model.first.register_forward_hook(lambda module, args, output: torch.stack(output.unbind()))
    for size, sharing, told in ((4, "reduce", ["inner", "norm"]), (4, "expand", ["norm"]), (2, "reduce", [])):
        kfac = build_kfac(model, sharing=sharing)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                F.cross_entropy(model(x[:size]), torch.arange(size)).backward()
                kfac.step()
        said = [str(warning.message) for warning in caught if "nothing tells which" in str(warning.message)]
        assert sorted(text.split(", and nothing")[0] for text in said) == [
            f"layer {name} gives [16, 4, 6] for 4 samples" for name in told
        ]
        kfac.remove()


def test_a_resumed_run_knows_where_samples_are() -> None:
    found = []
    for resumed in (False, True):
        model = Between("time first, folded")
        kfac = build_kfac(model, sharing="reduce")
        x = torch.randn(8, 16, D, generator=torch.Generator().manual_seed(8))
        for size in (8, 4):
            if resumed and size == 4:
                state = kfac.state_dict()
                kfac.remove()
                kfac = build_kfac(model, sharing="reduce")
                kfac.load_state_dict(state)
            model.zero_grad()
            F.cross_entropy(model(x[:size]), torch.arange(size) % C).backward()
            kfac.step()
        found.append(factors(kfac))
        kfac.remove()
    for name, factor in found[0].items():
        assert torch.equal(factor, found[1][name])
