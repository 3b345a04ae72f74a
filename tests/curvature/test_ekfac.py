"""EKFAC's second moments against per-sample autograd, and against the exact block of nets that can be enumerated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC
from kfac_dist.curvature import ekfac as module_under_test
from kfac_dist.curvature.ekfac import level, turn
from kfac_dist.curvature.factors import Side
from tests.curvature.measured import assert_close

SAMPLES, CLASSES = 6, 3
LR = 0.1


def attach(model: nn.Module, *, damping: float = 0.1, inversion: Any = None, **curvature: Any) -> KFAC:
    """EKFAC whose bases are those of the first step, and that remembers only its last measurement."""
    return KFAC(
        model,
        {
            "curvature": {"factor_every": 1, "decay": 0.0, "likelihood": "categorical", **curvature},
            "inversion": {
                "solver": "ekfac",
                "inverse_every": 100,
                "early_refresh": 0,
                "damping": damping,
                **(inversion or {}),
            },
            "update": {"kl_clip": None},
        },
    )


def two_steps(model: nn.Module, kfac: KFAC, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Refresh on a first pass, measure in its bases on a second; returns the gradients of the second."""
    for _ in range(2):
        model.zero_grad()
        outputs = model(inputs)
        kfac.fisher_backward(outputs)
        loss(outputs).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        kfac.step()
    return gradients


def basis(kfac: KFAC, block: str) -> tuple[Tensor, Tensor]:
    """Q_G and Q_A, `[batch, n, n]`."""
    assert kfac._parts.moments is not None
    held = kfac._parts.moments._bases[block]
    return tuple(  # type: ignore[return-value]
        torch.stack([torch.block_diag(*matrices) for matrices in zip(*held.basis(block, side), strict=True)]).double()
        for side in (Side.G, Side.A)
    )


def measured(kfac: KFAC, block: str) -> Tensor:
    assert kfac._parts.moments is not None
    averages, unit = kfac._parts.moments.averages, kfac.monitor.plan.blocks[block].moments
    assert unit is not None
    weight = averages.scalars[0, averages.layout.index(unit)]
    return (averages.sums(unit) / weight).double().view(kfac.monitor.plan.blocks[block].matrix_shape)


def gradient_matrix(kfac: KFAC, block: str, gradients: dict[str, Tensor]) -> Tensor:
    own = next(b for b in kfac.coverage.blocks if b.name == block)
    matrix = torch.zeros(own.matrix_shape)
    for tensor, view in own.matrix_views([gradients[name] for name in own.parameters], matrix):
        view.copy_(tensor)
    return matrix.double()


