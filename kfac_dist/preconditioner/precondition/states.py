"""State of the transforms, by block: kept where a block is preconditioned, saved under its name.

    transforms/<block>      <transform>.<key> → [batch, ...], the rows of the block in its stack

A step that the optimizer skips, because some gradient isn't finite, leaves it as it was, without asking the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kfac_dist.curvature.inverses.precondition import Group
from kfac_dist.errors import CheckpointError, ConfigError
from kfac_dist.preconditioner.plan import Plan
from kfac_dist.preconditioner.precondition.transforms.base import State, Transform

# Of a block: its tensors by transform and key.
BlockState = dict[str, Tensor]


class TransformStates:
    """The state of every stack of this rank, for every transform that has any.

    Args:
        transforms: By name.
        groups: This rank's groups, a stack each.

    Raises:
        ConfigError: A transform's state hasn't a row for each matrix.
    """

    def __init__(self, transforms: Mapping[str, Transform], groups: Sequence[Group]) -> None:
        self._groups = groups
        self._kept: dict[tuple[str, int], dict[str, Tensor]] = {}
        for name, transform in transforms.items():
            for index, group in enumerate(groups):
                values = initial(name, transform, group.gradient)
                if values:
                    self._kept[name, index] = {key: value.clone() for key, value in values.items()}
        self._index = {id(group): index for index, group in enumerate(groups)}

    def of(self, name: str, group: Group) -> dict[str, Tensor]:
        """Return the tensors of a transform for a stack by key; the dict is a copy, the tensors are the state's own."""
        return dict(self._kept.get((name, self._index[id(group)]), {}))

    def commit(self, group: Group, states: Mapping[str, State], taken: Tensor, update: Tensor) -> Tensor:
        """Keep the tensors that transforms have assigned for a stack, if the optimizer takes the step.

        Args:
            group: The stack's layers.
            states: The result of `of` for each transform, by name, after its `apply`.
            taken: 0-dim bool.
            update: The transformed stack; a transform may have returned a tensor of its state.

        Returns:
            The update, in memory of its own.

        Raises:
            ConfigError: A transform has assigned to a key that it doesn't keep, or another shape.
        """
        place = self._index[id(group)]
        memory = {_memory(old) for name in states for old in self._kept[name, place].values()}
        pairs = [
            (old, new.clone() if _memory(new) in memory else new)
            for name, state in states.items()
            for old, new in _changes(name, self._kept[name, place], state)
        ]
        update = update.clone() if _memory(update) in memory else update
        for old, new in pairs:
            torch.where(taken, new.to(old.dtype), old, out=old)
        return update

    # ---- checkpoints

    def held(self) -> dict[str, BlockState]:
        """Return copies of this rank's blocks' state, by block."""
        found: dict[str, BlockState] = {}
        for name, index, key, value in self._values():
            for place, block in enumerate(self._groups[index].blocks):
                rows = self._groups[index].matrix(value, place)
                found.setdefault(block.name, {})[f"{name}.{key}"] = rows.clone()
        return found

    def load(self, values: Mapping[str, BlockState]) -> None:
        """Load the state of this rank's blocks from a mapping that has at least these."""
        for name, index, key, value in self._values():
            for place, block in enumerate(self._groups[index].blocks):
                self._groups[index].matrix(value, place).copy_(values[block.name][f"{name}.{key}"])

    def _values(self) -> list[tuple[str, int, str, Tensor]]:
        return [(name, index, key, value) for (name, index), own in self._kept.items() for key, value in own.items()]


def _changes(name: str, kept: Mapping[str, Tensor], state: State) -> list[tuple[Tensor, Tensor]]:
    """Return the kept tensors with their replacements."""
    for key, new in state.items():
        if key not in kept or new.shape != kept[key].shape:
            known = {known: list(value.shape) for known, value in kept.items()}
            raise ConfigError(
                f"transform {name!r} assigned {key!r} of shape {list(new.shape)} to its state; `initial` has {known}"
            )
    return [(kept[key], new) for key, new in state.items() if new is not kept[key]]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def initial(name: str, transform: Transform, gradient: Tensor) -> dict[str, Tensor]:
    """Return a transform's first state for a stack.

    Raises:
        ConfigError: It hasn't a row for each matrix.
    """
    values = transform.initial(gradient)
    for key, value in values.items():
        fits = value.shape[:1] == gradient.shape[:1] if transform.whole_matrix else value.shape == gradient.shape
        if not fits:
            wanted = f"{len(gradient)} rows, one a matrix" if transform.whole_matrix else f"{list(gradient.shape)}"
            raise ConfigError(f"transform {name!r}: its state {key!r} has shape {list(value.shape)}; expected {wanted}")
    return {key: value.to(gradient.dtype) for key, value in values.items()}


def shapes_of(transforms: Mapping[str, Transform], plan: Plan) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of every block's state, the same on every rank; blocks without any are left out."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for block in plan.blocks.values():
        matrix = torch.empty(block.matrix_shape, device="meta")
        for name, transform in transforms.items():
            for key, value in initial(name, transform, matrix).items():
                found.setdefault(block.name, {})[f"{name}.{key}"] = tuple(value.shape)
    return found


def check(shapes: Mapping[str, Mapping[str, tuple[int, ...]]], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse a saved state that lacks a block's, or has it in another shape.

    Raises:
        CheckpointError: For the first block.
    """
    for block, own in shapes.items():
        for key, shape in own.items():
            found = saved.get(block, {}).get(key)
            if found is None or tuple(found.shape) != shape:
                has = "none" if found is None else f"one of shape {list(found.shape)}"
                raise CheckpointError(
                    f"the K-FAC state has {has} of {key!r} for layer {block!r}, where {list(shape)} is due: it belongs "
                    f"to another model, or was saved with other kfac.update settings than {key.split('.')[0]!r} needs"
                )
