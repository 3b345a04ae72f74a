from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_dist.distributed.communicator import SoloCommunicator, build_communicator
from kfac_dist.distributed.exchange import Exchange, plan_exchange
from kfac_dist.distributed.layout import GradientLayout, ParameterSlices, Slice
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
    plan = plan_exchange(layout, owners_for(comm.size), comm.rank)
    exchange = Exchange(comm, plan, wire_dtype=wire)
    assembled = {}
    for _ in range(2):  # the second time through used buffers
        full = exchange.to_owners(local)
        assembled = {name: tensor.clone() for name, tensor in full.items()}
        exchange.to_shards({name: preconditioned(tensor) for name, tensor in full.items()}, local)
        after = {name: view.clone() for name, view in local.items()}
        for name, piece in layout.held_by(comm.rank).items():
            local[name].copy_(gradient(name, dtype).flatten()[piece.start : piece.stop])
    assert memory == {name: view.data_ptr() for name, view in local.items()}
    return {
        "assembled": assembled,
        "after": after,
        "traffic": comm.traffic.snapshot().get("gradients", (0, 0)),
        "planned": plan.sent_elements(comm.rank),
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_with_real_ranks(size: int, kind: str, dtype: torch.dtype) -> None:
    layout, owners = LAYOUTS[kind](size), owners_for(size)
    for rank, result in enumerate(run_ranks(size, there_and_back, kind, dtype, torch.float32)):
        assert set(result["assembled"]) == {name for name, owner in owners.items() if owner == rank}
        for name, full in result["assembled"].items():
            assert full.dtype is torch.float32
            assert torch.equal(full, gradient(name, dtype).float())
        for name, piece in layout.held_by(rank).items():
            whole = gradient(name, dtype)
            expected = preconditioned(whole.float()) if name in owners else whole
            assert torch.equal(result["after"][name], expected.to(dtype).flatten()[piece.start : piece.stop])
        if size > 1:
            held = layout.held_by(rank)
            out = sum(piece.numel for name, piece in held.items() if owners.get(name, rank) != rank)
            back = sum(
                piece.numel
                for name, owner in owners.items()
                if owner == rank
                for piece in layout[name].slices or ()
                if piece.rank != rank
            )
            assert result["planned"] == (out, back)
            assert result["traffic"] == (4, 2 * (out + back) * 4)


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
    plans = [plan_exchange(layout, owners, rank) for rank in range(layout.size)]
    for sender, receiver in itertools.product(range(layout.size), repeat=2):
        # What one sends is what the other expects: the same pieces, in the same order.
        sent = [(c.name, c.piece) for c in plans[sender].shard_copies if owners[c.name] == receiver]
        expected = [(c.name, c.piece) for c in plans[receiver].owner_copies if c.piece.rank == sender]
        assert sent == expected
        assert sum(piece.numel for _, piece in sent) == plans[sender].shard_splits[receiver]
        assert plans[sender].shard_splits[receiver] == plans[receiver].owner_splits[sender]
    for plan in plans:
        for copies in (plan.shard_copies, plan.owner_copies):
            ends = itertools.accumulate((copy.piece.numel for copy in copies), initial=0)
            assert [copy.offset for copy in copies] == list(ends)[: len(copies)]


def test_what_cannot_be_exchanged_is_refused() -> None:
    layout = GradientLayout((ParameterSlices.replicated("all", (2,)), ParameterSlices.rows("w", (2,), 2)), 2)
    for name in ("all", "unknown"):
        with pytest.raises(ValueError, match=f"{name} is not a sharded parameter"):
            plan_exchange(layout, {name: 0}, 0)
    with pytest.raises(ValueError, match="its owner 2 is none of 2 ranks"):
        plan_exchange(layout, {"w": 2}, 0)


def test_shard_of_the_wrong_size_is_refused() -> None:
    layout = rows(1)
    exchange = Exchange(SoloCommunicator(), plan_exchange(layout, {"fc": 0}, 0))
    with pytest.raises(ValueError, match=r"fc: .* has 21 elements, not \(7, 3\)"):
        exchange.to_owners({"fc": gradient("fc")})