def per_sample(
    model: nn.Module, kfac: KFAC, block: str, inputs: Tensor, loss: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Gradient matrices `[B, batch, d_out, d_in]` of every sample's own term."""
    rows = []
    for index in range(len(inputs)):
        model.zero_grad()
        # The whole batch again: the term of one sample is what is sent back.
        loss(index, model(inputs)).backward()
        rows.append(
            gradient_matrix(kfac, block, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
    return torch.stack(rows)


def squared(gradients: Tensor, q_g: Tensor, q_a: Tensor) -> Tensor:
    return (q_g.mT @ gradients @ q_a).square().mean(0)


class Tokens(nn.Module):
    """A linear layer over five positions, used twice, and a head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(inputs)))).mean(1))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.attention(inputs, inputs, inputs, need_weights=False)[0].mean(1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 6, 2, groups=2, stride=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        nn.Flatten(),
        nn.Linear(64, CLASSES, bias=False),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES)), (5,)),
    "tokens": (Tokens, (5, 4)),
    "convolutions": (convolutional, (2, 6, 6)),
    "attention": (Attends, (3, 4)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("values", [1, 2**22])
def test_it_is_the_mean_square_of_per_sample_gradients_in_the_basis(
    name: str, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a sample at a time, where a batch's gradients would take too much memory."""
    monkeypatch.setattr(module_under_test, "_VALUES", values)
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, inputs = make(), torch.randn(SAMPLES, *shape)
    labels = torch.randint(0, CLASSES, (SAMPLES,))
    kfac = attach(model)
    two_steps(model, kfac, inputs, lambda outputs: F.cross_entropy(outputs, labels))
    kfac.remove()
    checked = [name for name, block in kfac.monitor.plan.blocks.items() if block.moments is not None]
    assert len(checked) == len(kfac.coverage.blocks) > 1
    for block in checked:
        gradients = per_sample(model, kfac, block, inputs, lambda i, out: F.cross_entropy(out[i], labels[i]))
        assert_close(measured(kfac, block), squared(gradients, *basis(kfac, block)), 1e-4)


def test_by_hand() -> None:
    """One weight [1, 2], no bias, two samples: every number can be followed."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data.zero_()
    inputs, target = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0], [3.0]])
    kfac = attach(model, damping=0.5, likelihood="gaussian")

    def loss(outputs: Tensor) -> Tensor:
        return 0.5 * (outputs - target).square().sum(1).mean()

    two_steps(model, kfac, inputs, loss)
    # ∇_1 = −1·(2, 0), ∇_2 = −3·(0, 1); A = diag(2, ½) and G = (5), so that the basis is the axes:
    # S = ½ (4, 9) where K-FAC has 5·(2, ½); ∇ = ½ (−2, −3) over S + ½.
    torch.testing.assert_close(measured(kfac, "0").flatten().sort().values, torch.tensor([2.0, 4.5]).double())
    torch.testing.assert_close(model[0].weight.grad, torch.tensor([[-1 / 2.5, -1.5 / 5.0]]))


@pytest.mark.parametrize("name", ["linear", "tokens", "convolutions"])
def test_no_diagonal_in_this_basis_is_nearer_to_the_exact_block(name: str) -> None:
    """The block of the Fisher, label by label: EKFAC has diag(QᵀFQ), so that it can't be worse than K-FAC."""
    torch.manual_seed(1)
    make, shape = MODELS[name]
    model, inputs = make(), torch.randn(SAMPLES, *shape)
    kfac = attach(model, fisher="type2")
    two_steps(model, kfac, inputs, lambda outputs: F.cross_entropy(outputs, torch.zeros(SAMPLES, dtype=torch.long)))
    kfac.remove()
    probabilities = model(inputs).detach().softmax(1).double()
    nearer = 0
    for block in kfac.monitor.plan.blocks:
        q_g, q_a = basis(kfac, block)
        if len(q_g) > 1:
            continue  # groups: a block each
        fisher: Tensor = torch.zeros(())
        for label in range(CLASSES):
            rows = per_sample(
                model, kfac, block, inputs, lambda i, out, y=label: F.cross_entropy(out[i], torch.tensor(y))
            )
            flat = rows.flatten(1)
            fisher = fisher + flat.T @ (flat * probabilities[:, label, None]) / SAMPLES
        q = torch.kron(q_g[0], q_a[0])
        rotated = q.T @ fisher @ q
        own = measured(kfac, block).flatten()
        assert_close(own, rotated.diagonal(), 1e-4)
        held = kfac._parts.moments._bases[block]  # type: ignore[union-attr]
        d_g, d_a = held.sides[Side.G].vectors().double(), held.sides[Side.A].vectors().double()
        error, kronecker = (
            (rotated - d.diag()).norm() for d in (own, torch.outer(d_g.flatten(), d_a.flatten()).flatten())
        )
        assert error <= kronecker * (1 + 1e-6)
        nearer += bool(error < 0.999 * kronecker)
    assert nearer


def test_damping_is_exact() -> None:
    torch.manual_seed(2)
    model, inputs = MODELS["linear"][0](), torch.randn(SAMPLES, 5)
    labels = torch.randint(0, CLASSES, (SAMPLES,))
    kfac = attach(model, damping=0.3)
    gradients = two_steps(model, kfac, inputs, lambda outputs: F.cross_entropy(outputs, labels))
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    for block in kfac.monitor.plan.blocks:
        q_g, q_a = basis(kfac, block)
        q = torch.kron(q_g[0], q_a[0])
        curvature = q @ measured(kfac, block).flatten().diag() @ q.T
        gradient = gradient_matrix(kfac, block, gradients).flatten()
        wanted = torch.linalg.solve(curvature + 0.3 * torch.eye(len(gradient)).double(), gradient)
        assert_close(gradient_matrix(kfac, block, found).flatten(), wanted, 1e-4)


def test_each_token_is_a_term_in_the_expand_setting_and_each_sequence_in_the_reduce_setting() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    inputs, labels = torch.randn(SAMPLES, 4, 4), torch.randint(0, CLASSES, (SAMPLES, 4))
    terms = labels.numel()

    def loss(outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), labels.flatten())

    for sharing in ("expand", "reduce"):
        kfac = attach(model, sharing=sharing, loss_terms="token")
        two_steps(model, kfac, inputs, loss)
        kfac.remove()
        if sharing == "expand":  # positions don't see each other: a token's gradient is a sample's
            gradients = per_sample(
                model, kfac, "2", inputs.flatten(0, 1), lambda i, out: F.cross_entropy(out[i], labels.flatten()[i])
            )
            wanted = squared(gradients, *basis(kfac, "2"))
        else:
            gradients = per_sample(
                model, kfac, "2", inputs, lambda i, out: F.cross_entropy(out[i], labels[i], reduction="sum")
            )
            wanted = squared(gradients, *basis(kfac, "2")) * SAMPLES / terms
        assert_close(measured(kfac, "2"), wanted, 1e-4)


def test_sampled_rows_keep_the_scale() -> None:
    """Half of the samples, each of them twice in the batch: the same moments."""
    torch.manual_seed(4)
    for name in ("linear", "convolutions"):
        make, shape = MODELS[name]
        half, labels = torch.randn(SAMPLES, *shape), torch.randint(0, CLASSES, (SAMPLES,))
        inputs, doubled = half.repeat_interleave(2, 0), labels.repeat_interleave(2)
        model = make()
        kfac = attach(model, sample_fraction=0.5)
        two_steps(model, kfac, inputs, lambda outputs, y=doubled: F.cross_entropy(outputs, y))
        kfac.remove()
        for block in kfac.monitor.plan.blocks:
            gradients = per_sample(model, kfac, block, half, lambda i, out, y=labels: F.cross_entropy(out[i], y[i]))
            assert_close(measured(kfac, block), squared(gradients, *basis(kfac, block)), 1e-4)


def test_blocks_that_it_is_not_defined_for_keep_their_own_solve() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, CLASSES))
    kfac = attach(model)
    assert {name: block.moments is not None for name, block in kfac.monitor.plan.blocks.items()} == {
        "0": False,
        "1": False,
        "2": True,
    }


