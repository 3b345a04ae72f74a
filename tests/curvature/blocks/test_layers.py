"""Linear, convolution and embedding blocks: factors, gradient matrices and updates, from first principles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_dist.curvature.blocks.layers.convolution import ConvolutionBlock
from tests.curvature.blocks.reference import (
    expected_factors,
    expected_update,
    gradient_matrix,
    input_rows,
    output_rows,
    positions_of,
    rounding,
)
from tests.curvature.measured import assert_close, build_kfac, factors, measure

Make = Callable[[], nn.Module]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def tokens(*shape: int) -> Tensor:
    return torch.randint(6, shape, generator=torch.Generator().manual_seed(1))


def frozen_bias(layer: nn.Module) -> nn.Module:
    assert isinstance(layer.bias, nn.Parameter)
    layer.bias.requires_grad_(False)
    return layer


LAYERS: dict[str, tuple[Make, Tensor]] = {
    "linear": (lambda: nn.Linear(4, 3), noise(5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), noise(5, 4)),
    "linear, frozen bias": (lambda: frozen_bias(nn.Linear(4, 3)), noise(5, 4)),
    "linear, one input, one output": (lambda: nn.Linear(1, 1), noise(5, 1)),
    "linear, tokens": (lambda: nn.Linear(4, 3), noise(5, 2, 4)),
    "linear, image of tokens": (lambda: nn.Linear(4, 3), noise(3, 2, 3, 4)),
    "linear, not contiguous": (lambda: nn.Linear(4, 3), noise(5, 4, 6).mT[:, ::2]),
    "linear, expanded": (lambda: nn.Linear(4, 3), noise(5, 1, 4).expand(5, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), noise(4, 2, 7)),
    "conv1d, one by one": (lambda: nn.Conv1d(2, 3, 1, bias=False), noise(4, 2, 3)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), noise(3, 2, 4, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 2, groups=2), noise(3, 4, 3, 3)),
    "conv2d, depthwise": (lambda: nn.Conv2d(3, 6, 2, groups=3, bias=False), noise(3, 3, 3, 3)),
    "conv2d, same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), noise(3, 2, 3, 4)),
    "conv2d, same and even": (lambda: nn.Conv2d(2, 2, (2, 4), padding="same", dilation=(1, 1)), noise(3, 2, 3, 4)),
    "conv2d, same and dilated": (lambda: nn.Conv2d(1, 2, (2, 3), padding="same", dilation=(3, 2)), noise(2, 1, 4, 5)),
    "conv2d, valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), noise(3, 2, 3, 4)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode="reflect"), noise(2, 2, 3, 4)),
    "conv2d, replicate": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate"), noise(2, 2, 3, 3)),
    "conv2d, circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), noise(2, 2, 3, 3)),
    "conv2d, circular and same": (
        lambda: nn.Conv2d(1, 2, 2, padding="same", padding_mode="circular"),
        noise(2, 1, 3, 3),
    ),
    "conv2d, channels last": (
        lambda: nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last),
        noise(3, 2, 3, 4).to(memory_format=torch.channels_last),
    ),
    "conv2d, not contiguous": (lambda: nn.Conv2d(2, 3, 2), noise(3, 4, 4, 3).transpose(2, 3)[:, ::2]),
    "conv2d, expanded": (lambda: nn.Conv2d(2, 3, 2), noise(3, 1, 3, 3).expand(3, 2, 3, 3)),
    "conv2d, frozen bias": (lambda: frozen_bias(nn.Conv2d(2, 3, 2)), noise(3, 2, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 2, (1, 2, 2), stride=(1, 2, 1), padding=(0, 1, 0)), noise(2, 2, 2, 3, 3)),
    "conv3d, groups": (lambda: nn.Conv3d(2, 4, 2, groups=2), noise(2, 2, 2, 3, 3)),
}
# Large enough for A to be measured by correlation.
CORRELATED: dict[str, tuple[Make, Tensor]] = {
    "conv2d, correlated": (lambda: nn.Conv2d(2, 2, 3, padding=1), noise(1, 2, 8, 9)),
    "conv2d, correlated groups": (lambda: nn.Conv2d(2, 2, 3, groups=2, padding="same"), noise(1, 2, 8, 8)),
    "conv2d, correlated without padding": (lambda: nn.Conv2d(1, 2, 3, bias=False), 3 + noise(1, 1, 9, 9)),
}
UNBATCHED: dict[str, tuple[Make, Tensor]] = {
    "linear": (lambda: nn.Linear(4, 3), noise(4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), noise(2, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 2, groups=2), noise(2, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), noise(2, 2, 3, 3)),
}
EMBEDDINGS: dict[str, tuple[Make, Tensor]] = {
    "embedding": (lambda: nn.Embedding(6, 3), tokens(5)),
    "embedding, sequences": (lambda: nn.Embedding(7, 3), tokens(4, 5)),
    "embedding, images of tokens": (lambda: nn.Embedding(6, 2), tokens(3, 2, 2)),
    "embedding, padding": (lambda: nn.Embedding(6, 3, padding_idx=2), tokens(4, 5)),
    "embedding, int32": (lambda: nn.Embedding(6, 3), tokens(4, 5).int()),
}
SOLVERS = ["cholesky", "eigen", "newton_schulz"]


def mean_loss(terms: float) -> Callable[[Tensor], Tensor]:
    """A loss that is a mean over terms, different in every output entry."""

    def loss(outputs: Tensor) -> Tensor:
        weights = torch.linspace(0.5, 2.0, outputs.numel()).view(outputs.shape)
        return (outputs.tanh() * weights).sum() / terms

    return loss


def check(make: Make, inputs: Tensor, sharing: str, solver: str, *, samples: int, damping: float = 0.05) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make())
    layer, loss = model[0], mean_loss(samples)
    a, g = expected_factors(input_rows(layer, inputs), output_rows(layer, inputs, loss), sharing, samples)
    kfac = build_kfac(model, sharing=sharing, inversion={"solver": solver, "damping": damping})
    loss(model(inputs)).backward()
    gradient = gradient_matrix(layer)
    pointers = [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
    kfac.step()
    found = factors(kfac)
    diagonal = isinstance(layer, nn.Embedding)
    assert_close(torch.diag_embed(found["0/A"]) if diagonal else found["0/A"], a)
    assert_close(found["0/G"], g)
    exact = solver == "eigen"
    expected = expected_update(gradient, a, g, damping, exact=exact)
    # Newton–Schulz stops at a residual of 1e-4.
    tolerance = max(1e-3 if solver == "newton_schulz" else 1e-5, rounding(a, g, damping, exact=exact))
    assert_close(gradient_matrix(layer), expected, tolerance)
    assert pointers == [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
    assert not kfac.coverage.uncovered or list(kfac.coverage.uncovered.values()) == ["frozen"]
    kfac.remove()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_and_update(name: str, sharing: str) -> None:
    make, inputs = LAYERS[name]
    check(make, inputs, sharing, "cholesky" if sharing == "expand" else "eigen", samples=inputs.shape[0])


@pytest.mark.parametrize("name", CORRELATED)
def test_convolutions_large_enough_to_correlate(name: str) -> None:
    make, inputs = CORRELATED[name]
    (block,) = build_kfac(nn.Sequential(make())).coverage.blocks
    assert isinstance(block, ConvolutionBlock)
    assert block._correlates(inputs)
    check(make, inputs, "expand", "cholesky", samples=inputs.shape[0], damping=1.0)


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_embeddings_expand_always(name: str, solver: str) -> None:
    make, inputs = EMBEDDINGS[name]
    check(make, inputs, "expand", solver, samples=inputs.shape[0])
    torch.manual_seed(0)
    model = nn.Sequential(make())
    kfac = build_kfac(model, sharing="reduce")
    mean_loss(len(inputs))(model(inputs)).backward()
    kfac.step()
    _, g = expected_factors(
        input_rows(model[0], inputs), output_rows(model[0], inputs, mean_loss(len(inputs))), "expand", len(inputs)
    )
    assert_close(factors(kfac)["0/G"], g)
    kfac.remove()


@pytest.mark.parametrize("name", UNBATCHED)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_unbatched_inputs_are_one_sample(name: str, sharing: str) -> None:
    make, inputs = UNBATCHED[name]
    check(make, inputs, sharing, "cholesky", samples=1)


class Pooled(nn.Module):
    """A label for the mean of what another layer makes of a sample's positions."""

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.before, self.head = before, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = self.before(x, x, x)[0] if isinstance(self.before, nn.MultiheadAttention) else self.before(x)
        out: Tensor = self.head(found.mean(-2) if found.ndim > 1 else found)
        return out


