"""Unit-wise blocks of normalisation layers against per-sample gradients by torch.func."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from kfac_dist.config.schema import CurvatureConfig
from kfac_dist.curvature.blocks import find_blocks
from tests.curvature.measured import assert_close, build_kfac, factors, measure
from tests.harness import run_ranks

DAMPING = 0.05


def frozen_bias(layer: nn.Module) -> nn.Module:
    assert isinstance(layer.bias, nn.Parameter)
    layer.bias.requires_grad_(False)
    return layer


def evaluating(layer: nn.Module) -> nn.Module:
    """A BatchNorm with running statistics of its own, in evaluation mode."""
    layer.running_mean.normal_()  # type: ignore[union-attr,operator]
    layer.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr,operator]
    return layer.eval()


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm(5), (6, 5)),
    "layer, tokens": (lambda: nn.LayerNorm(5), (6, 4, 5)),
    "layer, two dimensions": (lambda: nn.LayerNorm((2, 3), eps=0.1), (6, 4, 2, 3)),
    "layer, no bias": (lambda: nn.LayerNorm(5, bias=False), (6, 4, 5)),
    "layer, frozen bias": (lambda: frozen_bias(nn.LayerNorm(5)), (6, 4, 5)),
    "rms": (lambda: nn.RMSNorm(5), (6, 5)),
    "rms, tokens": (lambda: nn.RMSNorm(5, eps=0.1), (6, 4, 5)),
    "group": (lambda: nn.GroupNorm(2, 4), (6, 4, 3)),
    "group, images": (lambda: nn.GroupNorm(2, 4, eps=0.1), (6, 4, 3, 2)),
    "group, no positions": (lambda: nn.GroupNorm(2, 4), (6, 4)),
    "batch 1d, evaluating": (lambda: evaluating(nn.BatchNorm1d(4)), (6, 4)),
    "batch 2d, evaluating": (lambda: evaluating(nn.BatchNorm2d(4)), (6, 4, 3, 2)),
    "batch 3d, evaluating": (lambda: evaluating(nn.BatchNorm3d(4)), (6, 4, 3, 2, 2)),
}


def randomised(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def per_sample_loss(outputs: Tensor) -> Tensor:
    """ℓ of one sample."""
    return (outputs.tanh() * torch.linspace(0.5, 2.0, outputs.numel()).view(outputs.shape)).sum()


def per_sample_gradients(layer: nn.Module, inputs: Tensor) -> Tensor:
    """`[B, units, 1 or 2]`."""
    trained = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return per_sample_loss(functional_call(layer, parameters, (x[None],)))

    gradients = vmap(grad(loss), in_dims=(None, 0))(trained, inputs)
    return torch.stack([gradients[name].flatten(1) for name in trained], dim=-1).double()


def measured_step(layer: nn.Module, inputs: Tensor, **curvature: str) -> tuple[Tensor, Tensor, Tensor]:
    """F, the gradient `[units, width]`, and the update in the same shape."""
    model = nn.Sequential(layer)
    kfac = build_kfac(model, inversion={"damping": DAMPING}, **curvature)
    outputs = model(inputs)
    (sum(per_sample_loss(row[None]) for row in outputs) / len(inputs)).backward()
    trained = [p for p in layer.parameters() if p.requires_grad]
    gradient = torch.stack([p.grad.flatten() for p in trained], dim=-1).double()
    kfac.step()
    update = torch.stack([p.grad.flatten() for p in trained], dim=-1).double()
    kfac.remove()
    return factors(kfac)["0/F"], gradient, update


@pytest.mark.parametrize("name", NORMS)
def test_unit_wise_fisher_and_update(name: str) -> None:
    make, shape = NORMS[name]
    layer, inputs = randomised(make), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    gradients = per_sample_gradients(layer, inputs)
    expected = torch.einsum("bui,buj->uij", gradients, gradients) / len(inputs)
    found, gradient, update = measured_step(layer, inputs)
    assert_close(found, expected)
    assert_close(gradient, gradients.mean(0))
    damped = expected + DAMPING * torch.eye(expected.shape[-1])
    assert_close(update, torch.linalg.solve(damped, gradient), 1e-4)


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.BatchNorm1d(4), (6, 4)), (lambda: nn.BatchNorm2d(4, eps=0.1), (6, 4, 3, 2))],
    ids=["1d", "2d"],
)
def test_batch_norm_in_training_takes_its_normalised_inputs_as_given(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """`x̂ = (x − mean) / sqrt(var + ε)` over the batch; the measured running statistics move once, by the forward."""
    layer, inputs = randomised(make), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    over = [0, *range(2, inputs.ndim)]
    mean, variance = inputs.mean(over, keepdim=True), inputs.var(over, unbiased=False, keepdim=True)
    normal = ((inputs - mean) / (variance + layer.eps).sqrt()).requires_grad_(False)
    gamma, beta = (p.detach().view(1, -1, *[1] * (inputs.ndim - 2)) for p in (layer.weight, layer.bias))
    outputs = (gamma * normal + beta).requires_grad_()
    (g,) = torch.autograd.grad(sum(per_sample_loss(row[None]) for row in outputs), outputs)
    rows = torch.stack([(g * normal).flatten(2).sum(-1) if g.ndim > 2 else g * normal,
                        g.flatten(2).sum(-1) if g.ndim > 2 else g], dim=-1)  # fmt: skip
    found, _, _ = measured_step(layer, inputs)
    assert_close(found, torch.einsum("bui,buj->uij", rows, rows) / len(inputs))
    assert int(layer.num_batches_tracked) == 1


def test_token_losses_keep_positions_apart() -> None:
    """A term a token: `F = (1/n) Σ_bt`, no sum over a sample's positions first."""
    layer, inputs = randomised(lambda: nn.LayerNorm(5)), torch.randn(6, 4, 5)
    outputs = layer(inputs).detach().requires_grad_()
    (g,) = torch.autograd.grad(outputs.tanh().square().sum(), outputs)
    normal = nn.functional.layer_norm(inputs, (5,))
    rows = torch.stack([g * normal, g], dim=-1).flatten(0, 1)
    kfac = build_kfac(model := nn.Sequential(layer), loss_terms="token")
    (model(inputs).tanh().square().sum() / 24).backward()
    kfac.step()
    assert_close(factors(kfac)["0/F"], torch.einsum("bui,buj->uij", rows, rows) / 24)
    kfac.remove()