def test_the_choice_of_a_basis_in_a_null_space_does_not_matter() -> None:
    """Measured in two bases that differ inside the null spaces only: the same matrix once it is levelled."""
    torch.manual_seed(6)
    d_a, d_g = torch.tensor([[0.0, 1e-8, 1.0, 2.0]]), torch.tensor([[1e-9, 0.0, 3.0]])
    fisher = torch.randn(12, 12).double()
    fisher = fisher @ fisher.T
    found = []
    for _ in range(2):
        q_a, q_g = torch.eye(4).double(), torch.eye(3).double()
        q_a[:2, :2], q_g[:2, :2] = (torch.linalg.qr(torch.randn(2, 2).double())[0] for _ in range(2))
        q = torch.kron(q_g, q_a)
        levelled = level((q.T @ fisher @ q).diagonal().view(1, 3, 4), d_a, d_g)
        found.append(q @ levelled.flatten().diag() @ q.T)
    assert_close(found[0], found[1])
    torch.testing.assert_close(found[0].trace(), fisher.trace())


def random_basis(sizes: Sequence[int]) -> list[Tensor]:
    return [torch.linalg.qr(torch.randn(2, n, n, dtype=torch.float64))[0] for n in sizes]


def test_turning_keeps_the_diagonal_that_the_old_basis_implies() -> None:
    torch.manual_seed(5)
    a, g = (4, 3), (2, 3)
    old_a, new_a, old_g, new_g = random_basis(a), random_basis(a), random_basis(g), random_basis(g)
    moments = torch.rand(2, 5, 7)
    turned = turn(moments, list(zip(old_a, new_a, strict=True)), list(zip(old_g, new_g, strict=True)))
    for index in range(2):
        old, new = (
            torch.kron(torch.block_diag(*(q[index] for q in of_g)), torch.block_diag(*(q[index] for q in of_a)))
            for of_g, of_a in ((old_g, old_a), (new_g, new_a))
        )
        implied = old @ moments[index].flatten().double().diag() @ old.T
        assert_close(turned[index].flatten(), (new.T @ implied @ new).diagonal(), 1e-5)
    torch.testing.assert_close(turned.sum(), moments.sum())