POOLED: dict[str, tuple[Make, Tensor]] = {
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), noise(3, 4)),
    "positions": (lambda: nn.Linear(5, 4), noise(3, 5)),
    "tokens": (lambda: nn.Embedding(6, 4), tokens(3)),
    "one token": (lambda: nn.Embedding(6, 4), tokens(1)[0]),
    "norm": (lambda: nn.LayerNorm(4), noise(3, 4)),
}


@pytest.mark.parametrize("name", POOLED)
def test_one_sample_without_a_batch_is_a_batch_of_one(name: str) -> None:
    make, inputs = POOLED[name]
    found = []
    for batch in (inputs, inputs[None]):
        torch.manual_seed(0)
        found.append(measure(Pooled(make()), batch, lambda outputs: outputs.tanh().square().mean()))
    assert found[0].keys() == found[1].keys()
    for key, value in found[1].items():
        assert_close(found[0][key], value)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["linear", "conv2d, groups", "linear, tokens"])
def test_every_solver_takes_its_own_damping(name: str, solver: str) -> None:
    make, inputs = LAYERS[name]
    for damping in (1e-2, 1.0):
        check(make, inputs, "expand", solver, samples=inputs.shape[0], damping=damping)


@pytest.mark.parametrize("name", [*LAYERS, *EMBEDDINGS])
def test_matrix_views_write_and_read_the_same_places(name: str) -> None:
    make, _ = {**LAYERS, **EMBEDDINGS}[name]
    (block,) = build_kfac(nn.Sequential(make())).coverage.blocks
    matrix, back = torch.zeros(block.matrix_shape), torch.full(block.matrix_shape, float("nan"))
    sources = [torch.randn_like(p) for p in block.parameters.values()]
    for tensor, view in block.matrix_views(sources, matrix):
        view.copy_(tensor)
    targets = [torch.full_like(p, float("nan")).detach() for p in block.parameters.values()]
    for tensor, view in block.matrix_views(targets, matrix):
        tensor.copy_(view)
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))
    for tensor, view in block.matrix_views(sources, back):
        view.copy_(tensor)
    assert torch.equal(back, matrix)  # every entry belongs to a parameter


