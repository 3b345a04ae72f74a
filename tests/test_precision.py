"""Double models get double steps, at any damping and on any ranks; torch's default dtype changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import mpmath  # type: ignore[import-untyped]
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC
from kfac_dist.config.schema import DType
from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.curvature.ekfac import level
from kfac_dist.curvature.inverses.solvers import tikhonov
from kfac_dist.precision import settled, working
from tests.harness import run_ranks
from tests.preconditioner.models import train
from tests.preconditioner.test_models import CASES as CASES_BY_LAYER
from tests.preconditioner.workloads import build, global_batch, part, place, relative, wrap

DAMPING = 1e-8
EXACT = 1e-9
SAMPLES = 60
CLASSES = 3
SIZES = (5, 6, 4, CLASSES)


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [[nn.Linear(n, m), nn.Tanh()] for n, m in itertools.pairwise(SIZES)]
    return nn.Sequential(*itertools.chain(*layers)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(SAMPLES, SIZES[0], generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, CLASSES, (SAMPLES,), generator=generator)


def share() -> slice:
    rank, size = place()
    edges = [SAMPLES * (2 * i) // (2 * size + 1) if i < size else SAMPLES for i in range(size + 1)]
    return slice(edges[rank], edges[rank + 1])


def options(solver: str = "cholesky", curvature: Any = (), inversion: Any = (), **distribution: Any) -> dict[str, Any]:
    return {
        "curvature": {"factor_every": 1, "decay": 0.5, **dict(curvature)},
        "inversion": {"solver": solver, "inverse_every": 1, "damping": DAMPING, **dict(inversion)},
        "distribution": distribution,
        "update": {"kl_clip": None},
    }


def steps_of(config: Mapping[str, Any], *, sharded: bool = False, double: bool = True) -> dict[str, Tensor]:
    """The preconditioned gradients of a second step with the first one's batch."""
    model: nn.Module = mlp() if double else mlp().float()
    inputs, labels = (tensor[share()] for tensor in batch())
    inputs = inputs if double else inputs.float()
    size = place()[1]
    wrapped = model
    if sharded:
        fully_shard(model[2])
        fully_shard(model)
    elif size > 1:
        wrapped = DistributedDataParallel(model)
    kfac = KFAC(wrapped, config)
    for _ in range(2):
        model.zero_grad()
        kfac.micro_batch(first_sample=share().start, divisor=SAMPLES / size, classes=labels)
        (F.cross_entropy(wrapped(inputs), labels, reduction="sum") * size / SAMPLES).backward()
        kfac.step()
    found = {name: p.grad for name, p in model.named_parameters()}
    kfac.remove()
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in found.items()}


