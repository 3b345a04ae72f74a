"""What must leave the scale of G alone: batch size, accumulation, loss scale, reduction, ignored tokens, sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC
from tests.curvature.measured import assert_close, build_kfac, factors, measure

Factors = dict[str, Tensor]
LIKELIHOOD = {"empirical": None, "type2": "categorical", "input_only": None}


def everything() -> nn.Module:
    """One block of each kind."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Flatten(2),
        nn.LayerNorm(9),
        nn.Linear(9, 5, bias=False),
        nn.RMSNorm(5),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(20, 3),
    )


class TokenModel(nn.Module):
    """Embedding, norm used twice, shared layer, one prediction a token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        hidden = hidden + self.inner(self.norm(hidden)).tanh()
        return self.head(self.norm(hidden + hidden.cumsum(1)))


def images(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 2, 3, 3, generator=generator), torch.randint(3, (samples,), generator=generator)


def text(samples: int, length: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = samples, length
    return torch.randint(11, shape, generator=generator), torch.randint(4, shape, generator=generator)


def token_loss(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction=reduction)


def assert_same(actual: Factors, expected: Factors, tolerance: float = 1e-5) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        try:
            assert_close(actual[name], value, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def run_window(
    kfac: KFAC, model: nn.Module, parts: Sequence[tuple[Tensor, Tensor]], loss: Callable[..., Tensor], **told: Any
) -> Factors:
    """One optimizer step over micro-batches, each with a loss that is a sum divided by the window's terms."""
    model.zero_grad()
    total, first = sum(targets.numel() for _, targets in parts), 0
    for index, (inputs, targets) in enumerate(parts):
        kfac.micro_batch(
            first_sample=first,
            divisor=told.get("divisor", total),
            terms=told.get("terms"),
            last=index + 1 == len(parts),
        )
        outputs = model(inputs)
        kfac.fisher_backward(outputs)
        (loss(outputs, targets, reduction="sum") / total).backward()
        first += len(inputs)
    kfac.step()
    return factors(kfac)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["empirical", "type2", "input_only"])
def test_duplicated_samples_change_nothing(fisher: str, sharing: str) -> None:
    inputs, targets = images(4)

    def at(repeats: int) -> Factors:
        labels = targets.repeat(repeats)
        return measure(
            everything(),
            inputs.repeat(repeats, 1, 1, 1),
            lambda out: F.cross_entropy(out, labels),
            fisher=fisher,
            likelihood=LIKELIHOOD[fisher],
            sharing=sharing,
        )

    assert_same(at(3), at(1))


def test_longer_sequences_of_the_same_tokens_change_nothing() -> None:
    """Every sequence twice, one after the other: a token's own gradient is the same, and so is G per token."""
    model = nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    tokens, targets = text(4)
    once = measure(model, tokens, lambda out: token_loss(out, targets), loss_terms="token")
    both = measure(model, tokens.repeat(1, 2), lambda out: token_loss(out, targets.repeat(1, 2)), loss_terms="token")
    assert_same(both, once)


