"""The step itself: three lines in a loop, in place, without waiting for the device."""

from __future__ import annotations

import inspect
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC, KFACConfig
from kfac_dist.curvature import device_ops
from kfac_dist.curvature.capture import capture
from kfac_dist.errors import ConfigError, ModelError, PlanMismatchError
from tests.curvature.waits import Waits
from tests.harness import RankError, run_ranks
from tests.preconditioner.workloads import CLASSES, MODELS, Run, global_batch, mlp, wrap

EVERY_STEP: dict[str, Any] = {
    "curvature": {"factor_every": 1, "decay": 0.5},
    "inversion": {"inverse_every": 1, "damping": 0.1},
}


def small() -> nn.Module:
    torch.manual_seed(0)
    return mlp()


def backward(model: nn.Module, samples: int = 6) -> float:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(samples, 8, generator=generator)
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    return loss.item()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def attach(model: nn.Module, lr: float = 0.1, **sections: Any) -> KFAC:
    return KFAC(model, {**EVERY_STEP, **sections}, optimizer=torch.optim.SGD(model.parameters(), lr=lr))


def test_three_lines_train() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kfac = KFAC(model, KFACConfig(), optimizer=optimizer)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(backward(model))
        kfac.step()
        optimizer.step()
    assert kfac.steps == 40
    assert losses[-1] < losses[0] / 10


def test_the_update_is_the_damped_inverse_of_the_kronecker_product() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    damping = 0.3
    inversion = {"solver": "eigen", "inverse_every": 1, "damping": damping}
    kfac = attach(model, inversion=inversion, update={"kl_clip": None})
    inputs, labels = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
    outputs = model(inputs)
    F.cross_entropy(outputs, labels).backward()
    gradient = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], dim=1)
    kfac.step()
    a = torch.cat([inputs, torch.ones(5, 1)], dim=1)
    g = outputs.detach().softmax(1) - F.one_hot(labels, 2)
    fisher = torch.kron(g.T @ g / 5, a.T @ a / 5) + damping * torch.eye(8)
    wanted = torch.linalg.solve(fisher, gradient.flatten()).view(2, 4)
    torch.testing.assert_close(model[0].weight.grad, wanted[:, :3], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model[0].bias.grad, wanted[:, 3], rtol=1e-4, atol=1e-6)


def test_gradients_are_written_in_place() -> None:
    model = small()
    kfac = attach(model)
    backward(model)
    before = {name: (id(p.grad), p.grad.data_ptr()) for name, p in model.named_parameters()}
    values = gradients(model)
    kfac.step()
    assert {name: (id(p.grad), p.grad.data_ptr()) for name, p in model.named_parameters()} == before
    assert all(not torch.equal(p.grad, values[name]) for name, p in model.named_parameters())


def bucket_views() -> bool:
    """Whether DDP's gradients are still views of its buckets after a step."""
    model = small()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    kfac = attach(wrapped)
    for _ in range(3):
        wrapped.zero_grad()
        backward(wrapped)
        views = [p.grad._base is not None for p in model.parameters()]
        pointers = [p.grad.data_ptr() for p in model.parameters()]
        kfac.step()
    return all(views) and pointers == [p.grad.data_ptr() for p in model.parameters()]


def test_ddp_keeps_its_bucket_views() -> None:
    assert all(run_ranks(2, bucket_views))


def waits(name: str, changes: dict[str, dict[str, Any]]) -> list[tuple[bool, list[str]]]:
    """Whether each step refreshes, and where the host waits in it, from forward on and on the path that a GPU takes."""
    device_ops.free_to_read = lambda device: False  # type: ignore[assignment]
    try:
        config: dict[str, dict[str, Any]] = {
            "curvature": {"factor_every": 2},
            "inversion": {"inverse_every": 4, "damping": 0.1, "early_refresh": 0},
        }
        run = Run(name, {key: {**config.get(key, {}), **changes.get(key, {})} for key in {*config, *changes}})
        found = []
        for step in range(6):
            refreshes = bool(run.kfac._parts.queue.slots)
            with Waits() as mode:
                run.gradients(step)
                assert mode.found.pop() == "_local_scalar_dense"  # the loop's own, of the loss
                run.kfac.step()
            found.append((refreshes, mode.found))
        run.close()
        return found
    finally:
        device_ops.free_to_read = ORIGINAL_FREE_TO_READ