class Exact:
    """Rows of each layer, `[samples, n]`: inputs with the bias's one, gradients of each sample's own loss."""

    def __init__(self) -> None:
        model, (inputs, labels) = mlp(), batch()
        seen: list[tuple[Tensor, Tensor]] = []

        def forward(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            seen.append((args[0].detach(), output))

        layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        for _, layer in layers:
            layer.register_forward_hook(forward)
        F.cross_entropy(model(inputs), labels, reduction="sum").backward()
        self.names = [name for name, _ in layers]
        self.labels = labels
        self.a = [torch.cat([a, torch.ones_like(a[:, :1])], dim=1) for a, _ in seen]
        self.g = [output.grad for _, output in seen]
        self.gradients = [g.T @ a / SAMPLES for a, g in zip(self.a, self.g, strict=True)]

    def factors(self) -> Iterator[tuple[Tensor, Tensor]]:
        for a, g in zip(self.a, self.g, strict=True):
            yield a.T @ a / SAMPLES, g.T @ g / SAMPLES

    def by_name(self, updates: list[Tensor]) -> dict[str, Tensor]:
        pairs = zip(self.names, updates, strict=True)
        return {
            key: value
            for name, u in pairs
            for key, value in ((f"{name}.weight", u[:, :-1]), (f"{name}.bias", u[:, -1]))
        }

    def tikhonov(self) -> dict[str, Tensor]:
        return self.by_name([damped(a, g, v) for (a, g), v in zip(self.factors(), self.gradients, strict=True)])

    def eigen(self, *, rescaled: bool) -> dict[str, Tensor]:
        updates = []
        for index, (a, g) in enumerate(self.factors()):
            (d_a, q_a), (d_g, q_g) = torch.linalg.eigh(a), torch.linalg.eigh(g)
            d_a, d_g = d_a.clamp(min=0), d_g.clamp(min=0)
            curvature = d_g[:, None] * d_a
            if rescaled:
                squares = (self.g[index] @ q_g).square().T @ (self.a[index] @ q_a).square() / SAMPLES
                curvature = level(squares[None], d_a[None], d_g[None])[0]
            updates.append(q_g @ (q_g.T @ self.gradients[index] @ q_a / (curvature + DAMPING)) @ q_a.T)
        return self.by_name(updates)

    def tridiagonal(self) -> dict[str, Tensor]:
        a = [[x.T @ y / SAMPLES for y in self.a] for x in self.a]
        g = [[x.T @ y / SAMPLES for y in self.g] for x in self.g]
        for i in range(len(a)):
            traces = float(a[i][i].trace()), len(a[i][i]), float(g[i][i].trace()), len(g[i][i])
            on_a, on_g = tikhonov(*traces, DAMPING)
            a[i][i].diagonal().add_(on_a)
            g[i][i].diagonal().add_(on_g)
        return self.by_name(precisely(a, g, self.gradients))

    def by_class(self) -> dict[str, Tensor]:
        updates = []
        for a, g, v in zip(self.a, self.g, self.gradients, strict=True):
            rearranged = torch.zeros(a.shape[1] ** 2, g.shape[1] ** 2, dtype=torch.float64)
            for label in range(CLASSES):
                own = self.labels == label
                own_a, own_g = a[own].T @ a[own] / own.sum(), g[own].T @ g[own] / own.sum()
                rearranged += int(own.sum()) / SAMPLES * torch.outer(own_a.flatten(), own_g.flatten())
            left, size, right = torch.linalg.svd(rearranged)
            best_a = (left[:, 0] * size[0]).view(a.shape[1], a.shape[1])
            best_g = right[0].view(g.shape[1], g.shape[1])
            updates.append(damped(best_a * best_a.trace().sign(), best_g * best_g.trace().sign(), v))
        return self.by_name(updates)


def precisely(a: list[list[Tensor]], g: list[list[Tensor]], gradients: list[Tensor]) -> list[Tensor]:
    """The paper's `Ξᵀ Λ Ξ v` in 40 digits: in double, differences of dense matrices cost more than is asked here."""
    mpmath.mp.dps = 40
    f = [
        [mpmath.matrix(torch.kron(x, y).tolist()) for x, y in zip(*rows, strict=True)]
        for rows in zip(g, a, strict=True)
    ]
    v = [mpmath.matrix(gradient.reshape(-1, 1).tolist()) for gradient in gradients]
    count = range(len(v) - 1)
    psi = [f[i][i + 1] * mpmath.inverse(f[i + 1][i + 1]) for i in count]
    left = [*(v[i] - psi[i] * v[i + 1] for i in count), v[-1]]
    told = [*(f[i][i] - psi[i] * f[i + 1][i + 1] * psi[i].T for i in count), f[-1][-1]]
    weighted = [mpmath.lu_solve(s, own) for s, own in zip(told, left, strict=True)]
    out = [weighted[0], *(weighted[i + 1] - psi[i].T * weighted[i] for i in count)]
    flat = [torch.tensor([float(x) for x in own], dtype=torch.float64) for own in out]
    return [x.view_as(gradient) for x, gradient in zip(flat, gradients, strict=True)]


def damped(a: Tensor, g: Tensor, gradient: Tensor) -> Tensor:
    on_a, on_g = tikhonov(float(a.trace()), len(a), float(g.trace()), len(g), DAMPING)
    a, g = a + on_a * torch.eye(len(a)).double(), g + on_g * torch.eye(len(g)).double()
    return torch.linalg.solve(g, torch.linalg.solve(a, gradient.T).T)


def expected(kind: str) -> dict[str, Tensor]:
    exact = Exact()
    match kind:
        case "eigen" | "ekfac":
            return exact.eigen(rescaled=kind == "ekfac")
        case "tridiagonal":
            return exact.tridiagonal()
        case "by class":
            return exact.by_class()
    return exact.tikhonov()


TRIDIAGONAL = {"structure": "block_tridiagonal"}
BY_CLASS = {"class_conditional": {"classes": CLASSES}}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("cholesky", options()),
    ("cholesky", options(pack_triangles=True, reduction="reduce_scatter", placement="owner")),
    (
        "cholesky",
        options(reduction="reduce_scatter", reduce_every="step", assignment="balanced"),
    ),
    ("cholesky", options(inversion={"offload": True}, overlap=False, buckets=1)),
    ("cholesky", options(curvature={"factor_dtype": "float64"})),
    ("newton_schulz", options("newton_schulz")),
    ("newton_schulz", options("newton_schulz", placement="owner")),
    ("eigen", options("eigen")),
    ("eigen", options("eigen", reduction="reduce_scatter", placement="owner")),
    ("ekfac", options("ekfac")),
    ("ekfac", options("ekfac", reduction="reduce_scatter", placement="owner")),
    ("tridiagonal", options("eigen", inversion=TRIDIAGONAL)),
    ("by class", options(curvature=BY_CLASS)),
    ("by class", options(curvature=BY_CLASS, reduction="reduce_scatter", placement="owner")),
]