def test_uses_of_one_sample_add_up() -> None:
    """A norm used twice: the sample's gradient is the sum, as autograd has it."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = randomised(lambda: nn.LayerNorm(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + 3 * self.norm(x.flip(-1))

    model, inputs = Twice(), torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    gradients = per_sample_gradients(model, inputs)
    kfac = build_kfac(model)
    (sum(per_sample_loss(row[None]) for row in model(inputs)) / 6).backward()
    kfac.step()
    assert_close(factors(kfac)["norm/F"], torch.einsum("bui,buj->uij", gradients, gradients) / 6)
    kfac.remove()


class LayerNorm2d(nn.LayerNorm):
    """As torchvision's and timm's."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (3, 2, 4, 2)])  # the second could be read channels last, too
def test_layer_norms_of_images(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def loss(outputs: Tensor) -> Tensor:
        return (outputs.tanh() * torch.linspace(0.5, 2.0, outputs[0].numel()).view(outputs.shape[1:])).sum() / 3

    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    wanted = measure(Permuted(), images, loss)["norm/F"]
    assert_close(measure(nn.Sequential(LayerNorm2d(2)), images, loss)["0/F"], wanted)


def test_a_norm_that_turns_its_input_around_and_not_back_has_no_block() -> None:
    class Odd(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2))

    coverage = find_blocks(nn.Sequential(Odd(2), nn.Linear(4, 4)), CurvatureConfig())
    assert [block.name for block in coverage.blocks] == ["1"]
    assert coverage.uncovered["0.weight"] == "Odd.forward computes something else than nn.LayerNorm"


def synchronised() -> tuple[dict[str, str], list[str]]:
    """`SyncBatchNorm` itself runs on GPUs only; what it refuses is known before it has run."""
    before = nn.SyncBatchNorm.forward
    nn.SyncBatchNorm.forward = lambda self, x: F.batch_norm(x, None, None, self.weight, self.bias, training=True)  # type: ignore[method-assign]
    try:
        model = nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4), nn.Linear(4, 2))
        kfac = build_kfac(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                model.zero_grad()
                model(torch.randn(6, 3)).square().sum(1).mean().backward()
                kfac.step()
        kfac.remove()
    finally:
        nn.SyncBatchNorm.forward = before  # type: ignore[method-assign]
    return dict(kfac.coverage.mismatched), [block.name for block in kfac.coverage.blocks]


def test_a_norm_over_all_ranks_is_named_with_that_reason() -> None:
    for mismatched, blocks in run_ranks(2, synchronised):
        assert blocks == ["0", "2"]
        assert mismatched.keys() == {"1"}
        assert mismatched["1"].startswith("SyncBatchNorm normalises over all 2 ranks")
    assert synchronised() == ({}, ["0", "1", "2"])
