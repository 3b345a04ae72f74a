from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.distributed.movement.exchange import Exchange, Part, plan_exchange
from kfac_dist.distributed.movement.gradient_layout import GradientLayout, ParameterSlices, Slice
from tests.harness import run_ranks

SHAPES = {"conv": (5, 2, 3), "bias": (1,), "fc": (7, 3), "scale": (4,), "head": (3, 5), "plain": (6, 2)}


def rows(size: int) -> GradientLayout:
    """FSDP2: whole rows; small parameters leave the last ranks without any."""
    return GradientLayout(tuple(ParameterSlices.rows(name, shape, size) for name, shape in SHAPES.items()), size)


def ranges(size: int) -> GradientLayout:
    """ZeRO-1 and 2: all parameters end to end, cut into `size` equal ranges that cross their boundaries."""
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    step = -(-total // size)
    parameters, first = [], 0
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        cuts = [min(max(rank * step - first, 0), numel) for rank in range(size)] + [numel]
        parameters.append(
            ParameterSlices.sharded(name, shape, [Slice(r, *pair) for r, pair in enumerate(itertools.pairwise(cuts))])
        )
        first += numel
    return GradientLayout(tuple(parameters), size)


def on_one_rank(size: int) -> GradientLayout:
    """All shards on the last rank; the others hold nothing."""
    return GradientLayout(
        tuple(
            ParameterSlices.sharded(name, shape, [Slice(size - 1, 0, torch.Size(shape).numel())])
            for name, shape in SHAPES.items()
        ),
        size,
    )


LAYOUTS = {"rows": rows, "ranges": ranges, "on_one_rank": on_one_rank}


def owners_for(size: int) -> dict[str, int]:
    """`plain` isn't exchanged; with three ranks or more, rank 1 owns nothing."""
    ranks = [rank for rank in range(size) if rank != 1 or size < 3]
    return {name: ranks[index % len(ranks)] for index, name in enumerate(SHAPES) if name != "plain"}


def parts_of(layout: GradientLayout, owners: dict[str, int]) -> list[Part]:
    """One part a parameter; `conv` is cut into runs of rows with owners of their own, as fused attention's q, k, v."""
    parts = []
    for name, owner in owners.items():
        if name == "conv":
            first = Part("conv/first", name, (2, 2, 3), owner)
            parts += [first, Part("conv/rest", name, (3, 2, 3), (owner + 1) % layout.size, start=first.stop)]
        else:
            parts.append(Part.whole(layout[name], owner))
    return parts


def gradient(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    seed = torch.Generator().manual_seed(len(name) * 7 + ord(name[0]))
    return torch.randn(SHAPES[name], generator=seed).to(dtype)


def preconditioned(full: torch.Tensor) -> torch.Tensor:
    """Needs the whole gradient, so that a wrong assembly shows."""
    return full.cumsum(0) * 2 + full.sum()


def there_and_back(kind: str, dtype: torch.dtype, wire: torch.dtype) -> dict[str, Any]:
    comm = build_communicator(20.0)
    layout = LAYOUTS[kind](comm.size)
    local = {
        name: gradient(name, dtype).flatten()[piece.start : piece.stop].clone()
        for name, piece in layout.held_by(comm.rank).items()
    }
    memory = {name: view.data_ptr() for name, view in local.items()}
    plan = plan_exchange(layout, parts_of(layout, owners_for(comm.size)), comm.rank)
    # Rows with a column between them, as in a matrix whose last column is the bias.
    places = {n: torch.full((shape[0], math.prod(shape[1:]) + 1), 9.0)[:, :-1] for n, shape in plan.owned.items()}
    exchange = Exchange(comm, plan, places, wire_dtype=wire)
    assembled = {}
    for _ in range(2):  # the second time through used buffers
        exchange.to_owners(local)
        exchange.assembled()
        assembled = {name: place.clone().view(plan.owned[name]) for name, place in places.items()}
        for name, place in places.items():
            place.copy_(preconditioned(assembled[name]).view_as(place))
        exchange.to_shards()
        exchange.delivered(local, torch.tensor(0.5))
        after = {name: view.clone() for name, view in local.items()}
        for name, piece in layout.held_by(comm.rank).items():
            local[name].copy_(gradient(name, dtype).flatten()[piece.start : piece.stop])
    assert memory == {name: view.data_ptr() for name, view in local.items()}
    return {
        "assembled": assembled,
        "after": after,
        "traffic": comm.traffic.snapshot().get("gradients", (0, 0)),
        "planned": plan.sent_elements,
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_with_real_ranks(size: int, kind: str, dtype: torch.dtype) -> None:
    layout = LAYOUTS[kind](size)
    parts = parts_of(layout, owners_for(size))
    for rank, result in enumerate(run_ranks(size, there_and_back, kind, dtype, torch.float32)):
        assert set(result["assembled"]) == {part.name for part in parts if part.owner == rank}
        expected = {name: gradient(name, dtype) for name in SHAPES}
        for part in parts:
            own = gradient(part.parameter, dtype).flatten()[part.start : part.stop].view(part.shape).float()
            update = preconditioned(own) / 2
            expected[part.parameter].view(-1)[part.start : part.stop] = update.to(dtype).flatten()
            if part.owner == rank:
                assert result["assembled"][part.name].dtype is torch.float32
                assert torch.equal(result["assembled"][part.name], own)
        for name, piece in layout.held_by(rank).items():
            assert torch.equal(result["after"][name], expected[name].flatten()[piece.start : piece.stop])
        if size > 1:
            out = sum(overlap(layout, part, rank) for part in parts if part.owner != rank)
            back = sum(overlap(layout, p, r) for p in parts if p.owner == rank for r in range(size) if r != rank)
            assert result["planned"] == (out, back)
            assert result["traffic"] == (4, 2 * (out + back) * 4)


def overlap(layout: GradientLayout, part: Part, rank: int) -> int:
    """How many of a part's elements a rank holds."""
    held = layout[part.parameter].held_by(rank)
    return 0 if held is None else max(0, min(held.stop, part.stop) - max(held.start, part.start))


def test_missing_gradients_count_as_zero_and_stay_away() -> None:
    layout = rows(1)
    place = torch.empty(7, 3)
    exchange = Exchange(SoloCommunicator(), plan_exchange(layout, [Part.whole(layout["fc"], 0)], 0), {"fc": place})
    exchange.to_owners({"fc": gradient("fc").flatten()})
    exchange.assembled()
    assert torch.equal(place, gradient("fc"))
    exchange.to_shards()
    exchange.delivered({})
    exchange.to_owners({})
    exchange.assembled()
    assert not place.any()


def test_bf16_wire_halves_the_bytes() -> None:
    wide = run_ranks(2, there_and_back, "ranges", torch.bfloat16, torch.float32)
    narrow = run_ranks(2, there_and_back, "ranges", torch.bfloat16, torch.bfloat16)
    for one, other in zip(wide, narrow, strict=True):
        assert one["traffic"][1] == 2 * other["traffic"][1] > 0
        assert all(torch.equal(one["assembled"][name], other["assembled"][name]) for name in one["assembled"])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[GradientLayout, dict[str, int]]:
    size = draw(st.integers(1, 4))
    parameters, owners = [], {}
    for index in range(draw(st.integers(0, 5))):
        numel = draw(st.integers(0, 12))
        cuts = sorted(draw(st.lists(st.integers(0, numel), min_size=size - 1, max_size=size - 1)))
        ranks = draw(st.permutations(range(size)))
        pieces = [Slice(r, *pair) for r, pair in zip(ranks, itertools.pairwise([0, *cuts, numel]), strict=True)]
        parameters.append(ParameterSlices.sharded(f"p{index}", (numel,), pieces))
        owners[f"p{index}"] = draw(st.integers(0, size - 1))
    return GradientLayout(tuple(parameters), size), owners


@settings(deadline=None)
@given(layouts())
def test_plans_of_all_ranks_fit_together(problem: tuple[GradientLayout, dict[str, int]]) -> None:
    layout, owners = problem
    parts = [Part.whole(layout[name], owner) for name, owner in owners.items()]
    plans = [plan_exchange(layout, parts, rank) for rank in range(layout.size)]
    for sender, receiver in itertools.product(range(layout.size), repeat=2):
        # What one sends is what the other expects: the same pieces, in the same order.
        sent = [copy for copy in plans[sender].shards if owners[copy.part] == receiver]
        assert sent == [copy for copy in plans[receiver].pieces if copy.holder == sender]
        assert sum(copy.numel for copy in sent) == plans[sender].shard_splits[receiver]
        assert plans[sender].shard_splits[receiver] == plans[receiver].piece_splits[sender]
    for name, owner in owners.items():  # what an owner gets and has tiles the part
        found = [*plans[owner].pieces, *plans[owner].kept]
        pieces = sorted((copy.offset, copy.offset + copy.numel) for copy in found if copy.part == name)
        assert [0, *(stop for _, stop in pieces)] == [*(start for start, _ in pieces), layout[name].numel]


def test_what_cannot_be_exchanged_is_refused() -> None:
    layout = GradientLayout((ParameterSlices.replicated("all", (2,)), ParameterSlices.rows("w", (2,), 2)), 2)
    for name in ("all", "unknown"):
        with pytest.raises(ValueError, match=f"{name} is not a sharded parameter"):
            plan_exchange(layout, [Part(name, name, (2,), 0)], 0)
    with pytest.raises(ValueError, match="its owner 2 is none of 2 ranks"):
        plan_exchange(layout, [Part("w", "w", (2,), 2)], 0)
    with pytest.raises(ValueError, match="elements 1 to 3 exceed w's 2"):
        plan_exchange(layout, [Part("w", "w", (2,), 0, start=1)], 0)


def test_shard_of_the_wrong_size_is_refused() -> None:
    layout = rows(1)
    plan = plan_exchange(layout, [Part.whole(layout["fc"], 0)], 0)
    with pytest.raises(ValueError, match=r"fc has shape \(7, 3\); its place has \(3, 3\)"):
        Exchange(SoloCommunicator(), plan, {"fc": torch.empty(3, 3)})
    exchange = Exchange(SoloCommunicator(), plan, {"fc": torch.empty(7, 3)})
    with pytest.raises(ValueError, match=r"fc: .* 21 elements or more .* shape \(7, 3\)"):
        exchange.to_owners({"fc": gradient("fc")})
