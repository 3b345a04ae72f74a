"""The zoo's animals: every class of transformers that predicts tokens or classifies images, built small.

`families` lists the classes by their task, as transformers' own tables have them; `build` makes one from nothing but
its configuration class. A configuration's fields become small by their names (`_RULES`), those of nested
configurations too; what a rule can't know stands in `EXCEPTIONS`. Nothing is fetched.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.zoo_timm import TIMM
from kfac_dist.tasks import DataSplits

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):  # missing, or built for another torch: transformers does without, if it knows
    sys.modules["torchvision"] = None  # type: ignore[assignment]

VOCABULARY, LENGTH, CLASSES, IMAGE = 32, 6, 5, 32
# Token ids below are special ones, those from `WORDS[1]` on stand for images, sounds and the like.
WORDS = (4, 20)
WIDTH, HEADS, HEAD, LAYERS, INNER = 32, 4, 8, 2, 48
TRAINED, TESTED = 16, 4

SEQUENCES = {"causal", "masked", "seq2seq"}


@dataclass(frozen=True)
class Family:
    """A class of transformers (or a model of timm).

    Attributes:
        name: Name of the class; unique.
        kind: transformers' name of the configuration.
        task: `causal`, `masked`, `seq2seq`, `vision` or `timm`.
    """

    name: str
    kind: str
    task: str


def families() -> list[Family]:
    """Return every class once, under the first task that lists it."""
    from transformers.models.auto import modeling_auto as tables

    listed = {
        "causal": tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq": tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "masked": tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "vision": tables.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    found: dict[str, Family] = {}
    for task, table in listed.items():
        for kind, names in table.items():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, Family(name, kind, task))
    return [*found.values(), *(Family(name, "timm", "timm") for name in TIMM)]


# ---- training data of one family


class Logits(nn.Module):
    """The model's logits, from one tensor."""

    def __init__(self, model: nn.Module, arguments: Callable[[Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.model(**self.arguments(inputs))
        logits: Tensor = found if isinstance(found, Tensor) else found["logits"] if "logits" in found else found[0]
        return logits


class Absent(Exception):
    """A family that can't be built here, and why."""


def build(name: str) -> nn.Module:
    """Return a family's model, small, with random weights.

    Raises:
        Absent: It can't be built from its configuration here.
    """
    family = next(family for family in families() if family.name == name)
    if family.task == "timm":
        return _timm(family.name)
    import transformers

    found = getattr(transformers, family.name, None)
    if found is None or getattr(found, "is_dummy", False):
        raise Absent(f"transformers {transformers.__version__} can't import it")
    config = small_config(config_class(family, found), family)
    model = found(config)
    return Logits(model, ARGUMENTS.get(family.name, _ARGUMENTS[family.task]))


def config_class(family: Family, model_class: type) -> type:
    return getattr(model_class, "config_class", None) or _named_config(family.kind)


def _named_config(kind: str) -> type:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found: type = CONFIG_MAPPING[kind]
    return found


def data(name: str) -> DataSplits:
    """Return random tokens or images with labels for the family's loss."""
    family = next(family for family in families() if family.name == name)
    generator = torch.Generator().manual_seed(0)
    count = TRAINED + TESTED
    if family.task in SEQUENCES:
        inputs = torch.randint(*WORDS, (count, LENGTH), generator=generator)
        targets = torch.randint(*WORDS, (count, LENGTH), generator=generator)
    else:
        size = SIDES.get(name, IMAGE)
        inputs = torch.randn(count, 3, size, size, generator=generator)
        targets = torch.randint(0, CLASSES, (count,), generator=generator)
    train, test = slice(None, TRAINED), slice(TRAINED, None)
    return DataSplits(TensorDataset(inputs[train], targets[train]), TensorDataset(inputs[test], targets[test]))


def _seq2seq(tokens: Tensor) -> dict[str, Any]:
    return {"input_ids": tokens, "decoder_input_ids": tokens}


_ARGUMENTS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "causal": lambda tokens: {"input_ids": tokens},
    "masked": lambda tokens: {"input_ids": tokens},
    "seq2seq": _seq2seq,
    "vision": lambda images: {"pixel_values": images},
}


# Images of another size than `IMAGE`.
SIDES = {"MobileViTV2ForImageClassification": 64}


def _pixels_as_tokens(images: Tensor) -> dict[str, Any]:
    return {"input_ids": (images.flatten(1)[:, :LENGTH].sigmoid() * (VOCABULARY - 2)).long()}


def _patches(images: Tensor) -> dict[str, Any]:
    side = IMAGE // 8
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(len(images), side * side, -1)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
        "spatial_shapes": torch.full((len(images), 2), side),
    }


def _with_sound(tokens: Tensor) -> dict[str, Any]:
    """Give every token eight frames of sound, as many as it stands for."""
    waves = torch.arange(16 * LENGTH * 8, dtype=torch.float32).view(1, 16, -1).sin()
    return {"input_ids": tokens, "input_features": waves * (1 + tokens.sum(1)[:, None, None] / 100)}


ARGUMENTS: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "VoxtralRealtimeForConditionalGeneration": _with_sound,
    "ImageGPTForImageClassification": _pixels_as_tokens,
    "Siglip2ForImageClassification": _patches,
}


