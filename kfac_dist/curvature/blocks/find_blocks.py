"""Assignment of a model's parameters to blocks, with a reason for each parameter that has none.

Modules that share a weight are one block when their calls can be one layer's uses: linear layers among themselves,
embeddings among themselves, or an embedding and the head that is tied to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from kfac_dist.config.schema import CurvatureConfig, Fisher, Sharing
from kfac_dist.curvature.blocks.base import Block
from kfac_dist.curvature.blocks.layers.attention import AttentionBlock, attention_blocks
from kfac_dist.curvature.blocks.layers.embedding import EmbeddingBlock
from kfac_dist.curvature.blocks.layers.heads import heads_of
from kfac_dist.curvature.blocks.layers.linear import LinearBlock
from kfac_dist.curvature.blocks.layers.norm import NormBlock
from kfac_dist.curvature.blocks.layers.scaled import ScaledBlock
from kfac_dist.curvature.blocks.layers.tied import TiedBlock
from kfac_dist.curvature.blocks.table import block_class, covered_type
from kfac_dist.curvature.blocks.trial import refusal
from kfac_dist.curvature.blocks.weight_matrices import WeightMatrices, without_bias

Named = tuple[str, nn.Module]

# Why a parameter that isn't trained has no block.
FROZEN = "frozen"
_FROZEN_WEIGHT = "its weight is frozen"
# Names of parameters of layers that have a block; derived classes may add others (LoRA).
_OWN_NAMES = ("weight", "bias", "bias_k", "bias_v")


@dataclass(frozen=True)
class Coverage:
    """The parameters that K-FAC preconditions, and the reasons why others have no block.

    Attributes:
        blocks: The blocks, in the order in which the model lists its modules.
        uncovered: Parameter name to reason, by the names of `model.named_parameters()`.
        mismatched: Former blocks whose captured rows didn't reproduce their gradient, with the reason.
        idle: Blocks that no backward pass had come through when their first refresh was due.
    """

    blocks: tuple[Block, ...]
    uncovered: dict[str, str] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    mismatched: dict[str, str] = field(default_factory=dict)


def find_blocks(model: nn.Module, config: CurvatureConfig, matrices: WeightMatrices | None = None) -> Coverage:
    """Return a block for every layer that has one and that the configuration's patterns select.

    Args:
        model: The model.
        config: Patterns, and what is measured.
        matrices: Weight matrices to cover if nothing else has a block; None covers all that can be.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners = _owners(model)
    covered: set[str] = set()
    reasons: dict[str, str] = {}
    blocks: list[Block] = []
    spoken_for: dict[int, str] = {}  # modules in another one's block, and the reason for the rest
    for name, module in model.named_modules():
        kind = block_class(module)
        inside = kind is not None and issubclass(kind, AttentionBlock)  # its out_proj is never called as a module
        own = dict(module.named_parameters(recurse=inside))
        if not own:
            continue
        found: list[Block] = []
        reason = spoken_for.get(id(module), "")
        if id(module) not in spoken_for:
            reason, found = _blocks_of(name, module, own, owners, config, bias=matrices is None)
            for block in found:  # by the names that the model lists: a bias may be kept elsewhere, too
                block.parameters = {names[id(parameter)]: parameter for parameter in block.parameters.values()}
            within = module.modules() if inside else ()
            spoken_for |= {id(part): reason for part in (*within, *(part for block in found for part in block.modules))}
        blocks += found
        covered |= {key for block in found for key in block.parameters}
        for key, parameter in own.items():
            reasons.setdefault(names[id(parameter)], _reason(key, parameter, module, reason))
    if matrices is not None:
        blocks, others = matrices.split(blocks)
        reasons |= others
        covered = {key for block in blocks for key in block.parameters}
    modules = dict(model.named_modules())
    for block in blocks:
        block.heads = heads_of(block, modules)
    return Coverage(tuple(blocks), {name: reasons[name] for name in names.values() if name not in covered})


def _reason(key: str, parameter: nn.Parameter, module: nn.Module, reason: str) -> str:
    """Return why one parameter of a module has no block, given the reason for its weight."""
    if not parameter.requires_grad:
        return FROZEN
    if reason == _FROZEN_WEIGHT and not key.endswith(_OWN_NAMES):
        return f"{type(module).__name__} computes with it beside its frozen weight, and no block covers that"
    return reason


def _blocks_of(
    name: str,
    module: nn.Module,
    own: dict[str, nn.Parameter],
    owners: dict[int, list[Named]],
    config: CurvatureConfig,
    *,
    bias: bool,
) -> tuple[str, list[Block]]:
    """Return a module's blocks, and the reason for its parameters that are not part of them."""
    kind = block_class(module)
    if kind is None:
        return f"{type(module).__name__} has no block", []
    reason = _deselected(name, config) or _unfit(module, kind, own, config)
    if reason is not None:
        return reason, []
    if isinstance(module, nn.MultiheadAttention) and issubclass(kind, AttentionBlock):
        return _attention(name, module, own, owners, config, bias=bias)
    sharers = _unique(
        [
            owner
            for parameter in own.values()
            for owner in owners[id(parameter)]
            if owner[1] is not module and not _keeps(owner[1], module)
        ]
    )
    if not sharers:
        made = kind if bias else without_bias(kind)
        return _believed(f"not covered by {kind.__name__}", [made(name, module, _sharing(name, config))])
    return _believed(*_tied(name, module, sharers, config, bias=bias))