# ---- layouts, uses


class TimeFirst(nn.Module):
    """Calls its layer with `[T, B, d]`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class Folded(TimeFirst):
    """Calls its layer with `[B·T, d]`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("wrap", [TimeFirst, Folded])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_samples_are_found_in_any_layout(wrap: type[TimeFirst], sharing: str) -> None:
    torch.manual_seed(0)
    layer, inputs, loss = nn.Linear(4, 3), noise(5, 3, 4), mean_loss(5)
    a, g = expected_factors(input_rows(layer, inputs), output_rows(layer, inputs, loss), sharing, 5)
    kfac = build_kfac(model := wrap(layer), sharing=sharing)
    loss(model(inputs)).backward()
    kfac.step()
    assert_close(factors(kfac)["layer/A"], a)
    assert_close(factors(kfac)["layer/G"], g)
    kfac.remove()


class Uses(nn.Module):
    """A layer that a forward pass uses several times, on different numbers of positions."""

    def __init__(self, layer: nn.Module, lengths: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.lengths = layer, lengths

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(part) for part in x.split(self.lengths, dim=-2)], dim=-2)


@pytest.mark.parametrize("lengths", [(2, 2), (1, 3), (1, 1, 2)])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_uses_in_one_forward_pass_are_positions(lengths: tuple[int, ...], sharing: str) -> None:
    """The same as one use on all the positions."""
    torch.manual_seed(0)
    layer, inputs, loss = nn.Linear(4, 3), noise(5, 4, 4), mean_loss(5)
    a, g = expected_factors(input_rows(layer, inputs), output_rows(layer, inputs, loss), sharing, 5)
    kfac = build_kfac(model := Uses(layer, lengths), sharing=sharing, inversion={"damping": 0.05})
    loss(model(inputs)).backward()
    gradient = gradient_matrix(layer)
    kfac.step()
    assert_close(factors(kfac)["layer/A"], a)
    assert_close(factors(kfac)["layer/G"], g)
    assert_close(gradient_matrix(layer), expected_update(gradient, a, g, 0.05, exact=False), 1e-3)
    kfac.remove()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_convolution_used_twice(sharing: str) -> None:
    torch.manual_seed(0)
    layer, inputs, loss = nn.Conv1d(2, 3, 2), noise(4, 2, 7), mean_loss(4)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.layer(x[..., :4]), self.layer(x[..., 3:])], dim=-1)

    a, g = expected_factors(input_rows(layer, inputs), output_rows(layer, inputs, loss), sharing, 4)
    kfac = build_kfac(model := Twice(), sharing=sharing)
    loss(model(inputs)).backward()
    kfac.step()
    assert_close(factors(kfac)["layer/A"], a)
    assert_close(factors(kfac)["layer/G"], g)
    kfac.remove()


