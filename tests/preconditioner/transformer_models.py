"""Tiny Hugging Face models from their configurations: random weights, no dropout, nothing fetched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.preconditioner.models import CLASSES, Case
from tests.preconditioner.workloads import GLOBAL_BATCH

VOCABULARY, LENGTH, WIDTH = 11, 5, 8


class Logits(nn.Module):
    """The model's logits, from one tensor."""

    def __init__(self, model: nn.Module, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.keys = model, keys

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(**dict.fromkeys(self.keys, inputs)).logits


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return Logits(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_positions=8, n_embd=WIDTH, n_layer=2, n_head=2,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
            )
        ),
        ("input_ids",),
    )  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return Logits(
        BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                max_position_embeddings=8, num_labels=CLASSES,
            )
        ),
        ("input_ids",),
    )  # fmt: skip


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return Logits(
        ViTForImageClassification(
            ViTConfig(
                image_size=8, patch_size=4, num_channels=2, hidden_size=WIDTH, num_hidden_layers=2,
                num_attention_heads=2, intermediate_size=12, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0, num_labels=CLASSES,
            )
        ),
        ("pixel_values",),
    )  # fmt: skip


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return Logits(
        T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY, d_model=WIDTH, d_kv=4, d_ff=12, num_layers=1, num_decoder_layers=1, num_heads=2,
                dropout_rate=0.0, relative_attention_num_buckets=4, decoder_start_token_id=0, use_cache=False,
            )
        ),
        ("input_ids", "decoder_input_ids"),
    )  # fmt: skip


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return Logits(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=12, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8, use_cache=False,
            )
        ),
        ("input_ids",),
    )  # fmt: skip


def _tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(0, VOCABULARY, (GLOBAL_BATCH, LENGTH), generator=generator)


def _images(generator: torch.Generator) -> Tensor:
    return torch.randn(GLOBAL_BATCH, 2, 8, 8, generator=generator)


def _language(make: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(make, _tokens, tokens=LENGTH, steps=20, **options)


CASES: dict[str, Case] = {
    "gpt2": _language(gpt2),
    "bert": Case(bert, _tokens, steps=20),
    "vit": Case(vit, _images, steps=20),
    "t5": _language(t5),
    "llama": _language(llama),
}
