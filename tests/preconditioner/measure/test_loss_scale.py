"""A loss that isn't the mean that K-FAC takes it for is found in the first measured step, on every rank."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_dist import KFAC, KFACConfig
from kfac_dist.config.schema import Likelihood
from kfac_dist.errors import ModelError
from kfac_dist.preconditioner.measure.scale import gradient_scale
from tests.harness import run_ranks

FEATURES, CLASSES, SAMPLES, TOKENS = 5, 3, 8, 7
Loss = Callable[[Tensor, int], Tensor]


def labels(outputs: Tensor) -> Tensor:
    return torch.arange(outputs[..., 0].numel()) % CLASSES


def cross_entropy(outputs: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), labels(outputs), **options)


def bernoulli(outputs: Tensor, factor: float = 1.0) -> Tensor:
    targets = (labels(outputs) % 2).view(outputs.shape[:-1])[..., None].expand_as(outputs).float()
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") * factor


def summed(outputs: Tensor, ranks: int) -> Tensor:
    return cross_entropy(outputs, reduction="sum")


def mean(outputs: Tensor, ranks: int) -> Tensor:
    return cross_entropy(outputs)


def divided_by_ranks_again(outputs: Tensor, ranks: int) -> Tensor:
    return cross_entropy(outputs) / ranks


def multiplied_by_ranks(outputs: Tensor, ranks: int) -> Tensor:
    return cross_entropy(outputs) * ranks


def summed_over_tokens(outputs: Tensor, ranks: int) -> Tensor:
    return cross_entropy(outputs, reduction="sum") / len(outputs)


def weighted(outputs: Tensor, ranks: int) -> Tensor:
    return cross_entropy(outputs) * 1.7


def smoothed_sum(outputs: Tensor, ranks: int) -> Tensor:
    return cross_entropy(outputs, reduction="sum", label_smoothing=0.1)


def summed_bernoulli(outputs: Tensor, ranks: int) -> Tensor:
    return bernoulli(outputs)


def mean_bernoulli(outputs: Tensor, ranks: int) -> Tensor:
    return bernoulli(outputs, 1 / len(outputs))


def squared(outputs: Tensor, ranks: int) -> Tensor:
    return outputs.square().sum()


def amp_scaled(outputs: Tensor, ranks: int) -> Tensor:
    return cross_entropy(outputs) * 2.0**16


def first_step(loss: Loss, tokens: bool = False, **curvature: Any) -> str:
    """What the first step says: an error, a warning, or nothing."""
    torch.manual_seed(0)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    inputs = torch.randn(SAMPLES, *([TOKENS] if tokens else []), FEATURES)
    model: nn.Module = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    model = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = KFAC(model, {"curvature": curvature}, optimizer=optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outputs = model(inputs)
            kfac.fisher_backward(outputs)
            loss(outputs, ranks).backward()
            kfac.step()
            said = "; ".join(str(warning.message) for warning in caught if "the loss's" in str(warning.message))
        except ModelError as error:
            said = f"error: {error}"
    kfac.remove()
    return said


TOKEN = {"tokens": True, "loss_terms": "token"}
TYPE2 = {"fisher": "type2", "likelihood": "categorical"}
# loss, options → what alone, and what on three ranks; None: the same on both.
CASES: list[tuple[Loss, dict[str, Any], str, str | None]] = [
    (mean, {}, "", None),
    (mean, TYPE2, "", None),
    (mean, TOKEN, "", None),
    (mean_bernoulli, {}, "", None),
    (squared, {}, "", None),
    (squared, {"likelihood": "gaussian"}, "", None),
    (smoothed_sum, {}, "", None),
    (smoothed_sum, {"likelihood": "categorical"}, r"the loss's gradient reaches [1-9]\S* in an output, where", None),
    (summed_over_tokens, {"tokens": True}, "", None),
    (summed, {}, "error: .* 8 times that of a mean over 8 samples: the loss is a sum. Divide it", None),
    (summed, TYPE2, "error: .* 8 times that of a mean over 8 samples: the loss is a sum. Divide it", None),
    (summed, TOKEN, "error: .* 56 times that of a mean over 56 tokens: the loss is a sum", None),
    (summed_bernoulli, {}, "error: .* 8 times that of a mean over 8 samples: the loss is a sum", None),
    (mean, {"tokens": True}, "error: .* 0.1429 times .*kfac.curvature.loss_terms: token", None),
    (summed_over_tokens, TOKEN, "error: .* 7 times .* a sum over the 7 positions of a sample", None),
    (weighted, {}, "the loss's gradient is 1.7 times that of a mean .*micro_batch", None),
    (amp_scaled, {}, r"error: .*AMP loss scale. Pass KFAC\(..., grad_scaler=scaler\)", None),
    (divided_by_ranks_again, {}, "", "the loss's gradient is 0.3333 times .* divided by the 3 ranks once more"),
    (multiplied_by_ranks, {}, "", "the loss's gradient is 3 times .* multiplied by the 3 ranks"),
]


def all_first_steps() -> list[str]:
    return [first_step(loss, **options) for loss, options, *_ in CASES]


def assert_said(said: list[str], expected: list[str]) -> None:
    for (loss, options, *_), found, pattern in zip(CASES, said, expected, strict=True):
        assert re.match(pattern, found, re.DOTALL) if pattern else found == "", (loss.__name__, options, found)


def test_alone() -> None:
    assert_said(all_first_steps(), [alone for _, _, alone, _ in CASES])


def test_three_ranks_say_the_same() -> None:
    expected = [alone if three is None else three for _, _, alone, three in CASES]
    for said in run_ranks(3, all_first_steps):
        assert_said(said, expected)


def one_rank_sees_nothing() -> str:
    """A batch of one sample is sum and mean at once; the other ranks know better."""
    torch.manual_seed(0)
    rows = 1 if dist.get_rank() == 0 else SAMPLES
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES))
    kfac = KFAC(model, {"update": {"kl_clip": None}})
    summed(model(torch.randn(rows, FEATURES)), 1).backward()
    with pytest.raises(ModelError) as caught:
        kfac.step()
    kfac.remove()
    return str(caught.value)


def test_ranks_stop_together() -> None:
    messages = run_ranks(3, one_rank_sees_nothing)
    assert len(set(messages)) == 1
    assert "the loss is a sum" in messages[0]


def test_an_overflow_of_the_loss_scale_postpones_the_question() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES))
    config = {"curvature": {"factor_every": 1}, "inversion": {"inverse_every": 1}, "update": {"kl_clip": None}}
    kfac = KFAC(model, config)
    (mean(model(torch.randn(SAMPLES, FEATURES)), 1) * torch.inf).backward()
    kfac.step()
    model.zero_grad()
    summed(model(torch.randn(SAMPLES, FEATURES)), 1).backward()
    with pytest.raises(ModelError, match="the loss is a sum"):
        kfac.step()


def test_a_said_divisor_makes_a_sum_right() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES))
    kfac = KFAC(model, {"update": {"kl_clip": None}})
    kfac.micro_batch(divisor=1.0)
    summed(model(torch.randn(SAMPLES, FEATURES)), 1).backward()
    kfac.step()


def test_a_gradient_tells_its_factor_for_classes_in_either_place() -> None:
    for shape in ((9, CLASSES), (4, TOKENS, CLASSES)):
        outputs = torch.randn(shape, requires_grad=True)
        (gradient,) = torch.autograd.grad(cross_entropy(outputs, reduction="sum") * 0.25, outputs)
        for likelihood in (None, Likelihood.CATEGORICAL):
            assert gradient_scale(outputs.detach(), gradient, likelihood) == pytest.approx(0.25)
        assert gradient_scale(outputs.detach(), gradient, Likelihood.BERNOULLI) is None
    outputs, gradient = outputs.detach(), gradient.detach()
    moved, its = outputs.movedim(-1, 1), gradient.movedim(-1, 1)
    assert gradient_scale(moved, its, None) == pytest.approx(0.25)
    rounded = [tensor.bfloat16() for tensor in (outputs, gradient)]
    assert gradient_scale(*rounded, None) == pytest.approx(0.25, rel=0.02)


def test_outputs_without_a_class_dimension() -> None:
    outputs = torch.randn(9, requires_grad=True)
    (gradient,) = torch.autograd.grad(F.binary_cross_entropy_with_logits(outputs, torch.ones(9)), outputs)
    assert gradient_scale(outputs.detach(), gradient, None) == pytest.approx(1 / 9)


@pytest.mark.parametrize("shape", [(1,), (0,), (0, 3), (1, 1), (2, 2), (0, 4, 3)])
def test_a_few_values_tell_nothing(shape: tuple[int, ...]) -> None:
    outputs = torch.randn(shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(outputs.square().sum(), outputs)
    assert gradient_scale(outputs.detach(), gradient, None) is None


def looked_at_first(loss: Loss) -> KFAC:
    """A model that was run once for nothing, before the first step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    kfac = KFAC(model, {"update": {"kl_clip": None}})
    kept = model(torch.randn(2, FEATURES))
    assert kept.requires_grad
    loss(model(torch.randn(SAMPLES, FEATURES)), 1).backward()
    return kfac