class PerFrame(nn.Module):
    """Folds frames into the batch, as video models do, and averages them again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.norm, self.head = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, frames: Tensor) -> Tensor:
        hidden = self.norm(self.convolution(frames.flatten(0, 1))).tanh()
        return self.head(hidden.mean((2, 3)).unflatten(0, frames.shape[:2]).sum(1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_frames_folded_into_the_batch_are_positions_of_their_sample(sharing: str) -> None:
    """Frames side by side as one wide image (stride over the seam) see the same weights: the same A and G."""
    model, labels = PerFrame(), torch.randint(3, (6,), generator=torch.Generator().manual_seed(0))
    frames = torch.randn(6, 4, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    folded = measure(model, frames, lambda out: F.cross_entropy(out, labels), sharing=sharing)

    class Volume(nn.Module):
        """The same model by a 3-d convolution that keeps frames apart."""

        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.head = nn.Conv3d(2, 4, (1, 3, 3)), nn.Linear(4, 3)
            self.convolution.load_state_dict(
                {"weight": model.convolution.weight[:, :, None], "bias": model.convolution.bias}
            )
            self.head.load_state_dict(model.head.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.convolution(x.transpose(1, 2)).transpose(1, 2)
            normal = torch.stack([model.norm(hidden[:, frame]) for frame in range(hidden.shape[1])], dim=1)
            return self.head(normal.tanh().mean((3, 4)).sum(1))

    volume = measure(Volume(), frames, lambda out: F.cross_entropy(out, labels), sharing=sharing)
    for name in ("convolution/A", "convolution/G", "head/G"):
        assert_close(folded[name], volume[name])


@pytest.mark.parametrize("sizes", [(4, 4, 4), (5, 5, 2), (1, 11)])
@pytest.mark.parametrize("fisher", ["empirical", "type2", "mc", "input_only"])
def test_accumulation_changes_nothing(fisher: str, sizes: tuple[int, ...]) -> None:
    """Also with a short last micro-batch; sampled labels are keyed by the global sample index."""
    model, (inputs, targets) = everything(), images(12)
    options = {"fisher": fisher, "likelihood": "categorical"}
    kfac = build_kfac(model, **options)
    parts = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    accumulated = run_window(kfac, model, parts, F.cross_entropy)
    kfac.remove()
    assert_same(accumulated, measure(model, inputs, lambda out: F.cross_entropy(out, targets), **options))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["empirical", "type2", "mc", "input_only"])
def test_an_empty_micro_batch_adds_nothing(fisher: str, sharing: str) -> None:
    """The last shard of an uneven batch may hold no sample at all."""
    model, (inputs, targets) = everything(), images(5)
    options = {"fisher": fisher, "likelihood": "categorical", "sharing": sharing}
    kfac = build_kfac(model, **options)
    parts = [(inputs, targets), (inputs[:0], targets[:0])]
    with_empty = run_window(kfac, model, parts, F.cross_entropy)
    kfac.remove()
    assert_same(with_empty, measure(model, inputs, lambda out: F.cross_entropy(out, targets), **options))


def test_accumulation_of_means_divided_by_their_number() -> None:
    model, (inputs, targets) = everything(), images(12)
    kfac = build_kfac(model)
    model.zero_grad()
    for index in range(3):
        part = slice(4 * index, 4 * index + 4)
        kfac.micro_batch(first_sample=4 * index, divisor=3 * 4, last=index == 2)
        (F.cross_entropy(model(inputs[part]), targets[part]) / 3).backward()
    kfac.step()
    accumulated = factors(kfac)
    kfac.remove()
    assert_same(accumulated, measure(model, inputs, lambda out: F.cross_entropy(out, targets)))


def test_undescribed_accumulation_is_warned_of() -> None:
    model, (inputs, targets) = everything(), images(4)
    kfac = build_kfac(model)
    for _ in range(2):
        F.cross_entropy(model(inputs), targets).backward()
    with pytest.warns(UserWarning, match="micro_batch"):
        kfac.step()
    kfac.remove()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_summed_loss_is_told_by_its_divisor(as_tensor: bool) -> None:
    model, (inputs, targets) = everything(), images(6)
    expected = measure(model, inputs, lambda out: F.cross_entropy(out, targets))
    kfac = build_kfac(model)
    model.zero_grad()
    kfac.micro_batch(divisor=torch.tensor(1.0) if as_tensor else 1.0)
    F.cross_entropy(model(inputs), targets, reduction="sum").backward()
    kfac.step()
    assert_same(factors(kfac), expected)
    kfac.remove()


@pytest.mark.parametrize("fisher", ["empirical", "type2"])
def test_grad_scaler_changes_nothing(fisher: str) -> None:
    model, (inputs, targets) = everything(), images(6)
    options = {"fisher": fisher, "likelihood": "categorical"}
    expected = measure(model, inputs, lambda out: F.cross_entropy(out, targets), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = build_kfac(model, scaler=scaler, **options)
    model.zero_grad()
    outputs = model(inputs)
    kfac.fisher_backward(outputs)
    scaler.scale(F.cross_entropy(outputs, targets)).backward()
    scaler.unscale_(optimizer)
    kfac.step()
    assert_same(factors(kfac), expected)
    kfac.remove()


@pytest.mark.parametrize("fisher", ["empirical", "type2"])
def test_autocast_changes_no_scale_and_statistics_stay_fp32(fisher: str) -> None:
    """bfloat16 activations carry bfloat16 rounding, the statistics none of their own."""
    model, (inputs, targets) = everything(), images(8)
    options = {"fisher": fisher, "likelihood": "categorical"}
    expected = measure(model, inputs, lambda out: F.cross_entropy(out, targets), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = measure(model, inputs, lambda out: F.cross_entropy(out, targets), **options)
    assert_same(inside, expected, 0.06)
    kfac = build_kfac(model, **options)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(inputs)
        loss = F.cross_entropy(outputs, targets)
    kfac.fisher_backward(outputs)
    loss.backward()
    kfac.step()
    # Measuring inside the context (backward runs there in some loops) must not cast products to bfloat16.
    assert_same(inside, factors(kfac), 1e-6)
    kfac.remove()


# ---- token losses


def valid_and_ignored(samples: int) -> tuple[Tensor, Tensor]:
    tokens, targets = text(samples)
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(3)) < 0.4] = -100
    return tokens, targets


@pytest.mark.parametrize("as_tensor", [False, True])
def test_ignored_tokens_are_no_terms(as_tensor: bool) -> None:
    """At the head, `G = (1/n) Σ (p − e_y)(p − e_y)ᵀ` over the n tokens that have a label."""
    model, (tokens, targets) = TokenModel(), valid_and_ignored(6)
    valid = (targets != -100).sum()
    n = valid.float() if as_tensor else float(valid)
    kfac = build_kfac(model, loss_terms="token")
    kfac.micro_batch(divisor=n, terms=n)
    outputs = model(tokens)
    token_loss(outputs, targets).backward()
    kfac.step()
    found = factors(kfac)
    kfac.remove()
    rows = (outputs.softmax(-1) - F.one_hot(targets.clamp(min=0), 4))[targets != -100].detach()
    assert_close(found["head/G"][0], rows.mT @ rows / float(valid))
    assert_close(torch.tensor(float(found["table/A"].sum())), torch.tensor(1.0))


def test_ignored_tokens_and_accumulation_commute() -> None:
    model, (tokens, targets) = TokenModel(), valid_and_ignored(7)
    valid = int((targets != -100).sum())

    def accumulate(*sizes: int) -> Factors:
        kfac = build_kfac(model, loss_terms="token")
        model.zero_grad()
        first = 0
        for part, labels in zip(tokens.split(sizes), targets.split(sizes), strict=True):
            here = int((labels != -100).sum())
            kfac.micro_batch(first_sample=first, divisor=valid, terms=here, last=first + len(part) == len(tokens))
            (token_loss(model(part), labels, "sum") / valid).backward()
            first += len(part)
        kfac.step()
        found = factors(kfac)
        kfac.remove()
        return found

    assert_same(accumulate(3, 3, 1), accumulate(7))


@pytest.mark.parametrize("fisher", ["mc", "type2"])
def test_a_true_fisher_needs_no_labels_and_ignores_the_number_of_valid_ones(fisher: str) -> None:
    """Every position has a predictive distribution: G is the mean over all of them, however many carry a label."""
    model, (tokens, _) = TokenModel(), text(6)

    def at(valid: float | None) -> Factors:
        kfac = build_kfac(model, fisher=fisher, likelihood="categorical", loss_terms="token")
        if valid is not None:
            kfac.micro_batch(divisor=valid, terms=valid)
        model.zero_grad()
        outputs = model(tokens)
        kfac.fisher_backward(outputs)
        outputs.sum().backward()
        kfac.step()
        found = factors(kfac)
        kfac.remove()
        return found

    assert_same(at(7.0), at(None))


class TwoLengths(nn.Module):
    """Tokens that attend to a shorter memory, by heads that are normalised: three numbers of rows for one loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.memory = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.heads, self.head = nn.RMSNorm(3), nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        memory = self.memory(hidden[:, :2].detach()).tanh()
        queries = self.heads(hidden.unflatten(-1, (2, 3))).flatten(-2)
        return self.head(queries + (queries @ memory.mT).softmax(-1) @ memory)


