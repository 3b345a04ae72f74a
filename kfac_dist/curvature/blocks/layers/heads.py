"""The layers that make attention's heads, the layer that reads them, and the width of a head, as far as a model says.

`nn.MultiheadAttention` says it itself. Other attention modules are known by the names of their projections, and by
attributes of the module or of a configuration above it, as Hugging Face's models have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.layers.attention import AttentionBlock
from kfac_dist.curvature.factors import Heads, Side

_FUSED = {"qkv", "c_attn", "in_proj", "query_key_value", "wqkv", "qkv_proj", "to_qkv"}
_QUERIES = {"q", "query", "q_proj", "to_q", "wq", "q_lin", "q_attn"}
_SHARED = {"k", "v", "key", "value", "k_proj", "v_proj", "to_k", "to_v", "wk", "wv", "k_lin", "v_lin"}
_READS = {"o", "out", "out_proj", "o_proj", "c_proj", "to_out", "wo", "proj", "projection", "out_lin", "dense"}
_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "d_kv")
_COUNTS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "heads", "nhead")
_SHARED_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def heads_of(block: Block, modules: Mapping[str, nn.Module]) -> Heads | None:
    """Return the relation of a block's layer to attention's heads; None if none is found.

    Args:
        block: The block.
        modules: The model's modules by name.
    """
    if isinstance(block, AttentionBlock):
        module = block.module
        assert isinstance(module, nn.MultiheadAttention)
        side = Side.A if block.projection.name == "out_proj" else Side.G
        return Heads(side, fused=False, dim=module.embed_dim // module.num_heads)
    path = block.name.split(".")
    leaf = path[-1].lower()
    d_out, d_in = block.matrix_shape[1], block.matrix_shape[2] - getattr(block, "has_bias", 0)
    fused = leaf in _FUSED
    if fused or leaf in _QUERIES or leaf in _SHARED:
        side, width = Side.G, d_out // 3 if fused else d_out
    elif leaf in _READS and _inside_attention(path, modules):
        side, width = Side.A, d_in
    else:
        return None
    for source in _sources(path, modules):
        dim = _number(source, _DIMS)
        count = _number(source, _SHARED_COUNTS) if leaf in _SHARED else None
        count = count or _number(source, _COUNTS)
        if dim is not None:
            return Heads(side, fused, dim)
        if count is not None:
            return Heads(side, fused, width // count)
    return Heads(side, fused, None)


def _inside_attention(path: list[str], modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer belongs to an attention module: by a name above it, or by heads that its own parent has."""
    parent = modules.get(".".join(path[:-1]))
    return any("att" in part.lower() for part in path[:-1]) or _number(parent, _COUNTS) is not None


def _sources(path: list[str], modules: Mapping[str, nn.Module]) -> Iterator[object]:
    """Yield the modules above a layer and their configurations, the nearest first."""
    for length in range(len(path) - 1, -1, -1):
        module = modules.get(".".join(path[:length]))
        yield module
        yield getattr(module, "config", None)


def _number(source: object, names: tuple[str, ...]) -> int | None:
    found = (getattr(source, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