def test_a_forward_pass_for_nothing_disarms_nothing() -> None:
    with pytest.raises(ModelError, match="8 times that of a mean over 8 samples: the loss is a sum"):
        looked_at_first(summed).step()


@pytest.mark.filterwarnings("error")
def test_a_forward_pass_for_nothing_is_no_accumulation() -> None:
    kfac = looked_at_first(mean)
    kfac.step()
    units = kfac.state_dict()["units"]
    rows = {name: float(unit["scalars"][0]) for name, unit in units.items()}
    first = 1 - KFACConfig().curvature.decay
    assert rows == pytest.approx(dict.fromkeys(("0/A/0", "0/G/0", "2/A/0", "2/G/0"), first * SAMPLES))


def test_steps_that_show_nothing_postpone_the_question_three_times_at_most() -> None:
    class LossAlone(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return mean(super().forward(x), 1)

    model = LossAlone(nn.Linear(FEATURES, 4), nn.Linear(4, CLASSES))
    config = {"curvature": {"factor_every": 1}, "update": {"kl_clip": None}}
    kfac = KFAC(model, config)
    watch = kfac._parts.measurement._scale
    for number in range(3):
        assert not watch.over, number
        model.zero_grad()
        model(torch.randn(SAMPLES, FEATURES)).backward()
        kfac.step()
    assert watch.over


def test_a_pass_of_its_own_that_fails_leaves_the_watch_on() -> None:
    model = nn.Linear(FEATURES, CLASSES)
    config = {"curvature": {"fisher": "mc", "likelihood": "categorical"}, "update": {"kl_clip": None}}
    kfac = KFAC(model, config)
    outputs = model(torch.randn(SAMPLES, FEATURES))
    handle = outputs.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kfac.fisher_backward(outputs)
    handle.remove()
    outputs = model(torch.randn(SAMPLES, FEATURES))
    kfac.fisher_backward(outputs)
    cross_entropy(outputs, reduction="sum").backward()
    with pytest.raises(ModelError, match="the loss is a sum"):
        kfac.step()
    kfac.remove()