@pytest.mark.parametrize("fisher", ["empirical", "type2", "mc"])
@pytest.mark.parametrize("lengths", [(5,), (5, 3)])
def test_every_layer_counts_the_tokens_of_the_loss(fisher: str, lengths: tuple[int, ...]) -> None:
    """Whatever rows a layer sees, n is the number of the loss's terms, as it is where the loop says so."""
    model, batches = TwoLengths(), [text(6, length)[0] % 9 for length in lengths]

    def run(*, told: bool) -> Factors:
        kfac = build_kfac(model, fisher=fisher, likelihood="categorical", loss_terms="token")
        model.zero_grad()
        for tokens in batches:
            n = float(tokens.numel())
            kfac.micro_batch(**({"divisor": n, "terms": n} if told else {}))
            outputs = model(tokens)
            kfac.fisher_backward(outputs)
            (token_loss(outputs, tokens % 4, "sum") / n).backward()
        kfac.step()
        found, units = factors(kfac), kfac.state_dict()["units"]
        kfac.remove()
        weights = {float(unit["scalars"][0]) for name, unit in units.items() if "/A/" not in name}
        assert weights == {float(sum(tokens.numel() for tokens in batches))}
        return found

    assert_same(run(told=False), run(told=True))


# ---- sampling


def sampled_steps(model: nn.Module, stride: int, parts: Any, loss: Any, **options: Any) -> list[Factors]:
    """`stride` consecutive steps on the same data; nothing updates the parameters, so only the sampled rows differ."""
    kfac = build_kfac(model, sample_fraction=1 / stride, **options)
    found = [run_window(kfac, model, parts, loss) for _ in range(stride)]
    kfac.remove()
    return found