def all_cases() -> list[dict[str, Tensor]]:
    return [steps_of(config) for _, config in CASES]


@pytest.mark.parametrize("size", [1, 2])
def test_a_double_model_gets_the_step_of_exact_algebra(size: int) -> None:
    for found in run_ranks(size, all_cases, timeout=120):
        for (kind, config), step in zip(CASES, found, strict=True):
            wanted = expected(kind)
            assert all(value.dtype is torch.float64 for value in step.values())
            assert relative(step, wanted) < EXACT, (kind, config)


def sharded_cases() -> list[dict[str, Tensor]]:
    config = options(reduction="reduce_scatter", reduce_every="step")
    return [steps_of(config, sharded=True), steps_of(options("ekfac"), sharded=True)]


def test_so_does_a_sharded_one() -> None:
    for first, second in run_ranks(2, sharded_cases, timeout=120):
        assert relative(first, expected("cholesky")) < EXACT
        assert relative(second, expected("ekfac")) < EXACT


@contextmanager
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_that_is_double_by_default_needs_no_word() -> None:
    with double_by_default():
        assert relative(steps_of(options()), expected("cholesky")) < EXACT


def test_factors_may_be_kept_in_less_or_in_more_than_the_model_has() -> None:
    mild = {"damping": 1e-2}
    whole = steps_of(options(inversion=mild))
    less = steps_of(options(curvature={"factor_dtype": "float32"}, inversion=mild))
    single = steps_of(options(inversion=mild), double=False)
    more = steps_of(options(curvature={"factor_dtype": "float64"}, inversion=mild), double=False)
    assert 1e-9 < relative(less, whole) < 1e-4
    assert 1e-9 < relative(single, whole) < 1e-4
    assert relative(more, whole) < relative(single, whole)
    assert {value.dtype for value in more.values()} == {torch.float32}


class Mixed(nn.Sequential):
    """A double layer between single ones."""

    def forward(self, inputs: Tensor) -> Tensor:
        first, act, middle, again, last = self
        hidden = act(middle(act(first(inputs.float())).double()))
        return last(again(hidden).float())


def mixed_steps() -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
    torch.manual_seed(0)
    model = Mixed(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4).double(), nn.Tanh(), nn.Linear(4, CLASSES))
    wrapped = DistributedDataParallel(model) if place()[1] > 1 else model
    kfac = KFAC(wrapped, options(inversion={"damping": 1e-3}, placement="owner"))
    inputs, labels = (tensor[share()] for tensor in batch())
    kfac.micro_batch(divisor=SAMPLES / place()[1])
    (F.cross_entropy(wrapped(inputs), labels, reduction="sum") * place()[1] / SAMPLES).backward()
    kfac.step()
    kfac.remove()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, {name: value.dtype for name, value in found.items()}


def test_a_model_of_both_is_preconditioned_in_double() -> None:
    (alone, dtypes), *_ = run_ranks(1, mixed_steps, process_group=False)
    assert dtypes["2.weight"] is torch.float64
    assert dtypes["0.weight"] is dtypes["4.weight"] is torch.float32
    model = Mixed(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4).double(), nn.Tanh(), nn.Linear(4, CLASSES))
    assert all(
        alone[name].shape == p.shape and bool(alone[name].abs().max() > 0) for name, p in model.named_parameters()
    )
    for found, _ in run_ranks(2, mixed_steps):
        assert relative(found, alone) < 1e-5


