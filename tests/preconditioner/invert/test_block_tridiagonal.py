"""K-FAC with the block-tridiagonal inverse: steps against dense matrices, on any ranks, resumed; refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from kfac_dist.curvature.inverses.solvers import tikhonov
from kfac_dist.errors import CheckpointError, ConfigError, ModelError
from kfac_dist.preconditioner.kfac import KFAC
from tests.curvature.test_block_tridiagonal import dense_inverse
from tests.harness import run_ranks

DAMPING = 0.05
INPUTS = torch.randn(18, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(18) % 3


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5),
        nn.Tanh(),
        nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 4), nn.ReLU()),
        nn.Linear(4, 3),
    )


def _kfac(model: nn.Module, fisher: str = "type2", **inversion: Any) -> KFAC:
    config = {
        "curvature": {"fisher": fisher, "likelihood": "categorical", "factor_every": 1},
        "inversion": {
            "structure": "block_tridiagonal",
            "solver": "eigen",
            "inverse_every": 1,
            "damping": DAMPING,
            **inversion,
        },
        "update": {"kl_clip": None},
    }
    return KFAC(model, config)


def _backward(model: nn.Module, kfac: KFAC, part: slice, terms: float) -> None:
    kfac.micro_batch(first_sample=part.start, divisor=terms)
    outputs = model(INPUTS[part])
    kfac.fisher_backward(outputs)
    (functional.cross_entropy(outputs, LABELS[part], reduction="sum") / terms).backward()


def _moments(model: nn.Sequential) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """A_ij and G_ij of the exact Fisher's Kronecker factors, from every sample and class by itself."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def seen(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        ones = [torch.ones(len(args[0]), 1)] if layer.bias is not None else []
        inputs.append(torch.cat([args[0].detach(), *ones], dim=1).double())
        outputs.append(output)

    handles = [layer.register_forward_hook(seen) for layer in layers]
    logits = model(INPUTS).log_softmax(1)
    probability = logits.detach().exp().double()
    g = [[torch.zeros(a.out_features, b.out_features, dtype=torch.float64) for b in layers] for a in layers]
    for label in range(3):
        grads = torch.autograd.grad(logits[:, label].sum(), outputs, retain_graph=True)
        rows = [grad.double() for grad in grads]
        for i, own in enumerate(rows):
            for j, other in enumerate(rows):
                g[i][j] += (own * probability[:, label, None]).T @ other / len(INPUTS)
    for handle in handles:
        handle.remove()
    return [[x.T @ y / len(INPUTS) for y in inputs] for x in inputs], g


def _gradients(model: nn.Sequential) -> Tensor:
    """Every layer's gradient matrix with the bias as last column, flat."""
    parts = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            bias = [] if layer.bias is None else [layer.bias.grad[:, None]]
            parts.append(torch.cat([layer.weight.grad, *bias], dim=1).flatten())
    return torch.cat(parts)


def _expected(model: nn.Sequential, gradients: Tensor) -> Tensor:
    a, g = _moments(model)
    for i in range(len(a)):
        traces = float(a[i][i].trace()), len(a[i][i]), float(g[i][i].trace()), len(g[i][i])
        on_a, on_g = tikhonov(*traces, DAMPING)
        a[i][i].diagonal().add_(on_a)
        g[i][i].diagonal().add_(on_g)
    return dense_inverse(a, g) @ gradients.double()


def test_a_step_is_the_dense_inverse_times_the_gradient() -> None:
    model = _model()
    kfac = _kfac(model)
    _backward(model, kfac, slice(0, 11), 18)
    _backward(model, kfac, slice(11, 18), 18)
    gradients = _gradients(model)
    kfac.step()
    torch.testing.assert_close(_gradients(model).double(), _expected(model, gradients), rtol=1e-3, atol=1e-5)
    kfac.remove()


def _steps(fisher: str, part: slice, terms: float) -> tuple[Tensor, dict[str, Any]]:
    model = _model()
    kfac = _kfac(model, fisher, inverse_every=2)
    for _ in range(3):
        model.zero_grad()
        _backward(model, kfac, part, terms)
        if dist.is_initialized():
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        kfac.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    state = kfac.state_dict()
    kfac.remove()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), state


