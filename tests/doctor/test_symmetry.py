"""How far factors are from symmetric, as the doctor says it, whatever the run sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kfac_dist.config.schema import Fisher
from kfac_dist.config.yaml.options import parse_kfac
from kfac_dist.distributed.communicators.build import build_communicator
from kfac_dist.doctor.findings import Severity
from kfac_dist.doctor.measure import measuring
from kfac_dist.doctor.symmetry import examine_symmetry
from tests.harness import run_ranks


def said(config: dict[str, Any]) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    ranks = build_communicator(30.0)
    with measuring(model, parse_kfac(config), Fisher.EMPIRICAL) as kfac:
        nn.functional.cross_entropy(model(torch.randn(6, 5)), torch.arange(6) % 3).backward()
        kfac.step()
        [finding] = examine_symmetry(kfac, ranks)
    ranks.close()
    assert finding.severity is Severity.FINE
    return finding.text


@pytest.mark.parametrize(
    "config",
    [
        {"distribution": {"pack_triangles": True}},
        {"inversion": {"structure": "block_tridiagonal", "solver": "eigen"}},
    ],
)
def test_factors_are_measured_whatever_the_run_sends_or_solves(config: dict[str, Any]) -> None:
    for text in run_ranks(2, said, config):
        assert "factors by at most" in text
