"""Units tile their factors."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kfac_dist.curvature.factors import FactorKind, FactorSpec, Side, cut, units_of


@given(dim=st.integers(1, 5000), limit=st.none() | st.integers(2, 700))
def test_pieces_tile_the_factor_and_are_near_equal(dim: int, limit: int | None) -> None:
    pieces = cut(dim, limit)
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
    assert pieces[-1][1] == dim
    sizes = [stop - start for start, stop in pieces]
    assert max(sizes) - min(sizes) <= 1
    assert limit is None or max(sizes) <= limit
    assert len(pieces) == (1 if limit is None else -(-dim // limit))


def test_diagonals_are_never_cut_and_costs_count_matrices() -> None:
    specs = (FactorSpec(Side.A, 100, kind=FactorKind.DIAGONAL), FactorSpec(Side.G, 7, batch=2))
    a, *g = units_of("layer", specs, 4)
    assert a.shape == (1, 100)
    assert a.numel == a.cost == 100
    assert [unit.name for unit in g] == ["layer/G/0", "layer/G/1"]
    assert [unit.shape for unit in g] == [(2, 3, 3), (2, 4, 4)]
    assert [unit.cost for unit in g] == [54, 128]