ORIGINAL_FREE_TO_READ = device_ops.free_to_read
DISTRIBUTIONS: list[dict[str, Any]] = [
    {},
    {"placement": "owner", "reduction": "reduce_scatter", "reduce_every": "step"},
    {"placement": "owner", "communication_dtype": "bfloat16", "reduce_every": "step"},
]
# Not all that `MODELS` has: other files add theirs when they are imported.
PLAIN = ("mlp", "conv", "token")
TURNS = {
    "curvature": {"factor_every": 3, "stagger": 3},
    "inversion": {"inverse_every": 6, "stagger": 3, "inverse_lag": 2},
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(
            ("mlp", {"distribution": distribution, "inversion": {"solver": solver}})
            for distribution in DISTRIBUTIONS
            for solver in ("cholesky", "eigen", "ekfac")
        ),
        *((name, {"inversion": {"solver": solver}}) for name in ("conv", "token") for solver in ("cholesky", "ekfac")),
        *((name, TURNS) for name in PLAIN),
        *((name, {"curvature": {"factor_every": 2, "sharing": "reduce"}}) for name in ("conv", "token")),
        *((name, {"curvature": {"factor_every": 2, "sample_fraction": 0.5}}) for name in ("conv", "token")),
        ("mlp", {"update": {"graft": "sign"}}),
        ("conv", {"update": {"graft": "gradient"}}),
        ("mlp", {"curvature": {"factor_every": 2, "fisher": "mc", "likelihood": "categorical"}}),
        ("mlp", {"curvature": {"factor_every": 2, "fisher": "type2", "likelihood": "categorical"}}),
    ],
)
def test_only_a_refresh_waits_for_the_device(name: str, changes: dict[str, dict[str, Any]]) -> None:
    for steps in run_ranks(2, waits, name, changes):
        assert all(found for refreshes, found in steps[:1])  # the counter counts
        assert [found for refreshes, found in steps if not refreshes and found] == []
        assert any(not refreshes for refreshes, _ in steps)


