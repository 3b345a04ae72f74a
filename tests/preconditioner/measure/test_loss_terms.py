"""n is the micro-batch's, whatever a layer sees: G against hooks of the test's own, for each way to say or show n."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kfac_dist import KFAC
from kfac_dist.errors import ModelError
from tests.curvature.measured import assert_close, build_kfac, factors
from tests.harness import run_ranks

B, T, D, C = 4, 6, 3, 5
NODES, GRAPHS = 12, 4
Forward = Callable[[nn.Module], Any]
Loss = Callable[[Any], Tensor]


class Two(nn.Module):
    """Two layers, `first` and `last`, and whatever a test does between them."""

    def __init__(self, between: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.between = nn.Linear(D, 7), nn.Linear(7, C), between

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.between(self, *args, **kwargs)


def output_gradient(model: Two, forward: Forward, loss: Loss) -> tuple[Tensor, Tensor]:
    """The input of `first` and the loss's gradient at its output, by a hook of the test's own."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.first.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    value = loss(forward(model))
    handle.remove()
    [(inputs, output)] = seen
    (grad,) = torch.autograd.grad(value, output)
    return inputs.detach().flatten(0, -2), grad.flatten(0, -2)


def assert_terms(
    model: Two, forward: Forward, loss: Loss, n: float, told: dict[str, Any] | None = None, **curvature: Any
) -> None:
    """G of the first layer is (1/n) Σ ĝĝᵀ with ĝ = n·∂L/∂s, and A the mean over the rows that it saw."""
    rows, grads = output_gradient(model, forward, loss)
    kfac = build_kfac(model, **curvature)
    if told is not None:
        kfac.micro_batch(**told)
    loss(forward(model)).backward()
    kfac.step()
    found = factors(kfac)
    kfac.remove()
    assert_close(found["first/G"][0], (n * grads).mT @ (n * grads) / n)
    homogeneous = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    assert_close(found["first/A"][0], homogeneous.mT @ homogeneous / len(rows))


def cross_entropy(outputs: Tensor) -> Tensor:
    rows = outputs.flatten(0, -2)
    return F.cross_entropy(rows, torch.arange(len(rows)) % C)