def _believed(reason: str, blocks: list[Block]) -> tuple[str, list[Block]]:
    """Keep blocks whose modules compute the block's assumed function; give a reason for the others."""
    for block in blocks:
        for base in dict.fromkeys(covered_type(module) for module in block.modules):
            refused = None if base is None else refusal(block, base)
            if refused is not None:
                return refused, []
    return reason, blocks


def _keeps(holder: nn.Module, layer: nn.Module) -> bool:
    """Whether a module only keeps a layer's bias by another name, as BERT's heads do, and is no layer itself."""
    return block_class(holder) is None and all(
        p is not getattr(layer, "weight", None) for p in holder.parameters(False)
    )


def _attention(
    name: str,
    module: nn.MultiheadAttention,
    own: dict[str, nn.Parameter],
    owners: dict[int, list[Named]],
    config: CurvatureConfig,
    *,
    bias: bool,
) -> tuple[str, list[Block]]:
    inside = {id(part) for part in module.modules()}
    tied = [other for p in own.values() for other, sharer in owners[id(p)] if id(sharer) not in inside]
    if tied:
        return f"its weight is tied to that of {tied[0]}", []
    blocks = attention_blocks(name, module, lambda own_name: _sharing(own_name, config), bias=bias)
    # Rows of one weight are in or out together.
    against = {block.name: _excluded(block.name, config) for block in blocks}
    for left in [against[block.name] for block in blocks if block.projection.name != "out_proj"]:
        against |= {} if left is None else dict.fromkeys((n for n in against if not n.endswith("out_proj")), left)
    reasons = [reason for reason in against.values() if reason is not None]
    reason = reasons[0] if reasons else "not covered by AttentionBlock"
    return reason, [block for block in blocks if against[block.name] is None]


def _tied(
    name: str, module: nn.Module, sharers: Sequence[Named], config: CurvatureConfig, *, bias: bool
) -> tuple[str, list[Block]]:
    """Return the one block of modules that share a weight, if there is a kind for them."""
    refused = f"its weight is tied to that of {sharers[0][0]}"
    weight = getattr(module, "weight", None)
    for other, sharer in sharers:
        if weight is None or getattr(sharer, "weight", None) is not weight:
            return refused, []
        kind = block_class(sharer)
        reason = _deselected(other, config) or _unfit(
            sharer, kind, dict(sharer.named_parameters(recurse=False)), config
        )
        if reason is not None:
            return f"{refused}: {reason}", []
    modules = [module, *(sharer for _, sharer in sharers)]
    make = _kind_of_tied(modules)
    if make is None:
        return refused, []
    if make is TiedBlock and config.fisher is Fisher.INPUT_ONLY:
        return "input_only measures no output gradients, and a tied weight's Fisher is made of them", []
    return f"not covered by {make.__name__}", [
        (make if bias else without_bias(make))(name, module, _sharing(name, config), also=modules[1:])
    ]


def _kind_of_tied(modules: Sequence[nn.Module]) -> type[LinearBlock | EmbeddingBlock | TiedBlock] | None:
    kinds = {block_class(module) for module in modules}
    if kinds == {EmbeddingBlock}:
        return EmbeddingBlock
    if kinds == {LinearBlock}:
        return LinearBlock
    return TiedBlock if kinds == {EmbeddingBlock, LinearBlock} else None


def _owners(model: nn.Module) -> dict[int, list[Named]]:
    """Return the modules that hold each parameter, by the parameter's identity."""
    owners: dict[int, list[Named]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, module))
    return owners


def _deselected(name: str, config: CurvatureConfig) -> str | None:
    if not any(fnmatchcase(name, pattern) for pattern in config.include):
        return "not matched by kfac.curvature.include"
    return _excluded(name, config)


def _excluded(name: str, config: CurvatureConfig) -> str | None:
    excluding = [pattern for pattern in config.exclude if fnmatchcase(name, pattern)]
    return f"matched by {excluding[0]!r} of kfac.curvature.exclude" if excluding else None


def _unfit(
    module: nn.Module, kind: type[Block] | None, own: dict[str, nn.Parameter], config: CurvatureConfig
) -> str | None:
    """Say why a module of a type that has a block gets none, or None when it does."""
    if kind is None:
        return f"{type(module).__name__} has no block"
    # A scale may have any name.
    weight_name = kind.parameter_names[0]
    weights = [p for key, p in own.items() if key.endswith(weight_name) or issubclass(kind, ScaledBlock)]
    if not weights:
        return "its weight is computed from other parameters"
    if any(isinstance(weight, UninitializedParameter) for weight in weights):
        return "its shape is not known yet: run a forward pass before making KFAC"
    if not all(weight.numel() for weight in weights):
        return "its weight has no values"
    if any(weight.is_complex() for weight in weights):
        return "its weight is complex"
    if getattr(module, "sparse", False):
        return "its gradients are sparse"
    if getattr(module, "scale_grad_by_freq", False):
        return "its gradients are divided by how often a token occurs"
    if not any(weight.requires_grad for weight in weights):
        return _FROZEN_WEIGHT
    if config.fisher is Fisher.INPUT_ONLY and issubclass(kind, NormBlock):
        return "input_only measures no output gradients, and a normalisation's Fisher is made of them"
    return None


def _sharing(name: str, config: CurvatureConfig) -> Sharing:
    matches = (setting for pattern, setting in config.sharing_overrides.items() if fnmatchcase(name, pattern))
    return next(matches, config.sharing)


def _unique(named: Sequence[Named]) -> list[Named]:
    return list({id(module): (name, module) for name, module in reversed(named)}.values())[::-1]