DEFAULTS: list[tuple[str, dict[str, Any]]] = [
    ("mlp", {"inversion": {"solver": "newton_schulz"}}),
    ("mlp", {"curvature": {"class_conditional": {"classes": 4}}, "distribution": {"reduction": "reduce_scatter"}}),
    ("mlp", {"inversion": {"solver": "eigen", "structure": "block_tridiagonal"}}),
    ("mlp", {"curvature": {"fisher": "type2", "uncovered": "diagonal_mc", "exclude": ["2"]}}),
    ("conv", {"inversion": {"solver": "ekfac"}, "update": {"graft": "gradient"}}),
    ("conv", {"curvature": {"fisher": "mc"}, "distribution": {"placement": "owner"}}),
    ("token", {"curvature": {"loss_terms": "token", "uncovered": "diagonal"}, "inversion": {"adapt": {"every": 1}}}),
]


def trained(*, wide: bool) -> list[dict[str, Tensor]]:
    """Parameters of single models after three steps and a checkpoint, with the default dtype as it is or double."""
    found = []
    own, size = part(*place()), place()[1]
    for name, sections in DEFAULTS:
        model, batches = build(name), [global_batch(name, step) for step in range(3)]
        curvature = {"factor_every": 1, "likelihood": "categorical", **sections.get("curvature", {})}
        with double_by_default() if wide else nullcontext():
            wrapped = wrap(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            kfac = KFAC(wrapped, {**sections, "curvature": curvature}, optimizer=optimizer)
            for inputs, labels in batches:
                divisor = labels.numel() / size
                terms = float(labels[own].numel())
                kfac.micro_batch(first_sample=own.start, divisor=divisor, terms=terms, classes=labels[own])
                optimizer.zero_grad()
                outputs = wrapped(inputs[own])
                kfac.fisher_backward(outputs)
                (F.cross_entropy(outputs.flatten(0, -2), labels[own].flatten(), reduction="sum") / divisor).backward()
                kfac.step()
                optimizer.step()
            kfac.load_state_dict(kfac.state_dict())
            kfac.metrics()
            kfac.remove()
        found.append({key: value.detach() for key, value in model.named_parameters()})
    return found


def both() -> list[bool]:
    pairs = zip(trained(wide=False), trained(wide=True), strict=True)
    return [torch.equal(plain[key], wide[key]) for plain, wide in pairs for key in plain]


@pytest.mark.parametrize("size", [1, 2])
def test_single_models_do_not_mind_the_default_dtype(size: int) -> None:
    for same in run_ranks(size, both, timeout=120):
        assert len(same) > 20
        assert all(same)


@pytest.mark.parametrize("name", ["traps, reduce", "transposed convolution", "attention", "tied, sampled"])
def test_every_kind_of_layer_may_be_double(name: str) -> None:
    case = replace(CASES_BY_LAYER[name], steps=3)
    single = train(case)

    def inputs(generator: torch.Generator) -> Tensor:
        values = case.inputs(generator)
        return values.double() if values.is_floating_point() else values

    double = train(replace(case, make=lambda: case.make().double(), inputs=inputs))
    assert {value.dtype for value in double.values()} == {torch.float64}
    assert 0 < relative({key: value.float() for key, value in double.items()}, single) < 1e-5


def test_auto_follows_the_model_and_what_is_said_stays() -> None:
    double, single = [torch.zeros((), dtype=torch.float64)], [torch.zeros((), dtype=torch.bfloat16)]
    kinds = [
        ({}, double, (DType.FLOAT64,) * 3, torch.float64),
        ({}, single, (DType.FLOAT32,) * 3, torch.float32),
        ({}, single + double, (DType.FLOAT64,) * 3, torch.float64),
        ({"factor_dtype": "float32"}, double, (DType.FLOAT32,) * 3, torch.float32),
        ({"factor_dtype": "float64"}, single, (DType.FLOAT64,) * 3, torch.float64),
        ({"inverse_dtype": "bfloat16"}, single, (DType.FLOAT32, DType.BFLOAT16, DType.FLOAT32), torch.float32),
        ({"inverse_dtype": "float64"}, single, (DType.FLOAT32, DType.FLOAT64, DType.FLOAT64), torch.float64),
        ({"communication_dtype": "bfloat16"}, double, (DType.FLOAT64, DType.FLOAT64, DType.BFLOAT16), torch.float64),
    ]
    places = {"factor_dtype": "curvature", "inverse_dtype": "inversion", "communication_dtype": "distribution"}
    for said, parameters, expected_kinds, precision in kinds:
        asked = parse_kfac({places[key]: {key: value} for key, value in said.items()})
        config = settled(asked, parameters)
        found = config.curvature.factor_dtype, config.inversion.inverse_dtype, config.distribution.communication_dtype
        assert (found, working(config)) == (expected_kinds, precision), said
        assert settled(config, single) == config
