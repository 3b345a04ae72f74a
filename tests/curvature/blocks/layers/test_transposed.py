"""Transposed convolutions: factors by autograd, the exact Fisher of one position, and where the weight's entries go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.curvature.blocks.reference import expected_factors, expected_update
from tests.curvature.measured import assert_close, build_kfac, factors, measure

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.ConvTranspose2d(2, 3, 2), (2, 3, 4)),
    "stride": (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 3, 3)),
    "uneven": (nn.ConvTranspose2d(2, 3, (2, 3), stride=(3, 1), padding=(0, 2), output_padding=(2, 0)), (2, 2, 4)),
    "groups": (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 2, 3)),
    "depthwise": (nn.ConvTranspose2d(2, 2, 3, stride=2, groups=2, bias=False), (2, 3, 2)),
    "dilation": (nn.ConvTranspose2d(2, 2, 3, dilation=(2, 1), padding=(1, 0)), (2, 3, 3)),
    "cropped": (nn.ConvTranspose2d(2, 2, 2, padding=2, stride=2), (2, 4, 4)),
    "1d": (nn.ConvTranspose1d(2, 3, 4, stride=2, padding=1), (2, 5)),
    "3d": (nn.ConvTranspose3d(2, 2, (1, 2, 2), stride=(1, 2, 1)), (2, 2, 2, 2)),
}


def inputs_of(shape: tuple[int, ...], samples: int = 3) -> Tensor:
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(1))


def mean_loss(outputs: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 2.0, outputs.numel()).view(outputs.shape)
    return (outputs.tanh() * weights).sum() / len(outputs)


def rows_by_autograd(layer: nn.Module, inputs: Tensor) -> Tensor:
    """`[groups, B, T, d_in(+1)]`: the gradient of each entry of a group's first output channel."""
    outputs, groups = layer(inputs), layer.groups
    fan_in, fan_out = layer.in_channels // groups, layer.out_channels // groups
    rows = []
    for group in range(groups):
        for entry in outputs[:, group * fan_out].flatten():
            grads = torch.autograd.grad(entry, list(layer.parameters()), retain_graph=True)
            own = [grads[0][group * fan_in : (group + 1) * fan_in, 0].flatten()]
            rows.append(torch.cat([*own, *(grad[group * fan_out, None] for grad in grads[1:])]))
    return torch.stack(rows).view(groups, len(inputs), -1, rows[0].numel()).double()


def matrix(layer: nn.Module) -> Tensor:
    """Gradients as `[groups, c_out/groups, d_in(+1)]`."""
    weight = layer.weight.grad.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(2)
    if layer.bias is None:
        return weight.double()
    return torch.cat([weight, layer.bias.grad.view(layer.groups, -1, 1)], dim=2).double()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_and_update(name: str, sharing: str) -> None:
    layer, shape = LAYERS[name]
    inputs = inputs_of(shape)
    outputs = layer(inputs).detach().requires_grad_()
    (grad,) = torch.autograd.grad(mean_loss(outputs), outputs)
    rows = grad.flatten(2).unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).double()
    a, g = expected_factors(rows_by_autograd(layer, inputs), rows, sharing, len(inputs))
    model = nn.Sequential(layer)
    model.zero_grad()
    kfac = build_kfac(model, sharing=sharing, inversion={"damping": 0.05})
    mean_loss(model(inputs)).backward()
    gradient = matrix(layer)
    kfac.step()
    found = factors(kfac)
    assert_close(found["0/A"], a)
    assert_close(found["0/G"], g)
    assert_close(matrix(layer), expected_update(gradient, a, g, 0.05, exact=False), 1e-3)
    kfac.remove()


def test_the_size_that_a_call_asks_for() -> None:
    """`output_size` chooses among the sizes that one stride allows."""

    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)

        def forward(self, x: Tensor, size: list[int]) -> Tensor:
            return self.up(x, output_size=size)

    model, inputs = Asked(), inputs_of((2, 3, 3))
    given = nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=(1, 0)))
    given.load_state_dict({key.replace("up", "0"): value for key, value in model.state_dict().items()})
    kfac = build_kfac(model)
    mean_loss(model(inputs, [6, 5])).backward()
    kfac.step()
    wanted = measure(given, inputs, mean_loss)
    for side in "AG":
        assert_close(factors(kfac)[f"up/{side}"], wanted[f"0/{side}"])
    kfac.remove()


def test_one_position_is_exact() -> None:
    """Type-2, one sample, one output position: A ⊗ G is the generalised Gauss-Newton matrix itself."""
    layer = nn.ConvTranspose2d(3, 4, 1)
    inputs = inputs_of((3, 1, 1), samples=1)
    model = nn.Sequential(layer, nn.Flatten())
    found = measure(model, inputs, lambda out: out.square().sum() / 2, fisher="type2", likelihood="gaussian", decay=0.0)
    jacobian = torch.autograd.functional.jacobian(
        lambda w, b: torch.func.functional_call(model, {"0.weight": w, "0.bias": b}, inputs),
        (layer.weight.detach(), layer.bias.detach()),
    )
    columns = torch.cat([jacobian[0][0].flatten(3).transpose(1, 2).flatten(2), jacobian[1][0][:, :, None]], dim=2)
    exact = columns.flatten(1).T.double() @ columns.flatten(1).double()  # over (c_out, c_in and bias)
    assert_close(torch.kron(found["0/G"][0], found["0/A"][0]), exact)