@pytest.mark.parametrize("changes", [{}, {"update": {"graft": "sign"}}, {"inversion": {"solver": "ekfac"}}])
@pytest.mark.parametrize("name", PLAIN)
def test_a_step_copies_nothing_between_host_and_device(
    name: str, changes: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On `meta` in a device's place, which has no values to read either: the step after the first, which would."""
    # What torch has for devices alone: autocast, and memory to copy from.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(capture, "_full_precision", lambda calls: torch.no_grad())
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    with torch.device("meta"):
        model = MODELS[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inversion = {"early_refresh": 0, **changes.get("inversion", {})}
    config = {"curvature": {"factor_every": 1}, **changes, "inversion": inversion}
    kfac = KFAC(model, config, optimizer=optimizer, check_scale=False)
    kfac._parts.measurement._arbiter.open.clear()  # as the first step has judged them all
    kfac.solver_access.advance()
    inputs, labels = (tensor.to("meta") for tensor in global_batch(name, 0))
    with Waits() as mode:
        F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten()).backward()
        kfac.step()
    assert mode.found == []
    kfac.remove()


def test_kl_clip_bounds_the_step() -> None:
    clip, lr = 1e-4, 0.5
    model = small()
    kfac = attach(model, lr=lr, update={"kl_clip": clip})
    backward(model)
    before = gradients(model)
    kfac.step()
    after = gradients(model)
    dot = sum(float((after[name] * before[name]).sum()) for name in after)
    scale = kfac.metrics()["kl_scale"]
    assert scale < 1
    assert lr**2 * dot / scale * scale**2 == pytest.approx(clip, rel=1e-4)


def test_kl_clip_leaves_small_steps_alone() -> None:
    model, free = small(), small()
    kfac, unclipped = attach(model, update={"kl_clip": 1e9}), attach(free, update={"kl_clip": None})
    for each, own in ((model, kfac), (free, unclipped)):
        backward(each)
        own.step()
    assert kfac.metrics()["kl_scale"] == 1
    for name, value in gradients(free).items():
        torch.testing.assert_close(gradients(model)[name], value)


def test_a_fixed_clip_lr_lets_the_schedule_act() -> None:
    """With `current`, lr·ν doesn't depend on lr while the clip is active; with a number, it is proportional to lr."""
    steps = {}
    for rule, lr in (("current", 0.5), ("current", 0.25), (0.5, 0.5), (0.5, 0.25)):
        model = small()
        kfac = attach(model, lr=lr, update={"kl_clip": 1e-5, "kl_clip_lr": rule})
        backward(model)
        kfac.step()
        steps[rule, lr] = lr * next(iter(gradients(model).values()))
    torch.testing.assert_close(steps["current", 0.5], steps["current", 0.25])
    torch.testing.assert_close(steps[0.5, 0.5], 2 * steps[0.5, 0.25])


def test_l2_joins_gradient_and_damping() -> None:
    l2, damping = 0.2, 0.1
    decayed, by_hand = small(), small()
    kfac = attach(decayed, update={"l2": l2, "kl_clip": None})
    inversion = {"inverse_every": 1, "damping": damping + l2}
    other = attach(by_hand, update={"kl_clip": None}, inversion=inversion)
    backward(decayed)
    backward(by_hand)
    for p in by_hand.parameters():
        p.grad.add_(p.detach(), alpha=l2)
    kfac.step()
    other.step()
    for name, value in gradients(by_hand).items():
        torch.testing.assert_close(gradients(decayed)[name], value)


def test_any_vector_is_preconditioned_as_the_gradient_is_and_nothing_else_happens() -> None:
    model, twin = small(), small()
    kfac, direct = attach(model, update={"kl_clip": 1e-6}), attach(twin, update={"kl_clip": None})
    for net in (model, twin):
        backward(net)
    plain = gradients(model)
    direct.step()
    expected = gradients(twin)
    kfac.solver_access.update_curvature()
    doubled = {name: 2 * value for name, value in plain.items()}
    kfac.solver_access.precondition(doubled)
    for name, value in gradients(model).items():
        torch.testing.assert_close(doubled[name], 2 * expected[name])
        assert torch.equal(value, plain[name]), "the gradient itself stays"
    assert kfac.steps == 0
    kfac.solver_access.advance()
    assert kfac.steps == 1


def test_passes_of_another_are_not_measured() -> None:
    model, twin = small(), small()
    for net, looks in ((model, True), (twin, False)):
        kfac = attach(net)
        with kfac.unobserved():
            if looks:
                F.cross_entropy(5 * net(torch.ones(9, 8)), torch.zeros(9, dtype=torch.long)).backward()
                net.zero_grad()
        backward(net)
        kfac.step()
    for name, value in gradients(model).items():
        assert torch.equal(value, gradients(twin)[name])


def test_only_chosen_layers_change() -> None:
    model = small()
    kfac = attach(model, curvature={"factor_every": 1, "include": ["2"]})
    backward(model)
    before = gradients(model)
    kfac.step()
    changed = [name for name, value in gradients(model).items() if not torch.equal(value, before[name])]
    assert changed == ["2.weight", "2.bias"]
    assert kfac.coverage.uncovered["0.weight"] == "not matched by kfac.curvature.include"


def test_a_layer_without_statistics_keeps_its_plain_gradient() -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, CLASSES), "idle": nn.Linear(8, CLASSES)})
    kfac = attach(model, update={"kl_clip": None})
    backward(model["used"])
    model["idle"].weight.grad = torch.ones(CLASSES, 8)
    model["idle"].bias.grad = torch.ones(CLASSES)
    kfac.step()
    assert bool((model["idle"].weight.grad == 1).all())


def test_half_precision_gradients_keep_their_dtype() -> None:
    model = small().to(torch.bfloat16)
    kfac = attach(model)
    F.cross_entropy(model(torch.randn(6, 8, dtype=torch.bfloat16)), torch.randint(0, CLASSES, (6,))).backward()
    kfac.step()
    assert all(p.grad.dtype is torch.bfloat16 and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_remove_leaves_the_model_as_it_was() -> None:
    model = small()
    kfac = attach(model)
    kfac.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    backward(model)


def test_accumulation_without_a_word_is_warned_of() -> None:
    model = small()
    kfac = attach(model)
    backward(model)
    backward(model)
    with pytest.warns(UserWarning, match="micro_batch"):
        kfac.step()


def test_described_accumulation_equals_one_batch() -> None:
    whole, parts = small(), small()
    one, many = attach(whole), attach(parts)
    generator = torch.Generator().manual_seed(9)
    inputs, labels = torch.randn(10, 8, generator=generator), torch.randint(0, CLASSES, (10,), generator=generator)
    F.cross_entropy(whole(inputs), labels).backward()
    one.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for start, stop in ((0, 4), (4, 8), (8, 10)):  # a short last micro-batch
            many.micro_batch(first_sample=start, divisor=10.0, last=stop == 10)
            F.cross_entropy(parts(inputs[start:stop]), labels[start:stop], reduction="sum").div(10).backward()
        many.step()
    for name, value in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KFAC(small(), {}), "optimizer=optimizer"),
        (lambda: attach(nn.Sequential(nn.Bilinear(2, 2, 2))), "no layer of the model gets a K-FAC block"),
        (lambda: attach(small(), curvature={"factor_every": 1, "include": ["nothing"]}), "no layer"),
    ],
)
def test_models_that_cannot_be_served_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"curvature": {"fisher": "mc"}}, "likelihood"),
        ({"inversion": {"damping": -1}}, "inversion.damping"),
        ({"inversion": {"dampin": 1}}, "did you mean"),
        ({"curvature": {"sample_fraction": 0.7}}, "1/k"),
    ],
)
def test_bad_options_are_refused_in_words(config: dict[str, Any], message: str) -> None:
    model = small()
    with pytest.raises(ConfigError, match=message):
        KFAC(model, config, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_forgetting_the_fisher_backward_is_an_error() -> None:
    model = small()
    kfac = attach(model, curvature={"factor_every": 1, "fisher": "mc", "likelihood": "categorical"})
    backward(model)
    with pytest.raises(ModelError, match=r"fisher_backward\(outputs\)"):
        kfac.step()


def different_models() -> str:
    import torch.distributed as dist

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3 + dist.get_rank()))
    try:
        attach(model)
    except PlanMismatchError as error:
        return str(error)
    return "no error"


