"""The layer types that have a block, in one table; the next type is one class in one file and one row here."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from kfac_dist.config.schema import CurvatureConfig, Fisher, Sharing
from kfac_dist.curvature.blocks.base import Block, KroneckerBlock, MicroBatch, Use
from kfac_dist.curvature.blocks.convolution import ConvolutionBlock
from kfac_dist.curvature.blocks.embedding import EmbeddingBlock
from kfac_dist.curvature.blocks.linear import LinearBlock
from kfac_dist.curvature.blocks.norm import BatchNormBlock, GroupNormBlock, LayerNormBlock, NormBlock
from kfac_dist.curvature.blocks.transposed import TransposedConvolutionBlock

BLOCK_TYPES: dict[type[nn.Module], type[Block]] = {
    nn.Linear: LinearBlock,
    nn.Conv1d: ConvolutionBlock,
    nn.Conv2d: ConvolutionBlock,
    nn.Conv3d: ConvolutionBlock,
    nn.ConvTranspose1d: TransposedConvolutionBlock,
    nn.ConvTranspose2d: TransposedConvolutionBlock,
    nn.ConvTranspose3d: TransposedConvolutionBlock,
    nn.Embedding: EmbeddingBlock,
    nn.LayerNorm: LayerNormBlock,
    nn.RMSNorm: LayerNormBlock,
    nn.GroupNorm: GroupNormBlock,
    nn.BatchNorm1d: BatchNormBlock,
    nn.BatchNorm2d: BatchNormBlock,
    nn.BatchNorm3d: BatchNormBlock,
    nn.SyncBatchNorm: BatchNormBlock,
}


@dataclass(frozen=True)
class Coverage:
    """Which parameters K-FAC preconditions, and why the others keep their plain gradient.

    Attributes:
        blocks: The blocks, in the order in which the model lists its modules.
        uncovered: Parameter name to reason.
    """

    blocks: tuple[Block, ...]
    uncovered: dict[str, str] = field(default_factory=dict)


def find_blocks(model: nn.Module, config: CurvatureConfig) -> Coverage:
    """Return a block for every layer that has one and that the configuration's patterns select."""
    blocks: list[Block] = []
    uncovered: dict[str, str] = {}
    owners = _parameter_owners(model)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        reason = _reason_against(name, module, own, owners, config)
        if reason is None:
            blocks.append(_block_class(module)(name, module, _sharing(name, config)))
            covered = blocks[-1].parameters
            reason = f"not part of what {type(blocks[-1]).__name__} covers"
        else:
            covered = {}
        for key in own:
            full = f"{name}.{key}" if name else key
            if full not in covered:
                uncovered[full] = reason if own[key].requires_grad else "frozen"
    return Coverage(tuple(blocks), uncovered)


def _block_class(module: nn.Module) -> type[Block]:
    return next(BLOCK_TYPES[base] for base in type(module).__mro__ if base in BLOCK_TYPES)


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _reason_against(
    name: str,
    module: nn.Module,
    own: dict[str, nn.Parameter],
    owners: dict[int, list[str]],
    config: CurvatureConfig,
) -> str | None:
    """Say why a module gets no block, or None when it does."""
    if not any(base in BLOCK_TYPES for base in type(module).__mro__):
        return f"{type(module).__name__} has no block"
    if not any(fnmatchcase(name, pattern) for pattern in config.include):
        return "not matched by kfac.curvature.include"
    excluding = [pattern for pattern in config.exclude if fnmatchcase(name, pattern)]
    if excluding:
        return f"matched by {excluding[0]!r} of kfac.curvature.exclude"
    if "weight" not in own:
        return "its weight is computed from other parameters"
    if isinstance(own["weight"], UninitializedParameter):
        return "its shape is not known yet: run a forward pass before making KFAC"
    if own["weight"].is_complex():
        return "its weight is complex"
    if getattr(module, "sparse", False):
        return "its gradients are sparse"
    if not own["weight"].requires_grad:
        return "its weight is frozen"
    if config.fisher is Fisher.INPUT_ONLY and issubclass(_block_class(module), NormBlock):
        return "input_only measures no output gradients, and a normalisation's Fisher is made of them"
    shared = [other for p in own.values() for other in owners[id(p)] if other != name]
    if shared:
        return f"its weight is tied to that of {shared[0]}"
    return None


def _sharing(name: str, config: CurvatureConfig) -> Sharing:
    matches = (setting for pattern, setting in config.sharing_overrides.items() if fnmatchcase(name, pattern))
    return next(matches, config.sharing)


__all__ = ["BLOCK_TYPES", "Block", "Coverage", "KroneckerBlock", "MicroBatch", "Use", "find_blocks"]