# ---- small configurations


def small_config(cls: type, family: Family) -> Any:
    """Return a configuration of few small layers."""
    values = small_values(cls, family.kind)
    if family.task == "vision":
        values["num_labels"] = CLASSES
    if "use_cache" in _fields(cls):
        values["use_cache"] = False
    for field, value in EXCEPTIONS.get(family.name, {}).items():
        nested = isinstance(value, dict) and isinstance(values.get(field), dict)
        values[field] = {**values[field], **value} if nested else value
    return cls(**{name: value for name, value in values.items() if value is not None})


def small_values(cls: type, kind: str) -> dict[str, Any]:
    """Return arguments of a configuration class that make it small, nested configurations as dicts."""
    values: dict[str, Any] = {}
    nested = _nested(cls)
    for name, default in _fields(cls).items():
        if name in nested:
            inner = nested[name]
            values[name] = {**small_values(inner, inner.model_type), "model_type": inner.model_type}
            continue
        for pattern, rule in _RULES:
            if re.fullmatch(pattern, name):
                value = rule(default)
                if value is not None:
                    values[name] = value
                break
    if "kv_lora_rank" in values:  # latent attention has as many keys as queries
        values |= {name: HEADS for name in ("num_key_value_heads",) if name in values}
    return values | KINDS.get(kind, {})


def _fields(cls: type) -> dict[str, Any]:
    """Return fields and their defaults; None where a function makes them."""
    missing = dataclasses.MISSING
    return {f.name: None if f.default is missing else f.default for f in dataclasses.fields(cls)}


def _nested(cls: type) -> dict[str, type]:
    """Return the nested configurations, by field, as the class chooses them by itself."""
    from transformers import PretrainedConfig

    if not cls.sub_configs:
        return {}
    try:
        default = cls()
    except Exception:  # such as an encoder and a decoder, of which there is no default
        return {}
    parts = {name: getattr(default, name, None) for name in cls.sub_configs}
    return {name: type(part) for name, part in parts.items() if isinstance(part, PretrainedConfig)}


Rule = Callable[[Any], Any]


def _size(value: int) -> Rule:
    """An int becomes this one unless it is smaller already; of several each is divided alike; None stays."""

    def rule(default: Any) -> Any:
        match default:
            case bool():
                return None
            case int():
                return min(default, value) if default > 0 else None
            case tuple() | list():
                return _divided(default)
        return None

    return rule


