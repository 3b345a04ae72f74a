"""Products with the curvature against the dense matrix, for every likelihood, and however a batch is shared out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kfac_dist.distributed.communicators.base import Communicator, SoloCommunicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.errors import ModelError
from kfac_dist.optimizers.second_order.batch_loss import BatchLoss, RecordedPass
from kfac_dist.optimizers.second_order.vectors import VectorSpace
from tests.harness import run_ranks
from tests.optimizers.tiny import Case, cases, dense

NAMES = ["categorical", "bernoulli", "gaussian", "tokens", "dropout and batch norm"]


def batch_loss(case: Case, parts: list[slice], communicator: Communicator) -> BatchLoss:
    passes = [RecordedPass.record(case.inputs[part], case.targets[part]) for part in parts]
    return BatchLoss(case.model, VectorSpace(case.model), passes, case.total, case.terms, communicator)


def vectors(space: VectorSpace) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, space.size, generator=generator, dtype=torch.float64).unbind())  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_the_dense_matrix(name: str) -> None:
    case = cases()[name]
    batch = batch_loss(case, [slice(None)], SoloCommunicator())
    matrix = dense(case, batch.space.parameters)
    v, w = vectors(batch.space)
    shared = torch.dot(v, w)
    for _ in range(2):  # the kept graph serves again
        product = batch.product(v, [shared])
        torch.testing.assert_close(product.vector, matrix @ v)
        assert product.form == pytest.approx(float(v @ matrix @ v))
        assert product.means == (pytest.approx(float(shared)),)
    expected = torch.stack([torch.stack([a @ matrix @ b for b in (v, w)]) for a in (v, w)])
    torch.testing.assert_close(batch.forms([v, w]), expected)


def test_the_loss_is_that_of_the_moved_model_and_nothing_is_left_behind() -> None:
    case = cases()["dropout and batch norm"]
    batch = batch_loss(case, [slice(None)], SoloCommunicator())
    v, _ = vectors(batch.space)
    buffers = [buffer.clone() for buffer in case.model.buffers()]
    before, random = batch.space.point(), torch.get_rng_state()
    found = float(batch.value(v))
    batch.product(v)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(batch.space.point(), before)
    assert all(torch.equal(a, b) for a, b in zip(buffers, case.model.buffers(), strict=True))
    for name, view in batch.space.views(before + v).items():
        batch.space.parameters[name].data.copy_(view)
    assert found == pytest.approx(float(case.total(case.model(case.inputs), case.targets).detach()) / case.terms)


class Recurrent(nn.Module):
    """In float32 an LSTM on the CPU is one fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.memory(x)[0][:, -1])
        return outputs


def test_recurrent_layers_are_multiplied_without_their_fused_kernels() -> None:
    torch.manual_seed(2)
    plain, model = cases()["categorical"], Recurrent()
    case = Case(model, torch.randn(6, 5, 3), plain.targets, plain.total, 6)
    batch = batch_loss(case, [slice(None)], SoloCommunicator())
    v = vectors(batch.space)[0].float()
    product = batch.product(v)
    precise = Case(model.double(), case.inputs.double(), plain.targets, plain.total, 6)
    matrix = dense(precise, dict(model.named_parameters()))
    torch.testing.assert_close(product.vector.double(), matrix @ v.double(), rtol=1e-4, atol=1e-5)


def test_an_operation_without_a_forward_derivative_is_named() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return 2 * gradient

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Twice.apply(super().forward(x))

    plain = cases()["gaussian"]
    case = Case(Net(3, 4).double(), plain.inputs, plain.targets, plain.total, 6)
    batch = batch_loss(case, [slice(None)], SoloCommunicator())
    with pytest.raises(ModelError, match=r"no forward-mode derivative.*autograd\.Function"):
        batch.product(batch.space.zeros())


class Picky(nn.Linear):
    """Refuses a number among its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x == 7).any()):
            raise ValueError("seven is not for me")
        return super().forward(x)


def _fail_on_one(calls: list[str]) -> list[str]:
    communicator = build_communicator(10.0)
    plain = cases()["gaussian"]
    inputs = plain.inputs.clone()
    if communicator.rank == 1:
        inputs[0] = 7
    case = Case(Picky(3, 4).double(), inputs, plain.targets, plain.total, 18)
    batch = batch_loss(case, [slice(None)], communicator)
    vector, messages = batch.space.zeros(), []
    for call in calls:
        with pytest.raises(ModelError) as caught:
            batch.forms([vector]) if call == "forms" else getattr(batch, call)(vector)
        messages.append(str(caught.value))
    communicator.close()
    return messages


def test_a_pass_that_fails_on_one_rank_fails_on_all() -> None:
    calls = ["product", "forms", "value"]
    own = "a pass over the step's batch that kfac.solver repeats failed: seven is not for me"
    assert run_ranks(3, _fail_on_one, calls) == [[f"rank 1: {own}"] * 3, [own] * 3, [f"rank 1: {own}"] * 3]


def _shared_out(names: list[str]) -> dict[str, tuple[Tensor, Tensor, float, float]]:
    """Uneven parts of the batch on each rank, the first rank's in two micro-batches."""
    communicator = build_communicator(20.0)
    cut = {1: [0, 6], 3: [0, 3, 4, 6]}[communicator.size]
    results = {}
    for name in names:
        case = cases()[name]
        rows = len(case.inputs)
        first, last = (min(cut[communicator.rank + i] * rows // 6, rows) for i in (0, 1))
        parts = [slice(first, last)]
        if communicator.rank == 0:
            parts = [slice(first, first + 1), slice(first + 1, last)]
        batch = batch_loss(case, parts, communicator)
        v, w = vectors(batch.space)
        product = batch.product(v)
        results[name] = product.vector, batch.forms([v, w]), product.form, float(batch.value(w))
    communicator.close()
    return results


def test_ranks_and_micro_batches_share_a_batch_without_changing_its_curvature() -> None:
    names = NAMES[:4]
    three = run_ranks(3, _shared_out, names)
    for name in names:
        case = cases()[name]
        batch = batch_loss(case, [slice(None)], SoloCommunicator())
        v, w = vectors(batch.space)
        expected = batch.product(v)
        for results in three:
            vector, forms, form, value = results[name]
            torch.testing.assert_close(vector, expected.vector)
            torch.testing.assert_close(forms, batch.forms([v, w]))
            assert form == pytest.approx(expected.form)
            assert value == pytest.approx(float(batch.value(w)))
            assert torch.equal(vector, three[0][name][0])
