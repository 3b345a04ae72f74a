"""DCP's table of contents, a pickle, read as plain data: nothing that it names is imported or called.

Interpreters pickle the same table in different words. A member of an enum is a call of its class, `getattr` of its
class and name (Debian 12's Python 3.11.2), or a dotted name; a path belongs to `pathlib` or to `pathlib._local` (3.13).
So the unpickler gets records in place of the table's names, which only keep their arguments:

    pickle ── machine ──▶ records: a name, its arguments, its state ── meaning of the name ──▶ Metadata

The meanings are those below; a name that has none is refused before anything happens. A table of a newer or older
torch is read as far as both know its fields.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from kfac_dist.compat.torch import storage_info_type
from kfac_dist.errors import CheckpointError

_StorageInfo = storage_info_type()
_METADATA = "torch.distributed.checkpoint.metadata"
_MEMORY_FORMATS = f"{_METADATA}._MEM_FORMAT_ENCODING"
_FORMATS = {
    "TORCH_CONTIGUOUS_FORMAT": torch.contiguous_format,
    "TORCH_CHANNELS_LAST": torch.channels_last,
    "TORCH_PRESERVE_FORMAT": torch.preserve_format,
}
_PROPERTIES = ("dtype", "layout", "requires_grad", "memory_format", "pin_memory")


def read_table(path: Path) -> Metadata:
    """Return a checkpoint's table of contents.

    Args:
        path: The checkpoint's directory.

    Raises:
        CheckpointError: It can't be read, or names something that no checkpoint needs.
    """
    try:
        with (path / ".metadata").open("rb") as stream:
            table = _meaning(_Machine(stream).load())
        return _checked(table)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except Exception as error:  # bytes that are no table of contents can fail in any way
        raise CheckpointError(f"{path}: its .metadata can't be read: {type(error).__name__}: {error}") from error


class _Record:
    """A name of the table together with the arguments of its call and its state."""

    __slots__ = ("arguments", "state")
    name: ClassVar[str]
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> _Record:
        record = object.__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    # A state for the class itself, by which a table could alter it, lacks `self` and fails.
    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Machine(pickle.Unpickler):
    """Python's pickle machine, to which the world is records, types of numbers and ordered dictionaries."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the record of a name.

        Raises:
            CheckpointError: No checkpoint needs it.
        """
        full = f"{module}.{name}"
        if full in _RECORDS:
            return _RECORDS[full]
        if full == "collections.OrderedDict":
            return OrderedDict
        if module == "torch" and isinstance(kind := vars(torch).get(name), torch.dtype):
            return kind
        if full.startswith(f"{_MEMORY_FORMATS}."):
            return _RECORDS["builtins.getattr"](_RECORDS[_MEMORY_FORMATS], name.partition(".")[2])
        raise CheckpointError(f"its .metadata names {full}, which no checkpoint needs")


def _meaning(found: Any) -> Any:
    """Return the object of a table's value.

    Raises:
        CheckpointError: It is no object of a table.
    """
    if isinstance(found, _Record):
        return _MEANINGS[found.name](found)
    if isinstance(found, dict):
        return {_meaning(key): _meaning(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return type(found)(map(_meaning, found))
    if found is None or isinstance(found, bool | int | float | str | bytes | torch.dtype):
        return found
    shown = found.name if isinstance(found, type) and issubclass(found, _Record) else type(found).__name__
    raise CheckpointError(f"its .metadata holds {shown}, which no checkpoint needs")


def _dataclass(kind: type[Any]) -> Callable[[_Record], Any]:
    """Return the meaning of a dataclass's name: one made of the fields that it has here."""
    known = {field.name for field in dataclasses.fields(kind)}

    def make(record: _Record) -> Any:
        parts = record.state if isinstance(record.state, tuple) else (record.state,)
        given = {name: value for part in parts if part is not None for name, value in part.items()}
        return kind(**{name: _meaning(value) for name, value in given.items() if name in known})

    return make


def _properties(record: _Record) -> TensorProperties:
    state = record.state
    values = state if isinstance(state, dict) else dict(zip(_PROPERTIES, state, strict=True))
    return TensorProperties(**{name: _meaning(values[name]) for name in _PROPERTIES})


def _memory_format(record: _Record) -> torch.memory_format:
    """Return the enum's member with a value."""
    (value,) = record.arguments
    found: torch.memory_format = list(_FORMATS.values())[value]
    return found


def _member(record: _Record) -> torch.memory_format:
    """Return the result of `getattr`: an enum's member by its name, and nothing else."""
    owner, name = record.arguments
    if owner is not _RECORDS[_MEMORY_FORMATS] or name not in _FORMATS:
        owner = owner.name if isinstance(owner, type) and issubclass(owner, _Record) else type(owner).__name__
        raise CheckpointError(f"its .metadata asks for {name!r} of {owner}, which no checkpoint needs")
    return _FORMATS[name]


def _size(record: _Record) -> torch.Size:
    (numbers,) = record.arguments
    return torch.Size(cast(Iterable[int], _meaning(numbers)))


def _layout(record: _Record) -> torch.layout:
    (name,) = record.arguments
    found = vars(torch).get(name.removeprefix("torch."))
    if not isinstance(found, torch.layout):
        raise CheckpointError(f"its .metadata names {name}, which is no layout of a tensor")
    return found


def _path(record: _Record) -> str:
    return "/".join(map(str, record.arguments))


_MEANINGS: dict[str, Callable[[_Record], Any]] = {
    **{
        f"{_METADATA}.{kind.__name__}": _dataclass(kind)
        for kind in (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            StorageMeta,
            TensorStorageMetadata,
        )
    },
    f"{_METADATA}.TensorProperties": _properties,
    _MEMORY_FORMATS: _memory_format,
    "builtins.getattr": _member,
    "torch.distributed.checkpoint.filesystem._StorageInfo": _dataclass(_StorageInfo),
    "torch.Size": _size,
    "torch.serialization._get_layout": _layout,
    **{
        f"{module}.{name}": _path
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    },
}
_RECORDS = {name: type("_Named", (_Record,), {"__slots__": (), "name": name}) for name in _MEANINGS}


def _checked(table: Any) -> Metadata:
    """Return a table after checking the types of its parts.

    Raises:
        CheckpointError: They aren't, or a value lies in a file outside of the checkpoint.
    """
    if not isinstance(table, Metadata):
        raise CheckpointError(f"its .metadata holds a {type(table).__name__}")
    for name, entry in table.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise CheckpointError(f"its .metadata describes {name!r} by a {type(entry).__name__}")
    for index, place in table.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise CheckpointError(f"its .metadata places {index!r} by a {type(place).__name__}")
        if place.relative_path in ("", "..") or Path(place.relative_path).name != place.relative_path:
            raise CheckpointError(f"its .metadata places {index.fqn} outside of the checkpoint: {place.relative_path}")
    return table
