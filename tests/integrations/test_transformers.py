"""transformers loads where K-FAC is tested: a torchvision that doesn't fit would keep most families from loading."""

from __future__ import annotations

import importlib.util

import pytest
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kfac_dist[hf]'")

FAMILIES = (
    "BartForConditionalGeneration",
    "BertForMaskedLM",
    "DebertaV2ForMaskedLM",
    "GPT2LMHeadModel",
    "GemmaForCausalLM",
    "LlamaForCausalLM",
    "MambaForCausalLM",
    "MixtralForCausalLM",
    "Qwen3ForCausalLM",
    "SwinForImageClassification",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "WhisperForConditionalGeneration",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_model_can_be_imported(name: str) -> None:
    assert issubclass(getattr(transformers, name), nn.Module)


def test_a_torchvision_that_is_installed_fits_torch() -> None:
    """`make setup` leaves it out; one of another torch fails as it is imported."""
    if importlib.util.find_spec("torchvision") is not None:
        import torchvision

        assert torchvision.__version__