def test_ranks_with_different_models_all_stop_and_name_the_block() -> None:
    messages = run_ranks(3, different_models)
    assert len(set(messages)) == 1
    assert "first at block 1 (1)" in messages[0]


def bad_fraction() -> None:
    attach(wrap(small()), distribution={"placement": "hybrid", "grad_worker_fraction": 0.5})


def test_a_fraction_that_does_not_fit_is_refused_on_every_rank() -> None:
    with pytest.raises(RankError, match="allowed with 3 ranks"):
        run_ranks(3, bad_fraction)


@pytest.mark.parametrize("solver", ["cholesky", "eigen"])
def test_inverses_in_bfloat16_stay_close(solver: str) -> None:
    updates = {}
    for dtype in ("float32", "bfloat16"):
        model = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(1), nn.Linear(16, 12), nn.LayerNorm(12), nn.Linear(12, 4))
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        inversion = {"solver": solver, "inverse_every": 1, "damping": 0.1, "inverse_dtype": dtype, "max_factor_dim": 9}
        kfac = attach(model, inversion=inversion)
        tokens = torch.randint(0, 9, (16, 2), generator=torch.Generator().manual_seed(1))
        F.cross_entropy(model(tokens), torch.arange(16) % 4).backward()
        kfac.step()
        updates[dtype] = torch.cat([value.flatten() for value in gradients(model).values()])
    error = (updates["bfloat16"] - updates["float32"]).norm() / updates["float32"].norm()
    assert 0 < error < 0.02


def discarding(overlap: bool) -> list[int]:
    """Measure a batch, discard it, and take the step with another: the statistics of the second alone."""
    run = Run("mlp", {**EVERY_STEP, "distribution": {"overlap": overlap}})
    run.gradients(0, lambda inputs: inputs * 100)
    run.kfac.discard()
    run.step(0)
    factors = run.factors()
    run.close()
    other = Run("mlp", {**EVERY_STEP, "distribution": {"overlap": overlap}})
    other.step(0)
    wanted = other.factors()
    other.close()
    return [int(torch.equal(factors[name], wanted[name])) for name in wanted]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_discarded_batch_leaves_no_trace(overlap: bool) -> None:
    assert all(all(same) for same in run_ranks(2, discarding, overlap))


def fails_to_solve() -> tuple[bool, float]:
    """Run out of memory on one rank in the second refresh: the last inverses stay, and nobody waits."""
    import torch.distributed as dist

    from kfac_dist.curvature.inverses import solvers

    run = Run("mlp", EVERY_STEP)
    run.step(0)
    solve_batch = solvers._solve_batch

    def out_of_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("planted")

    if dist.get_rank() == 1:
        solvers._solve_batch = out_of_memory
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.step(1)
    finally:
        solvers._solve_batch = solve_batch
    said = any("planted" in str(warning.message) for warning in caught)
    failures = run.kfac.metrics()["failed_inversions"]
    run.close()
    return said, failures


def test_a_solve_that_runs_out_of_memory_hangs_nobody() -> None:
    (quiet, none), (said, some) = run_ranks(2, fails_to_solve)
    assert (quiet, none) == (False, 0)
    assert said
    assert some > 0