def test_a_layer_that_did_not_run_keeps_its_gradient_and_its_factors() -> None:
    torch.manual_seed(0)

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor, side: str) -> Tensor:
            return self.left(x) if side == "left" else self.right(x)

    kfac, loss, inputs = build_kfac(model := Branches(), decay=0.5), mean_loss(5), noise(5, 4)
    loss(model(inputs, "left")).backward()
    kfac.step()
    assert model.right.weight.grad is None
    before = {name: f for name, f in factors(kfac).items() if name.startswith("left")}
    loss(model(inputs, "right")).backward()  # left.grad is there, from the first step
    kfac.step()
    after = factors(kfac)
    kfac.remove()
    for name, value in before.items():
        assert_close(after[name], value, 1e-6)
    a, g = expected_factors(input_rows(model.right, inputs), output_rows(model.right, inputs, loss), "expand", 5)
    assert_close(after["right/A"], a)
    assert_close(after["right/G"], g)


def test_never_measured_layer_keeps_the_plain_gradient() -> None:
    """A gradient that came without the layer's own forward pass: the identity, not a guess."""
    torch.manual_seed(0)

    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.used(x), self.bypassed.weight, self.bypassed.bias)

    kfac = build_kfac(model := Bypass())
    mean_loss(5)(model(noise(5, 4))).backward()
    expected = gradient_matrix(model.bypassed)
    kfac.step()
    assert_close(gradient_matrix(model.bypassed), expected, 1e-6)
    kfac.remove()


@pytest.mark.parametrize("limit", [2, 3])
def test_cut_factors_are_the_diagonal_blocks(limit: int) -> None:
    torch.manual_seed(0)
    make, inputs = LAYERS["conv2d, groups"]
    model, loss = nn.Sequential(make()), mean_loss(3)
    a, g = expected_factors(input_rows(model[0], inputs), output_rows(model[0], inputs, loss), "expand", 3)
    kfac = build_kfac(model, inversion={"max_factor_dim": limit, "damping": 0.05})
    loss(model(inputs)).backward()
    gradient = gradient_matrix(model[0])
    kfac.step()
    found: dict[str, Any] = factors(kfac)
    for name, whole in (("0/A", a), ("0/G", g)):
        kept = found[name] != 0
        assert (kept.sum() < kept.numel()) == (whole.shape[-1] > limit)
        assert_close(found[name], whole * kept)
    expected = expected_update(gradient, found["0/A"], found["0/G"], 0.05, exact=False)
    assert_close(gradient_matrix(model[0]), expected, 1e-3)
    kfac.remove()


def test_reference_positions_are_what_they_say() -> None:
    outputs = noise(2, 3, 4, 5)
    assert positions_of(nn.Conv2d(1, 3, 1), outputs).shape == (2, 20, 3)
    assert positions_of(nn.Linear(1, 5), outputs).shape == (2, 12, 5)


class Conv1D(nn.Module):
    """What transformers' class of this name is; the table knows it by its name alone."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_input_first_linear(solver: str, sharing: str) -> None:
    """The same as a linear layer with the transposed weight."""
    torch.manual_seed(0)
    given, usual = nn.Sequential(Conv1D(3, 4)), nn.Sequential(nn.Linear(4, 3))
    usual.load_state_dict({"0.weight": given[0].weight.detach().mT, "0.bias": given[0].bias.detach()})
    found = []
    for model in (given, usual):
        kfac = build_kfac(model, sharing=sharing, inversion={"solver": solver, "damping": 0.05})
        mean_loss(5)(model(noise(5, 2, 4))).backward()
        kfac.step()
        found.append(factors(kfac))
        kfac.remove()
    assert_close(found[0]["0/A"], found[1]["0/A"])
    assert_close(found[0]["0/G"], found[1]["0/G"])
    assert_close(given[0].weight.grad.mT, usual[0].weight.grad, 1e-4)
    assert_close(given[0].bias.grad, usual[0].bias.grad, 1e-4)