def squares(outputs: Tensor) -> Tensor:
    return (outputs - 0.3).square().sum(-1).mean()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def pooled(model: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Sequences of valid tokens alone, `[total, d]`."""
    rows = model.first(x[mask]).tanh()
    sums = torch.zeros(len(x), 7).index_add(0, mask.nonzero()[:, 0], rows)
    return model.last(sums / mask.sum(1, keepdim=True))


def some_samples(model: Any, x: Tensor, keep: Tensor) -> Tensor:
    """A branch that some samples take, after others have been turned off."""
    branch = model.first(x[keep]).tanh()
    return model.last(torch.zeros(len(x), *x.shape[1:-1], 7).index_add(0, keep, branch).mean(1))


@pytest.mark.parametrize("loss", [cross_entropy, squares])
@pytest.mark.parametrize("lengths", [(6, 3, 2, 1), (6, 3, 2, 2), (6, 6, 6, 6)])
def test_valid_tokens_are_no_terms(loss: Loss, lengths: tuple[int, ...]) -> None:
    mask = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    assert_terms(Two(pooled), lambda model: model(draw(B, T, D), mask), loss, B)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kept", [10, 7, 5, 1])
def test_samples_that_skip_a_layer_are_terms(kept: int, sharing: str) -> None:
    model, x, keep = Two(some_samples), draw(10, T, D), torch.arange(kept)
    rows, grads = output_gradient(model, lambda m: m(x, keep), cross_entropy)
    kfac = build_kfac(model, sharing=sharing)
    cross_entropy(model(x, keep)).backward()
    kfac.step()
    found = factors(kfac)
    grads = grads if sharing == "expand" else grads.unflatten(0, (kept, T)).sum(1)
    rows = rows if sharing == "expand" else rows.unflatten(0, (kept, T)).mean(1)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    assert_close(found["first/G"][0], 10 * grads.mT @ grads)
    assert_close(found["first/A"][0], rows.mT @ rows / len(rows))


def graph(model: Any, x: Tensor, edges: Tensor, owner: Tensor | None = None) -> Tensor:
    hidden = model.first(x)
    hidden = (hidden + torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]])).tanh()
    if owner is not None:
        hidden = torch.zeros(GRAPHS, 7).index_add(0, owner, hidden)
    return model.last(hidden)


X, EDGES = draw(NODES, D), torch.arange(NODES).repeat(2, 1)
OWNER = torch.arange(NODES) // (NODES // GRAPHS)
GRAPH_MODELS: dict[str, tuple[Callable[..., Any], Callable[[Any, bool], Any]]] = {
    "nodes first": (
        lambda m, x, e, owner: graph(m, x, e, owner),
        lambda model, whole: model(X, EDGES, OWNER if whole else None),
    ),
    "edges first": (
        lambda m, e, x, owner: graph(m, x, e, owner),
        lambda model, whole: model(EDGES, X, OWNER if whole else None),
    ),
    "a mapping": (
        lambda m, data: graph(m, data["x"], data["e"], data["owner"]),
        lambda model, whole: model({"e": EDGES, "x": X, "owner": OWNER if whole else None}),
    ),
}


@pytest.mark.parametrize("loss", [cross_entropy, squares])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", list(GRAPH_MODELS))
def test_the_terms_of_a_graph_network_are_in_its_outputs(kind: str, whole: bool, loss: Loss) -> None:
    between, forward = GRAPH_MODELS[kind]
    assert_terms(Two(between), lambda model: forward(model, whole), loss, GRAPHS if whole else NODES)


@pytest.mark.parametrize("loss_terms", ["sample", "token"])
@pytest.mark.parametrize("loss", [cross_entropy, squares])
def test_a_loss_over_some_nodes_is_told_by_its_terms(loss: Loss, loss_terms: str) -> None:
    between, forward = GRAPH_MODELS["nodes first"]
    told = {"divisor": 3, "terms": 3}
    assert_terms(
        Two(between), lambda model: forward(model, False), lambda o: loss(o[:3]), 3, told, loss_terms=loss_terms
    )


@pytest.mark.parametrize(
    ("loss", "told", "message"),
    [
        (cross_entropy, {}, r"leaves out terms, call kfac.micro_batch\(divisor=..., terms=...\)"),
        (
            cross_entropy,
            {"divisor": 3},
            r"zero in 9 of the model's 12 samples.*micro_batch\(terms=..., divisor=...\)",
        ),
        (squares, {}, r"zero in 9 of the model's 12 samples.*micro_batch\(terms=..., divisor=...\)"),
    ],
)
def test_a_loss_over_some_nodes_that_is_not_told_is_warned_of(loss: Loss, told: dict[str, Any], message: str) -> None:
    between, forward = GRAPH_MODELS["nodes first"]
    kfac = build_kfac(model := Two(between))
    kfac.micro_batch(**told)
    loss(forward(model, False)[:3]).backward()
    with pytest.warns(UserWarning, match=message):
        kfac.step()


def on_tokens(model: Any, positions: Tensor, tokens: Tensor) -> Tensor:
    return model.last(model.first(tokens + positions[..., None]).tanh())


def test_positions_may_come_first() -> None:
    model, positions, x = Two(on_tokens), torch.arange(T)[None] / 10, draw(B, T, D)
    assert_terms(model, lambda m: m(positions, x), lambda o: squares(o.mean(1)), B)
    assert_terms(Two(on_tokens), lambda m: m(positions, x), squares, B * T, loss_terms="token")


def test_sequences_may_come_first_with_a_label_a_sample() -> None:
    model = Two(lambda m, x: m.last(m.first(x).tanh().mean(0)))
    assert_terms(model, lambda m: m(draw(T, B, D)), squares, B)


def test_a_categorical_loss_tells_the_samples_of_sequences_first() -> None:
    """Outputs [T, B, C] and a mean over B of sums over T: the gradient's scale says which dimension is divided by."""
    model = Two(lambda m, x: m.last(m.first(x).tanh()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_terms(model, lambda m: m(draw(T, B, D)), lambda o: T * cross_entropy(o), B)


class TimeMajor(Two):
    """Two layers around one that is told that time comes first."""

    def __init__(self, kind: str) -> None:
        super().__init__(lambda m, x: m.last(m.mix(m.first(x).tanh())))
        lstm, attention = nn.LSTM(7, 7), nn.MultiheadAttention(7, 1)
        self.kept = attention if kind == "attention" else lstm
        packed = lambda x: pad_packed_sequence(lstm(pack_padded_sequence(x, [len(x)] * x.shape[1]))[0])[0]  # noqa: E731
        self.mix = {
            "recurrent": lambda x: lstm(x)[0],
            "packed": packed,
            "attention": lambda x: attention(x, x, x, need_weights=False)[0],
        }[kind]


@pytest.mark.parametrize("kind", ["recurrent", "packed", "attention"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_layer_that_is_given_time_first_tells_where_the_samples_are(kind: str, turned: bool) -> None:
    """A mean of squares over samples doesn't; a model that turns its batch inside has the samples in front."""
    model, x = TimeMajor(kind), draw(T, B, D)
    between = model.between
    if turned:
        model.between = lambda m, given: between(m, given.transpose(0, 1)).transpose(0, 1)
        x = x.transpose(0, 1)
    time = 1 if turned else 0
    assert_terms(model, lambda m: m(x), lambda o: (o - 0.3).square().sum((time, 2)).mean(), B)


def test_a_model_may_return_its_loss_alone() -> None:
    model = Two(lambda m, x, y: F.mse_loss(m.last(m.first(x).tanh()).sum(-1), y))
    assert_terms(model, lambda m: m(draw(B, D), torch.zeros(B)), lambda loss: loss, B)


@pytest.mark.parametrize(
    "pack",
    [lambda out: (out, out.detach()), lambda out: {"loss": out.mean(), "logits": out}, lambda out: [out, out[:, 0]]],
)
def test_outputs_may_be_packed(pack: Callable[[Tensor], Any]) -> None:
    model = Two(lambda m, x: pack(m.last(m.first(x).tanh())))
    assert_terms(model, lambda m: m(draw(B, D)), lambda o: squares(o["logits"] if isinstance(o, dict) else o[0]), B)


def test_layers_may_be_called_without_their_model() -> None:
    model = Two(lambda m, x: x)
    assert_terms(model, lambda m: m.last(m.first(draw(B, T, D)).tanh().mean(1)), squares, B)
    ragged = Two(lambda m, x: x)
    mask = torch.arange(T)[None] < torch.tensor((6, 3, 2, 1))[:, None]
    assert_terms(ragged, lambda m: pooled(m, draw(B, T, D), mask), squares, B, told={"terms": B})


AMBIGUOUS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any], Loss]] = {
    "turned round": (
        lambda m, x: m.last(m.first(x).tanh()).transpose(0, 1),
        lambda model: model(draw(B, T, D)),
        squares,
    ),
    "time first, a mask of samples first": (
        lambda m, x, mask: m.last(m.first(x).tanh()) * mask.mT[..., None],
        lambda model: model(draw(T, B, D), torch.ones(B, T)),
        squares,
    ),
    "one graph's classes": (
        lambda m, e, x: graph(m, x, e).mean(0),
        lambda model: model(EDGES, X),
        lambda out: out.square().sum(),
    ),
    "contrastive": (
        lambda m, x, y: (m.first(x) @ m.first(y).mT, m.last(m.first(y))),
        lambda model: model(draw(B, D), draw(T, D)),
        lambda pair: pair[0].square().mean() + pair[1].square().mean(),
    ),
    "a loss alone of a graph": (
        lambda m, e, x: graph(m, x, e).square().mean(),
        lambda model: model(EDGES, X),
        lambda loss: loss,
    ),
    "layers alone": (
        lambda m, x: x,
        lambda model: pooled(model, draw(B, T, D), torch.arange(T)[None] < torch.tensor((6, 3, 2, 1))[:, None]),
        squares,
    ),
}


@pytest.mark.parametrize("kind", list(AMBIGUOUS))
def test_where_nothing_tells_the_step_is_refused(kind: str) -> None:
    between, forward, loss = AMBIGUOUS[kind]
    kfac = build_kfac(model := Two(between))
    loss(forward(model)).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with pytest.raises(ModelError, match=r"number of samples .* can't be told .* kfac.micro_batch\(terms=...\)"):
        kfac.step()
    assert all(torch.equal(before[name], p.grad) for name, p in model.named_parameters() if p.grad is not None)
    kfac.remove()


def refused_on_one_rank() -> str:
    """Rank 0's batch has as many samples as positions, so that nothing contradicts itself there."""
    between, _, loss = AMBIGUOUS["turned round"]
    kfac = KFAC(model := Two(between), {"update": {"kl_clip": None}})
    loss(model(draw(T if dist.get_rank() == 0 else B, T, D))).backward()
    with pytest.raises(ModelError) as caught:
        kfac.step()
    kfac.remove()
    return str(caught.value)


def test_ranks_are_refused_together() -> None:
    first, second = run_ranks(2, refused_on_one_rank)
    assert first == second
    assert "kfac.micro_batch(terms=...)" in first


def plain(model: Two, x: Tensor) -> Any:
    return model.last(model.first(x).tanh())


def in_parts(sizes: list[int], *, told: bool = True, one_backward: bool = True) -> dict[str, Tensor]:
    """The factors of a batch that goes through the model in parts, whose losses are added up."""
    model, x = Two(plain), draw(sum(sizes), D)
    labels = torch.arange(len(x)) % C
    kfac = build_kfac(model)
    losses, first = [], 0
    for size in sizes:
        if told:
            kfac.micro_batch(first_sample=first, divisor=len(x), last=first + size == len(x))
        own = slice(first, first + size)
        losses.append(F.cross_entropy(model(x[own]), labels[own], reduction="sum") / len(x))
        first += size
        if not one_backward:
            losses[-1].backward()
    if one_backward:
        torch.stack(losses).sum().backward()
    kfac.step()
    found = factors(kfac)
    kfac.remove()
    return found


@pytest.mark.parametrize("one_backward", [True, False])
@pytest.mark.parametrize("sizes", [[8, 8], [4] * 4, [1] * 16, [9, 4, 3]])
def test_parts_that_are_described_are_the_whole_batch(sizes: list[int], one_backward: bool) -> None:
    whole, parts = in_parts([16]), in_parts(sizes, one_backward=one_backward)
    for name, factor in whole.items():
        assert_close(parts[name], factor)


def test_parts_that_are_not_described_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"2 forward passes .* kfac.micro_batch\(...\)"):
        in_parts([8, 8], told=False)


def test_single_observations_of_an_episode_are_one_batch() -> None:
    """Twenty calls with one observation each, outputs without a batch's dimension, and one loss at the end."""
    observations, actions, returns = draw(20, D), torch.arange(20) % C, draw(20)

    def episode(model: Two, *, together: bool) -> dict[str, Tensor]:
        kfac = build_kfac(model)
        if together:
            scores = model(observations).log_softmax(-1)[torch.arange(20), actions]
            (-(scores * returns).mean()).backward()
        else:
            losses = []
            for step, observation in enumerate(observations):
                kfac.micro_batch(first_sample=step, divisor=20, last=step == 19)
                losses.append(-model(observation).log_softmax(-1)[actions[step]] * returns[step] / 20)
            torch.stack(losses).sum().backward()
        kfac.step()
        found = factors(kfac)
        kfac.remove()
        return found

    whole = episode(Two(plain), together=True)
    for name, factor in episode(Two(plain), together=False).items():
        assert_close(factor, whole[name])


class Branches(nn.Module):
    """Layers of every kind, to which no sample goes; and one to which all go."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(6, 4)
        self.linear, self.norm, self.rms = nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4)
        self.conv, self.group = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.wide = nn.Conv2d(4, 4, 3, stride=2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.tied, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.tied.weight
        self.plain, self.out = nn.Linear(D, 4), nn.Linear(4, C)

    def forward(self, x: Tensor, rows: int) -> Tensor:
        tokens, pixels = (x[:rows, :2] > 0).long(), x[:rows, :1, None, None].expand(rows, 1, 5, 5)
        hidden = self.rms(self.norm(self.linear(self.table(tokens) + self.tied(tokens))))
        if rows:  # torch's own attention refuses a batch of none
            hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        images = self.wide(self.group(self.conv(pixels))).flatten(2).sum(-1)
        branch = self.head(hidden.sum(1) + images)[:, :4]
        return self.out(self.plain(x).tanh().index_add(0, torch.arange(rows), branch))


@pytest.mark.parametrize("loss_terms", ["sample", "token"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("solver", ["cholesky", "ekfac"])
def test_a_layer_without_rows_keeps_its_average_and_disturbs_no_other(
    sharing: str, loss_terms: str, solver: str
) -> None:
    def after(*rows: int) -> tuple[dict[str, Tensor], KFAC]:
        model = Branches()
        kfac = build_kfac(model, sharing=sharing, loss_terms=loss_terms, inversion={"solver": solver, "damping": 0.1})
        kfac._parts.averages.decay = 0.5
        for number in rows:
            model.zero_grad()
            squares(model(draw(7, D), number)).backward()
            kfac.step()
        found = factors(kfac)
        dropped, finite = kfac.metrics()["dropped_statistics"], all(torch.isfinite(v).all() for v in found.values())
        kfac.remove()
        assert (dropped, finite) == (0, True)
        return found, kfac

    used, _ = after(3)
    both, _ = after(3, 0)
    alone, _ = after(0, 3)
    for name, factor in used.items():
        if name.split("/")[0] not in ("plain", "out"):
            assert_close(both[name], factor)
            assert_close(alone[name], factor)


def test_statistics_that_are_dropped_are_named_once() -> None:
    model = nn.Sequential(nn.Linear(D, 4), nn.Linear(4, C))
    kfac = build_kfac(model)
    said: list[str] = []
    for _ in range(3):
        model.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (model(draw(B, D) * 1e22).sum() * 1e-22).backward()
            kfac.step()
        said += [str(warning.message) for warning in caught if "dropped" in str(warning.message)]
    assert len(said) == 1
    assert said[0].startswith("statistics of 1, 0 were not finite on this rank")
    assert kfac.metrics()["dropped_statistics"] == 3
    kfac.remove()


def both(m: Two, x: Tensor, edges: Tensor, owner: Tensor) -> dict[str, Tensor]:
    """Values of nodes and of graphs, of which a loss may read either."""
    nodes = m.first(x).tanh()
    hidden = (nodes + torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]])).tanh()
    return {"nodes": hidden, "graphs": m.last(torch.zeros(GRAPHS, 7).index_add(0, owner, hidden))}


@pytest.mark.parametrize("loss", [cross_entropy, squares])
@pytest.mark.parametrize(("read", "n"), [("graphs", GRAPHS), ("nodes", NODES)])
def test_the_outputs_that_the_loss_reads_have_its_terms(read: str, n: int, loss: Loss) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="no backward pass has come through last")
        assert_terms(Two(both), lambda m: m(X, EDGES, OWNER), lambda out: loss(out[read]), n)


def test_outputs_on_the_way_to_others_are_read_where_the_loss_reads_no_other() -> None:
    """A head beside the graphs' that no loss reads, and a copy of the nodes that leads to them."""

    def heads(m: Two, x: Tensor, edges: Tensor, owner: Tensor) -> tuple[Tensor, ...]:
        found = both(m, x, edges, owner)
        return found["nodes"] * 2, found["nodes"], found["graphs"], m.last(found["nodes"])

    for index, n in ((0, NODES), (1, NODES), (2, GRAPHS), (3, NODES)):
        assert_terms(Two(heads), lambda m: m(X, EDGES, OWNER), lambda out, index=index: squares(out[index]), n)


class Held:
    """What a graph holds."""

    def __call__(self, grad: Tensor) -> None:
        pass


@pytest.mark.parametrize("several", [True, False])
def test_a_graph_that_no_backward_follows_goes_with_the_next_pass(several: bool) -> None:
    def held(m: Two, x: Tensor, edges: Tensor, owner: Tensor) -> Any:
        found = both(m, x, edges, owner)
        found["nodes"].register_hook(hook := Held())
        seen.append(weakref.ref(hook))
        return found if several else found["graphs"]

    seen: list[weakref.ref[Held]] = []
    kfac = build_kfac(model := Two(held))
    model(X, EDGES, OWNER)
    gc.collect()
    assert several or seen[0]() is None
    out = model(X, EDGES, OWNER)
    gc.collect()
    assert seen[0]() is None
    squares(out["graphs"] if several else out).backward()
    kfac.step()
    del out
    gc.collect()
    assert seen[1]() is None
    kfac.remove()


def flattened(m: Two, x: Tensor) -> Tensor:
    return m.last(m.first(x).tanh()).flatten(0, 1)


def test_rows_of_positions_are_told_by_the_loss_or_asked_about() -> None:
    def model_of(m: nn.Module) -> Tensor:
        return m(draw(B, T, D))

    # A categorical loss tells B or B·T; squares don't.
    assert_terms(Two(flattened), model_of, lambda o: T * cross_entropy(o), B)
    assert_terms(Two(flattened), model_of, squares, B * T, loss_terms="token")
    for told in ({"terms": B}, {"terms": B * T}):
        assert_terms(Two(flattened), model_of, lambda o: squares(o), told["terms"], told)
    for sharing in ("expand", "reduce"):
        kfac = build_kfac(model := Two(flattened), sharing=sharing)
        squares(model_of(model)).backward()
        with pytest.raises(ModelError, match=r"number of samples .* can't be told .* kfac.micro_batch\(terms=...\)"):
            kfac.step()
        kfac.remove()


ALIKE = "treats the first two dimensions alike, and nothing tells which of them is the samples': 6 samples are taken"


def test_time_first_through_layers_that_mix_nothing_is_told_or_warned_of() -> None:
    plain_model, x = Two(plain), draw(T, B, D)
    with pytest.warns(UserWarning, match=ALIKE + r".*terms=6\).*terms=4 if time comes first"):
        assert_terms(plain_model, lambda m: m(x), squares, T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_terms(Two(plain), lambda m: m(x), lambda o: (o - 0.3).square().sum((0, 2)).mean(), B, {"terms": B})
        # The loss takes a mean over time first, or reads the last step alone.
        assert_terms(Two(plain), lambda m: m(x), lambda o: squares(o.mean(0)), B)
        assert_terms(Two(plain), lambda m: m(x), lambda o: squares(o[-1]), B)
        assert_terms(Two(plain), lambda m: m(x.transpose(0, 1)), lambda o: squares(o.mean(1)), B)
        assert_terms(Two(plain), lambda m: m(x.transpose(0, 1)), lambda o: squares(o[:, 0]), B)
        assert_terms(Two(plain), lambda m: m(x[:, :1]), lambda o: squares(o.mean(0)), 1)
        # Something mixes time, or takes a mean over the samples for them.
        mixed = Two(lambda m, given: m.last(m.first(given).tanh().cumsum(1)))
        assert_terms(mixed, lambda m: m(x.transpose(0, 1)), squares, B)


def unnamed_on_ranks(time_first: bool) -> dict[str, Tensor]:
    """Reduced factors of this rank's part of eight samples, of which a mean over time is taken; on one rank or two."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = Two(plain)
    x = draw(8, T, D)[rank * 8 // size : (rank + 1) * 8 // size]
    wrapped = nn.parallel.DistributedDataParallel(model) if size > 1 else model
    config = {"factor_every": 1, "decay": 0.0, "sharing": "reduce"}
    kfac = KFAC(wrapped, {"curvature": config, "inversion": {"inverse_every": 1}, "update": {"kl_clip": None}})
    outputs = wrapped(x.transpose(0, 1) if time_first else x)
    squares(outputs.mean(0 if time_first else 1)).backward()
    kfac.step()
    found = factors(kfac)
    kfac.remove()
    return found


def of_graphs_on_ranks() -> dict[str, Tensor]:
    """Factors of a loss on graphs alone, two of four on each of two ranks."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def pooled_part(m: Two, x: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        nodes = m.first(x).tanh()
        return nodes, m.last(torch.zeros(GRAPHS // size, 7).index_add(0, owner, nodes))

    model = Two(pooled_part)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if size > 1 else model
    config = {"factor_every": 1, "decay": 0.0}
    kfac = KFAC(wrapped, {"curvature": config, "inversion": {"inverse_every": 1}, "update": {"kl_clip": None}})
    own = slice(rank * NODES // size, (rank + 1) * NODES // size)
    squares(wrapped(X[own], OWNER[own] - rank * GRAPHS // size)[1]).backward()
    kfac.step()
    found = factors(kfac)
    kfac.remove()
    return found


def on_ranks() -> list[dict[str, Tensor]]:
    return [unnamed_on_ranks(False), unnamed_on_ranks(True), of_graphs_on_ranks()]


def test_what_the_loss_tells_is_the_same_on_two_ranks() -> None:
    alone = on_ranks()
    for found in run_ranks(2, on_ranks):
        for one, two in zip(alone, found, strict=True):
            assert one.keys() == two.keys()
            for name, factor in one.items():
                assert_close(two[name], factor)
    for name, factor in alone[0].items():
        assert_close(alone[1][name], factor)


OWN_PASSES: list[dict[str, Any]] = [
    {"fisher": fisher, "likelihood": likelihood, "sharing": sharing}
    for fisher in ("mc", "type2")
    for likelihood, sharing in (("gaussian", "expand"), ("categorical", "reduce"), ("bernoulli", "expand"))
]


def by_own_passes() -> list[list[dict[str, Tensor]]]:
    """Factors of this rank's part of eight samples by K-FAC's own passes, samples first and time first."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, found = draw(8, T, D)[rank * 8 // size : (rank + 1) * 8 // size], []
    for curvature in OWN_PASSES:
        runs = []
        for turned in (True, False):
            model = TimeMajor("recurrent")
            between = model.between
            if turned:
                model.between = lambda m, given, inner=between: inner(m, given.transpose(0, 1)).transpose(0, 1)
            wrapped = nn.parallel.DistributedDataParallel(model) if size > 1 else model
            kfac = KFAC(
                wrapped,
                {
                    "curvature": {"factor_every": 1, "decay": 0.0, **curvature},
                    "inversion": {"inverse_every": 1},
                    "update": {"kl_clip": None},
                },
            )
            outputs = wrapped(x if turned else x.transpose(0, 1))
            kfac.fisher_backward(outputs)
            squares(outputs.mean(1 if turned else 0)).backward()
            kfac.step()
            runs.append(factors(kfac))
            kfac.remove()
        found.append(runs)
    return found


def test_time_first_is_the_same_for_passes_of_kfacs_own() -> None:
    """On one rank and on two: drawn labels belong to samples, and a Gaussian's columns to positions."""
    alone = by_own_passes()
    for found in run_ranks(2, by_own_passes):
        for (first, turned), (one, other) in zip(alone, found, strict=True):
            for name, factor in first.items():
                assert_close(turned[name], factor)
                assert_close(one[name], factor, tolerance=1e-4)
                assert_close(other[name], factor, tolerance=1e-4)


@pytest.mark.parametrize("fisher", ["mc", "type2"])
def test_passes_of_kfacs_own_are_refused_where_nothing_tells(fisher: str) -> None:
    for told in (None, B):
        kfac = build_kfac(model := Two(flattened), fisher=fisher, likelihood="gaussian")
        if told is not None:
            kfac.micro_batch(terms=told)
        outputs = model(draw(B, T, D))
        kfac.fisher_backward(outputs)
        squares(outputs).backward()
        if told is None:
            with pytest.raises(ModelError, match=r"can't be told .* kfac.micro_batch\(terms=...\)"):
                kfac.step()
        else:
            kfac.step()
            assert float(kfac.state_dict()["units"]["first/G/0"]["scalars"][0]) == B
        kfac.remove()