def _divided(sizes: Any) -> Any:
    """Divide widths so that heads still divide them: all by the same power of two."""
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    by = 2 ** max(0, round(math.log2(max(sizes) / 64)))
    return tuple(max(size // by, 1) for size in sizes)


def _always(value: Any) -> Rule:
    return lambda default: None if default is None else value


def _ones(default: Any) -> Any:
    """As many stages, each of one layer."""
    match default:
        case bool():
            return None
        case int():
            return min(default, LAYERS)
        case tuple() | list() if all(isinstance(part, int) for part in default):
            return tuple(1 for _ in default)
    return None


def _zero(default: Any) -> Any:
    match default:
        case bool():
            return None
        case int() | float():
            return type(default)(0)
        case tuple() | list():
            return tuple(type(part)(0) for part in default)
    return None


def _kept(default: Any) -> Any:
    return None


# The first that matches a field's whole name.
_RULES: tuple[tuple[str, Rule], ...] = (
    (r".*(drop|pdrop).*", _zero),
    (r"mask_(time|feature)_prob|.*jitter.*", _zero),
    (r"pad_(token_id|index)", _always(0)),
    (r"(decoder_)?bos_(token_id|index)|(.*_)?decoder_start_token_id", _always(1)),
    (r"(forced_)?eos_(token_id|index)|sep_token_id", _always(2)),
    (r"mask_(token_id|index)|unk_(token_id|index)|cls_token_id", _always(3)),
    (r"forced_bos_token_id", _kept),
    (r".*_token_(id|index)", _always(VOCABULARY - 1)),
    (r"type_vocab_sizes?", _kept),
    (r".*vocab_size.*|.*_byte_group_vocab", _size(VOCABULARY)),
    (r"max_position_embeddings|.*max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length", _size(64)),
    (r".*max_(source|target)_positions", _size(64)),
    (r"sliding_window(_size)?|attention_window(_size)?|attention_chunk_size|window_size|local_attention", _size(4)),
    (r".*(_interval|_period|_pattern|_every_n_layers|_sparse_step|layer_group_size)", _size(2)),
    (r"first_k_dense_replace|num_dense_layers|.*_layer_offset|num_kv_shared_layers", _size(1)),
    (r"depths?|num_blocks|stage_num.*|num_block_repeats|block_sizes|n_attn_blocks|layer_depths", _ones),
    (r"max_window_layers|.*(num|n)_.*layers|(encoder|decoder|t2u_.*|speech_.*)_layers|n_layers?|num_layers", _ones),
    (r"num_(key_value|kv)_heads|.*num_key_value_heads", _size(2)),
    (
        r".*(attention|num|n|linear|mamba|index|indexer)_.*heads?|n_heads?|num_heads|encoder_attention_heads",
        _size(HEADS),
    ),
    (r".*head_dim|d_kv|.*head_size|d_head|dim_head|linear_key_head_dim|kv_channels", _size(HEAD)),
    (r".*lora_rank|.*_rank", _size(8)),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", _size(HEAD)),
    (r"(n|num|moe_num|.*)_?(routed|local)?_?experts", _size(4)),
    (r"(moe_)?(num_experts_per_tok|top_?k|moe_topk|moe_k|top_k_experts)", _size(2)),
    (r"n_group|topk_group", _size(1)),
    (
        r".*intermediate_size.*|.*ffn_dim|d_ff|dff|dim_ff|n_inner|d_inner|.*ffn_hidden_size|feed_forward_size|ffn_dim",
        _size(INNER),
    ),
    (r"image_size|train_size", lambda default: IMAGE if isinstance(default, int) else None),
    (r"patch_size", _size(8)),
    (r"hidden_sizes|embed_dims|.*_channels|key_dim|neck_hidden_sizes|base_attn_unit_dims", _size(WIDTH)),
    (
        r".*hidden_size(_global)?|d_model|n_embd|.*embed_dim|emb_dim|embedding_(size|dim)|hidden_dim|dim|width|.*projection_dim",
        _size(WIDTH),
    ),
    (r".*(state_size|d_state)", _size(8)),
    (r".*chunk_size", _size(8)),
    (r".*num_mel_bins", _size(16)),
    (r"zero_expert_num|num_codebooks", _size(1)),
)

_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_SWIN = {"embed_dim": 24, "depths": (1, 2), "num_heads": (3, 6), "window_size": 4}
# Fields of one kind of configuration, wherever it stands.
KINDS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "cvt": {"depth": (1, 2, 3)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "ministral": {"head_dim": HEAD},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "n_groups": 1},
    "reformer": {"axial_pos_embds": False, "local_attn_chunk_length": 2, "lsh_attn_chunk_length": 2, "num_buckets": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 3, "pad_token_id": 0},
    "neomme": {"head_dim": 16},
    "bit": {"num_groups": 4},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "donut-swin": _SWIN,
    "focalnet": {"embed_dim": 16},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3}
    | dict.fromkeys(("in_channels", "out_channels", "num_block_repeats"))
    | {"hidden_dim": 320},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "perceiver": {"num_latents": 8, "d_latents": 32, "d_model": 32, "max_position_embeddings": LENGTH},
    "textnet": {"hidden_sizes": (8, 8, 16, 16, 16), "stem_out_channels": 8},
    "hiera": {"image_size": (IMAGE, IMAGE)},
    "levit": {"patch_size": 16},
    "mobilevitv2": {"width_multiplier": 0.25},
    "pp_lcnet": {"scale": 0.25, "class_expand": 64},
    "hgnet_v2": {
        "stem_channels": (3, 8, 16),
        "stage_in_channels": (16, 16, 16, 16),
        "stage_mid_channels": (8, 8, 8, 8),
        "stage_out_channels": (16, 16, 16, 16),
        "stage_numb_of_layers": (2, 2, 2, 2),
        "hidden_sizes": (16, 16, 16, 16),
    },
}
# Fields of one class's configuration.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "ReformerModelWithLMHead": {"is_decoder": True},
    "VoxtralRealtimeForConditionalGeneration": {"text_config": {"head_dim": HEAD}},
    "VoxtralForConditionalGeneration": {"text_config": {"num_key_value_heads": 2, "head_dim": HEAD}},
    "PerceiverForImageClassificationLearned": {"image_size": IMAGE},
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1},
    "PerceiverForImageClassificationConvProcessing": {"num_cross_attention_heads": 1},
}


def _timm(name: str) -> nn.Module:
    if importlib.util.find_spec("timm") is None:
        raise Absent("timm is not installed")
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise Absent(f"timm can't be imported: {error}") from error
    found: nn.Module = timm.create_model(name, num_classes=CLASSES, **TIMM[name])
    return found