def _on_ranks(fisher: str) -> Tensor:
    part = [slice(0, 5), slice(5, 11), slice(11, 18)][dist.get_rank()]
    return _steps(fisher, part, 18 / 3)[0]


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_three_ranks_take_the_steps_of_one(fisher: str) -> None:
    alone, _ = _steps(fisher, slice(0, 18), 18)
    for found in run_ranks(3, _on_ranks, fisher):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_it_resumes_from_its_state() -> None:
    after, state = _steps("empirical", slice(0, 18), 18)
    results = []
    for _ in range(2):
        model = _model()
        torch.nn.utils.vector_to_parameters(after.clone(), model.parameters())
        kfac = _kfac(model, "empirical", inverse_every=2)
        kfac.load_state_dict(state)
        _backward(model, kfac, slice(0, 18), 18)  # step 3: nothing is refreshed, so that the saved inverses serve
        kfac.step()
        results.append(_gradients(model))
        kfac.remove()
    assert torch.equal(*results)
    # Not what layers by themselves would have made of it.
    assert not torch.allclose(results[0], _plain_step(after), rtol=1e-2)


def _plain_step(point: Tensor) -> Tensor:
    model = _model()
    torch.nn.utils.vector_to_parameters(point.clone(), model.parameters())
    kfac = KFAC(model, {"update": {"kl_clip": None}, "inversion": {"damping": DAMPING}})
    _backward(model, kfac, slice(0, 18), 18)
    kfac.step()
    kfac.remove()
    return _gradients(model)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), _Residual(), nn.Linear(4, 3)), r"layer 1 \(_Residual\) breaks it"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)), r"layer 1 \(LayerNorm\) breaks it"),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 3)), r"layer 1 \(Softmax\) breaks it"),
        (nn.Sequential(nn.Tanh(), nn.Embedding(4, 4)), r"layer 1 \(Embedding\) breaks it"),
    ],
)
def test_a_model_that_is_no_chain_is_refused_by_the_layer(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=rf"structure block_tridiagonal needs a chain, .*{message}"):
        _kfac(model, "empirical")


def test_a_layer_that_is_left_out_breaks_the_chain() -> None:
    config = {
        "curvature": {"exclude": ("2*",)},
        "inversion": {"structure": "block_tridiagonal", "solver": "eigen"},
        "update": {"kl_clip": None},
    }
    with pytest.raises(ModelError, match=r"layer 2\.0 \(Linear\) breaks it"):
        KFAC(_model(), config)


@pytest.mark.parametrize("key", ["solver", "max_factor_dim", "stagger", "inverse_dtype"])
def test_options_that_a_chain_does_not_take_are_refused(key: str) -> None:
    values = {"solver": "cholesky", "max_factor_dim": 3, "stagger": 2, "inverse_dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=rf"inversion\.{key} \({values[key]}\) must be .* block_tridiagonal"):
        _kfac(_model(), inverse_every=4, **{key: values[key]})


def test_its_state_is_refused_by_layers_that_stand_alone() -> None:
    model = _model()
    chain = _kfac(model)
    state = chain.state_dict()
    chain.remove()
    alone = _kfac(model, structure="block_diagonal")  # payloads of a chain are as large as eigenbases
    with pytest.raises(CheckpointError, match=r"has a unit .*_next/0.*same kfac\.inversion\.structure"):
        alone.load_state_dict(state)
    alone.remove()


def test_spectra_of_its_factors_are_read() -> None:
    model = _model()
    kfac = _kfac(model)
    kfac.monitor.inspect()
    for _ in range(2):
        _backward(model, kfac, slice(0, 18), 18)
        kfac.step()
    [reading] = kfac.monitor.inspection()
    assert {factor.side for factor in reading.factors} == {"A", "G"}
    a, g = _moments(model)
    found = next(factor for factor in reading.factors if factor.unit == "3/G/0")
    on_g = tikhonov(float(a[-1][-1].trace()), len(a[-1][-1]), float(g[-1][-1].trace()), 3, DAMPING)[1]
    assert found.damping == pytest.approx(on_g, rel=1e-4)
    assert found.spectrum[-1] == pytest.approx(float(torch.linalg.eigvalsh(g[-1][-1])[-1]), rel=1e-4)
    kfac.remove()
