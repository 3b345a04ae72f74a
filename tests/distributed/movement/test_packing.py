from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_dist.distributed.movement.packing import pack_symmetric, triangle_numel, unpack_symmetric


def symmetric(*shape: int) -> torch.Tensor:
    half = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(0))
    return half + half.mT


@settings(deadline=None)
@given(n=st.integers(1, 12), lead=st.lists(st.integers(1, 3), max_size=2), flat=st.booleans())
def test_round_trip_is_exact(n: int, lead: list[int], flat: bool) -> None:
    matrix = symmetric(*lead, n)
    packed = torch.full((*lead, triangle_numel(n)), torch.nan)
    pack_symmetric(matrix, packed.view(-1) if flat else packed)
    assert torch.equal(unpack_symmetric(packed, n), matrix)
    out = torch.full_like(matrix, torch.nan)
    assert unpack_symmetric(packed.view(-1) if flat else packed, n, out) is out
    assert torch.equal(out, matrix)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8])
def test_every_element_of_the_lower_triangle_travels_once(n: int) -> None:
    numbered = torch.arange(1.0, n * n + 1).view(n, n)
    packed = torch.full((triangle_numel(n),), torch.nan)
    pack_symmetric(numbered, packed)
    assert sorted(packed.tolist()) == sorted(numbered[torch.tril_indices(n, n).unbind()].tolist())


def test_layouts_of_the_docstring() -> None:
    numbered = torch.tensor([[10.0 * max(i, j) + min(i, j) for j in range(5)] for i in range(5)])
    odd, even = torch.empty(15), torch.empty(10)
    pack_symmetric(numbered, odd)
    assert odd.view(5, 3).tolist() == [[0, 33, 43], [10, 11, 44], [20, 21, 22], [30, 31, 32], [40, 41, 42]]
    pack_symmetric(numbered[:4, :4], even)
    assert even.view(5, 2).tolist() == [[22, 32], [0, 33], [10, 11], [20, 21], [30, 31]]


@pytest.mark.parametrize("n", [5, 6])
def test_bf16_is_converted_on_the_way(n: int) -> None:
    matrix = symmetric(2, n)
    packed = torch.empty(2 * triangle_numel(n), dtype=torch.bfloat16)
    pack_symmetric(matrix, packed)
    assert torch.equal(unpack_symmetric(packed, n, torch.empty_like(matrix)), matrix.bfloat16().float())


@pytest.mark.parametrize("n", [5, 6])
def test_infinities_stay_where_they_are(n: int) -> None:
    matrix = symmetric(n)
    matrix[0, n - 1] = matrix[n - 1, 0] = torch.inf
    packed = torch.empty(triangle_numel(n))
    pack_symmetric(matrix, packed)
    assert torch.equal(unpack_symmetric(packed, n), matrix)


def test_views_into_a_larger_buffer() -> None:
    buffer = torch.zeros(20)
    pack_symmetric(symmetric(4), buffer[5:15])
    assert buffer[:5].eq(0).all()
    assert buffer[15:].eq(0).all()
    assert torch.equal(unpack_symmetric(buffer[5:15], 4), symmetric(4))


def test_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"matrices of shape \(2, 3, 3\) pack into 2 × 6 elements, not into \(11,\)"):
        pack_symmetric(symmetric(2, 3), torch.empty(11))
