"""Hugging Face models: every parameter has a block or a reason, and ranks train them as one process does."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import replace

import pytest
from torch import Tensor

from kfac_dist.config.schema import CurvatureConfig
from kfac_dist.curvature.blocks import find_blocks
from tests.harness import run_ranks
from tests.preconditioner.models import train
from tests.preconditioner.transformer_models import CASES

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kfac_dist[hf]'")

TOLERANCE = 1e-5
# Key biases have no gradient but rounding, in any softmax attention: parameters smaller than this are compared by it.
FLOOR = 1e-4
BLOCKS = {
    "gpt2": {"TiedBlock": 1, "EmbeddingBlock": 1, "LayerNormBlock": 5, "InputFirstLinearBlock": 8},
    "bert": {"EmbeddingBlock": 3, "LayerNormBlock": 5, "LinearBlock": 14},
    "vit": {"ConvolutionBlock": 1, "LayerNormBlock": 5, "LinearBlock": 13},
    "t5": {"TiedBlock": 1, "EmbeddingBlock": 2, "RMSNormBlock": 7, "LinearBlock": 16},
    "llama": {"EmbeddingBlock": 1, "RMSNormBlock": 5, "LinearBlock": 15},
}
REASONS = {
    "gpt2": set(),
    "bert": set(),
    "vit": {"ViTEmbeddings has no block"},
    "t5": set(),
    "llama": set(),
}


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_a_block_or_a_reason(name: str) -> None:
    model = CASES[name].make()
    coverage = find_blocks(model, CurvatureConfig())
    assert Counter(type(block).__name__ for block in coverage.blocks) == BLOCKS[name]
    assert set(coverage.uncovered.values()) == REASONS[name]
    covered = {name for block in coverage.blocks for name in block.parameters}
    assert covered | set(coverage.uncovered) == {name for name, _ in model.named_parameters()}
    assert not covered & set(coverage.uncovered)


def train_all(names: list[str], steps: int) -> dict[str, dict[str, Tensor]]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # T5's relative positions can't be measured, and say so
        return {name: train(replace(ALL[name], steps=steps)) for name in names}


# Heads apart: of fused queries, keys and values, and of the projection that reads them.
ALL = {**CASES, "gpt2, heads": replace(CASES["gpt2"], splits={"*.attn.*": "per_head"})}


# On three ranks the layers that no other test has there: transformers' Conv1D, and LLaMA's norms.
@pytest.mark.parametrize(("size", "names", "steps"), [(2, list(CASES), 20), (3, ["gpt2", "gpt2, heads", "llama"], 4)])
def test_ranks_train_as_one_process_does(size: int, names: list[str], steps: int) -> None:
    [alone] = run_ranks(1, train_all, names, steps, process_group=False, timeout=180)
    wrong = {}
    for results in run_ranks(size, train_all, names, steps, timeout=180):
        for name, parameters in results.items():
            for key, value in parameters.items():
                wanted = alone[name][key]
                error = float((value - wanted).abs().max() / wanted.abs().max().clamp(min=FLOOR))
                if not error < TOLERANCE:
                    wrong[name, key] = error
    assert not wrong