def after_remove() -> str:
    run = Run("mlp", EVERY_STEP)
    run.step(0)
    run.close()
    run.gradients(1)
    try:
        run.kfac.step()
    except Exception as error:
        return str(error)
    return "no error"


def test_a_removed_kfac_does_not_talk_on_the_groups_of_others() -> None:
    assert all("closed" in message for message in run_ranks(2, after_remove))


def refreshing_again() -> list[str]:
    """What `refresh_again` says at each step of layers that take turns, and of ones that don't."""
    said = []
    for stagger in (2, 1):
        inversion = {"inverse_every": 2, "stagger": stagger, "early_refresh": 0, "damping": 0.05}
        run = Run("mlp", {"curvature": {"factor_every": 1}, "inversion": inversion})
        for step in range(4):
            run.gradients(step)
            run.kfac.solver_access.update_curvature()
            before = run.kfac.communicator.traffic.total_calls
            try:
                run.kfac.solver_access.set_damping(0.5)
                run.kfac.solver_access.refresh_again()
                said.append("")
            except ConfigError as error:
                said.append(str(error))
                assert run.kfac.communicator.traffic.total_calls == before
            run.kfac.solver_access.advance()
        run.close()
    return said


@pytest.mark.parametrize("size", [1, 2])
def test_only_what_was_refreshed_whole_is_refreshed_again(size: int) -> None:
    for said in run_ranks(size, refreshing_again):
        turns, together = said[:4], said[4:]
        assert turns[0] == together[0] == together[2] == ""
        for step, text in [*enumerate(turns[1:], 1), (1, together[1]), (3, together[3])]:
            assert f"kfac.refresh_again() at step {step}, which has not refreshed every inverse" in text
            assert "kfac.inversion.stagger 1" in text


def test_a_bias_without_a_gradient_counts_as_zero() -> None:
    """The weight is preconditioned and clipped with the rest of its block, as where ranks hold slices."""
    runs = [Run("mlp", {**EVERY_STEP, "update": {"kl_clip": 1e-4}}) for _ in range(2)]
    for run, missing in zip(runs, (True, False), strict=True):
        run.gradients(0)
        for name in ("0.bias", "4.bias"):
            bias = run.model.get_parameter(name)
            bias.grad = None if missing else torch.zeros_like(bias)
        run.kfac.step()
    one, other = runs
    assert float(one.kfac._parts.trust_region.kl_scale) < 1
    assert torch.equal(one.kfac._parts.trust_region.kl_scale, other.kfac._parts.trust_region.kl_scale)
    for name, parameter in one.model.named_parameters():
        if name in ("0.bias", "4.bias"):
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, other.model.get_parameter(name).grad)
    for run in runs:
        run.close()


class HalfSeen(nn.Module):
    """A layer that K-FAC never sees, one whose output the loss doesn't know, and one as usual."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head, self.idle = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        self.idle(inputs)
        return self.head(torch.tanh(self.hidden(inputs)))


@pytest.mark.parametrize("solver", ["cholesky", "newton_schulz", "eigen", "ekfac"])
def test_what_was_never_measured_keeps_its_plain_gradient(solver: str) -> None:
    torch.manual_seed(0)
    model, idle = HalfSeen(), ("idle.weight", "idle.bias")
    inversion: dict[str, Any] = {"solver": solver, "inverse_every": 1, "damping": 0.5}
    kfac = KFAC(model, {"curvature": {"factor_every": 1}, "inversion": inversion, "update": {"kl_clip": None}})
    plain = {name: torch.randn_like(model.get_parameter(name)) for name in idle}
    for _ in range(3):
        model.zero_grad()
        F.cross_entropy(model(torch.randn(7, 4)), torch.arange(7) % 3).backward()
        seen = model.head.weight.grad.clone()
        for name in idle:
            model.get_parameter(name).grad = plain[name].clone()
        kfac.step()
        assert all(torch.equal(plain[name], model.get_parameter(name).grad) for name in idle)
        assert not torch.allclose(model.head.weight.grad, seen)
    kfac.remove()


def test_kfac_has_few_doors() -> None:
    kfac = KFAC(nn.Sequential(nn.Linear(2, 2)), {"update": {"kl_clip": None}})
    members = [name for name in dir(kfac) if not name.startswith("_")]
    kfac.remove()
    assert len(members) <= 16, members
    assert {"step", "micro_batch", "state_dict", "metrics", "solver_access", "monitor"} <= set(members)
    assert len(inspect.getsource(sys.modules[KFAC.__module__]).splitlines()) < 350