CASES: list[Any] = [
    pytest.param(everything, images, F.cross_entropy, {"sharing": "expand"}, id="expand"),
    pytest.param(everything, images, F.cross_entropy, {"sharing": "reduce"}, id="reduce"),
    pytest.param(TokenModel, text, token_loss, {"loss_terms": "token"}, id="tokens"),
    pytest.param(
        TokenModel,
        text,
        token_loss,
        {"loss_terms": "token", "fisher": "type2", "likelihood": "categorical"},
        id="type2",
    ),
]


@pytest.mark.parametrize(("make", "batch", "loss", "options"), CASES)
@pytest.mark.parametrize("stride", [2, 3])
def test_sampling_is_unbiased(make: Any, batch: Any, loss: Any, options: Any, stride: int) -> None:
    """The samples of `stride` consecutive measurements partition the rows: their mean is the full factor."""
    model, data = make(), batch(12)
    kfac = build_kfac(model, **options)
    full = run_window(kfac, model, [data], loss)
    kfac.remove()
    sampled = sampled_steps(model, stride, [data], loss, **options)
    assert_same({name: torch.stack([one[name] for one in sampled]).mean(0) for name in full}, full)
    assert any(
        (one["head/G" if "head/G" in one else "9/G"] - full.get("head/G", full.get("9/G"))).norm() > 1e-3
        for one in sampled
    )


@pytest.mark.parametrize(("make", "batch", "loss", "options"), CASES)
def test_sampled_rows_do_not_depend_on_how_the_batch_is_split(make: Any, batch: Any, loss: Any, options: Any) -> None:
    model, (inputs, targets) = make(), batch(13)
    sizes = (3, 4, 1, 5)
    parts = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    for split, whole in zip(
        sampled_steps(model, 3, parts, loss, **options),
        sampled_steps(model, 3, [(inputs, targets)], loss, **options),
        strict=True,
    ):
        assert_same(split, whole)
