"""Weights that several modules share: the partial traces of an enumerated Fisher, and uses of one layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.blocks.reference import expected_factors, expected_update, gradient_matrix
from tests.curvature.measured import assert_close, build_kfac, factors, measure

VOCABULARY, WIDTH, SAMPLES, LENGTH = 7, 4, 5, 3


class Language(nn.Module):
    """Tokens to logits by one table; `head_first` names the weight after the head."""

    def __init__(self, *, head_first: bool = False, padding: int | None = None, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        table, head = nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding), nn.Linear(WIDTH, VOCABULARY, bias=False)
        for name, module in [("head", head), ("table", table)] if head_first else [("table", table), ("head", head)]:
            self.add_module(name, module)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        head.weight = table.weight if tied else nn.Parameter(table.weight.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.table(tokens))))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator) for _ in range(2)]
    return draw[0], draw[1]


def token_loss(labels: Tensor) -> object:
    return lambda outputs: F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), ignore_index=-100)


def enumerated(model: Language, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """L and R from every term's own gradient with respect to the table and the head of the untied model."""
    untied = Language(padding=model.table.padding_idx, tied=False)
    untied.table.weight.data.copy_(model.table.weight)
    untied.head.weight.data.copy_(model.table.weight)
    untied.hidden.load_state_dict(model.hidden.state_dict())
    left, right = torch.zeros(VOCABULARY).double(), torch.zeros(WIDTH, WIDTH).double()
    valid = labels != -100
    for token, label in zip(tokens[valid], labels[valid], strict=True):
        untied.zero_grad()
        F.cross_entropy(untied(token.view(1, 1))[0], label.view(1)).backward()
        for weight in (untied.table.weight, untied.head.weight):
            grad = weight.grad.double()
            left += grad.square().sum(1)
            right += grad.T @ grad
    return left / valid.sum(), right / valid.sum()


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("solver", ["cholesky", "eigen"])
def test_partial_traces_of_the_enumerated_fisher(head_first: bool, padding: int | None, solver: str) -> None:
    model, (tokens, labels) = Language(head_first=head_first, padding=padding), batch()
    labels[0, 1:] = labels[3, 2] = -100
    left, right = enumerated(model, tokens, labels)
    assert_close(left.sum(), right.trace())
    kfac = build_kfac(model, loss_terms="token", inversion={"damping": 0.01, "solver": solver})
    terms = int((labels != -100).sum())
    kfac.micro_batch(divisor=terms, terms=terms)
    token_loss(labels)(model(tokens)).backward()
    gradient = gradient_matrix(model.table)
    kfac.step()
    name = "head" if head_first else "table"
    found = factors(kfac)
    assert_close(found[f"{name}/A"][0], left)
    assert_close(found[f"{name}/G"][0], right)
    expected = expected_update(
        gradient, torch.diag(left / left.sum())[None], right[None], 0.01, exact=solver == "eigen"
    )
    assert_close(gradient_matrix(model.table), expected, 1e-3)
    kfac.remove()


def test_type2_traces_are_those_of_all_columns() -> None:
    """Σ over labels of p(label) times the empirical traces at that label."""
    model, (tokens, _) = Language(), batch()
    left, right = torch.zeros(VOCABULARY).double(), torch.zeros(WIDTH, WIDTH).double()
    probability = model(tokens).softmax(-1).double()
    for label in range(VOCABULARY):
        for index in torch.cartesian_prod(torch.arange(SAMPLES), torch.arange(LENGTH)).tolist():
            own = enumerated(model, tokens[index[0], index[1]].view(1, 1), torch.full((1, 1), label))
            p = probability[index[0], index[1], label].detach() / (SAMPLES * LENGTH)
            left, right = left + p * own[0], right + p * own[1]
    found = measure(model, tokens, token_loss(batch()[1]), fisher="type2", likelihood="categorical", loss_terms="token")
    assert_close(found["table/A"][0], left)
    assert_close(found["table/G"][0], right)


def test_sampled_rows_keep_the_scale() -> None:
    model, (tokens, labels) = Language(), batch()
    tokens, labels = tokens.repeat(40, 1), labels.repeat(40, 1)
    whole = measure(model, tokens, token_loss(labels), loss_terms="token")
    half = measure(model, tokens, token_loss(labels), loss_terms="token", sample_fraction=0.5)
    for name, value in whole.items():
        assert 0.7 < float(half[name].sum(-1).sum() / value.sum(-1).sum()) < 1.4, name


class Twice(nn.Module):
    """Two layers with one weight; the second's bias is its own unless `tied_bias`."""

    def __init__(self, *, tied_bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        if tied_bias:
            self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x[:, :2]), self.second(x[:, 2:])], dim=1)


@pytest.mark.parametrize("tied_bias", [False, True])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_linear_layers_with_one_weight_are_uses_of_one(tied_bias: bool, sharing: str) -> None:
    model, inputs = Twice(tied_bias=tied_bias), torch.randn(SAMPLES, 3, WIDTH)
    one = nn.Linear(WIDTH, WIDTH, bias=tied_bias)
    one.weight = model.first.weight

    def loss(outputs: Tensor) -> Tensor:
        return outputs.square().sum() / SAMPLES

    grad = 2 * model(inputs).detach() / SAMPLES
    rows = torch.cat([inputs, torch.ones(SAMPLES, 3, 1)], dim=2) if tied_bias else inputs
    a, g = expected_factors(rows[None].double(), grad[None].double(), sharing, SAMPLES)
    found = measure(model, inputs, loss, sharing=sharing)
    assert_close(found["first/A"], a)
    assert_close(found["first/G"], g)


def test_embeddings_with_one_table_are_uses_of_one() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
            self.decoder.weight = self.encoder.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return torch.cat([self.encoder(tokens[:, :2]), self.decoder(tokens[:, 2:])], dim=1)

    model, (tokens, _) = Tables(), batch()
    alone = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH))
    alone[0].weight = nn.Parameter(model.encoder.weight.detach().clone())

    def loss(outputs: Tensor) -> Tensor:
        return outputs.square().sum() / SAMPLES

    wanted = measure(alone, tokens, loss)
    found = measure(model, tokens, loss)
    for side in "AG":
        assert_close(found[f"encoder/{side}"], wanted[f"0/{side}"])
