"""Norms and inner products of blocks that are never made, against blocks that are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kfac_dist.config.schema import CurvatureConfig, LossConfig
from kfac_dist.curvature.blocks import find_blocks
from kfac_dist.doctor import gauss_newton
from kfac_dist.doctor.gauss_newton import compare, hessian_rows
from kfac_dist.tasks import build_loss


def spd(batch: int, n: int, seed: int) -> Tensor:
    root = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT


@pytest.mark.parametrize("name", ["cross_entropy", "sigmoid_cross_entropy", "mse"])
def test_rows_make_the_hessian_of_the_loss(name: str) -> None:
    loss, outputs = build_loss(LossConfig(name=name)), torch.randn(3, 4, dtype=torch.float64)
    targets = torch.tensor([0, 3, 1]) if name == "cross_entropy" else torch.rand(3, 4, dtype=torch.float64)
    rows = torch.stack(hessian_rows(loss, outputs, targets)).flatten(1)
    hessian = torch.func.hessian(lambda flat: loss.total(flat.view(3, 4), targets))(outputs.flatten())
    torch.testing.assert_close(rows.T @ rows, hessian)
    assert len(rows) == (9 if name == "cross_entropy" else 12)  # softmax logits have one direction that changes nothing


def test_comparisons_equal_those_of_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(5, 4), nn.Unflatten(1, (4, 1, 1)), nn.Conv2d(4, 6, 1, groups=2), nn.Flatten(), nn.LayerNorm(6)
    ).double()
    model.append(nn.Linear(6, 3).double())
    inputs, loss = torch.tensor([0, 4, 2, 2]), build_loss(LossConfig(name="cross_entropy"))
    rows = hessian_rows(loss, model(inputs).detach(), torch.tensor([0, 1, 2, 0]))
    blocks = find_blocks(model, CurvatureConfig()).blocks
    factors: dict[str, tuple[Tensor, ...]] = {
        "0": (spd(1, 5, 0).diagonal(dim1=1, dim2=2), spd(1, 4, 1)),
        "2": (spd(2, 3, 2), spd(2, 3, 3)),
        "4": (spd(6, 2, 4),),
        "5": (spd(1, 7, 5), spd(1, 3, 6)),
    }
    assert set(factors) == {block.name for block in blocks}
    # Two blocks at a time, and one whose rows are too many to be held at all.
    monkeypatch.setattr(gauss_newton, "ENTRIES", len(rows) * 21)
    compared = {block.name: (block, result) for block, result in compare(model, blocks, factors, inputs, rows, 4.0)}
    parameters = dict(model.named_parameters())
    outputs = model(inputs)
    for name, (block, result) in compared.items():
        if torch.Size(block.matrix_shape).numel() > 21:
            assert result is None
            continue
        own = [parameters[key] for key in block.parameters]
        matrix = torch.zeros(len(rows), *block.matrix_shape, dtype=torch.float64)
        for row, flat in zip(rows, matrix, strict=True):
            grads = torch.autograd.grad(outputs, own, row, retain_graph=True)
            for values, view in block.matrix_views(grads, flat):
                view.copy_(values)
        parts = matrix.transpose(0, 1).flatten(2)
        exact = torch.block_diag(*(part.T @ part / 4 for part in parts))
        if len(factors[name]) == 1:
            approximate = torch.block_diag(*factors[name][0])
        else:
            a, g = factors[name]
            a = torch.diag_embed(a) if a.ndim == 2 else a
            approximate = torch.block_diag(*(torch.kron(*pair) for pair in zip(g, a, strict=True)))
        assert result is not None
        assert result.error == pytest.approx(float((approximate - exact).norm() / exact.norm()))
        cosine = (approximate * exact).sum() / (approximate.norm() * exact.norm())
        assert result.cosine == pytest.approx(float(cosine))
    assert sum(result is not None for _, result in compared.values()) >= 3
