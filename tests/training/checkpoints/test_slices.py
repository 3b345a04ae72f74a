"""Runs of elements by name: what is saved in one cut is put together for any other."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

from kfac_dist.errors import CheckpointError
from kfac_dist.training.checkpoints import slices
from kfac_dist.training.checkpoints.slices import Wanted, piecewise, run_name, saved_runs, straight

VALUES = torch.arange(24.0)


def contents(saved: dict[str, Tensor]) -> Metadata:
    entries = {
        name: TensorStorageMetadata(TensorProperties(dtype=value.dtype), value.size(), [])
        for name, value in saved.items()
    }
    return Metadata(state_dict_metadata=dict(entries))


def cut(*bounds: int) -> dict[str, Tensor]:
    return {run_name("w", a, VALUES[a:b], whole=False): VALUES[a:b].clone() for a, b in pairwise(bounds)}


def load(saved: dict[str, Tensor], start: int, into: Tensor) -> set[str]:
    """Fill `into`; return the names that were read straight into place."""
    runs = saved_runs(contents(saved))
    wanted = [Wanted("w", start, into)]
    direct = straight(wanted, runs)
    for piece in [direct, *piecewise(wanted, runs)] if direct else piecewise(wanted, runs):
        for name, tensor in piece.items():
            tensor.copy_(saved[name])
    return set(direct)


@pytest.mark.parametrize("bounds", [(0, 24), (0, 8, 16, 24), (0, 1, 23, 24), (0, 5, 24)])
@pytest.mark.parametrize(("start", "stop"), [(0, 24), (0, 12), (7, 17), (23, 24)])
def test_any_cut_is_put_together_from_any_other(bounds: tuple[int, ...], start: int, stop: int) -> None:
    into = torch.zeros(stop - start)
    direct = load(cut(*bounds), start, into)
    assert torch.equal(into, VALUES[start:stop])
    assert direct == ({f"w@{start}-{stop}"} & set(cut(*bounds)))


def test_whole_tensors_keep_their_shape_and_serve_slices() -> None:
    saved = {"w": VALUES.view(2, 3, 4).clone()}
    whole, part = torch.zeros(2, 3, 4), torch.zeros(5)
    assert load(saved, 0, whole) == {"w"}
    assert load(saved, 9, part) == set()
    assert torch.equal(whole.flatten(), VALUES)
    assert torch.equal(part, VALUES[9:14])


def test_slices_make_whole_tensors_of_any_memory_format() -> None:
    into = torch.zeros(1, 2, 3, 4).to(memory_format=torch.channels_last)
    load(cut(0, 10, 24), 0, into)
    assert torch.equal(into.flatten(), VALUES)


def test_little_is_staged_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_STAGED_BYTES", 4 * 9)
    saved = {f"{name}@{a}-{a + 12}": VALUES[a : a + 12].clone() for name in "abc" for a in (0, 12)}
    wanted = [Wanted(name, 6, torch.zeros(12)) for name in "abc"]
    rounds = 0
    for piece in piecewise(wanted, saved_runs(contents(saved))):
        rounds += 1
        for name, tensor in piece.items():
            tensor.copy_(saved[name])
    assert rounds == 3
    assert all(torch.equal(want.into, VALUES[6:18]) for want in wanted)


def test_missing_elements_are_told() -> None:
    saved = cut(0, 8, 16)
    with pytest.raises(CheckpointError, match="w: elements from 16 on are not in the checkpoint"):
        load(saved, 4, torch.zeros(20))
    del saved["w@0-8"]
    with pytest.raises(CheckpointError, match="w: elements from 4 on are not in the checkpoint"):
        load(saved, 4, torch.zeros(8))
