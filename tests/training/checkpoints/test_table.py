"""Tables of contents mean the same, whichever interpreter and torch wrote them, and a hostile one does nothing at all.

`tables/` holds those of one small checkpoint, written by five interpreters; Debian 12's pickles enums by `getattr`.
"""

from __future__ import annotations

import enum
import io
import pathlib
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from kfac_dist.compat.torch import storage_info_type
from kfac_dist.distributed.communicators.base import SoloCommunicator
from kfac_dist.errors import CheckpointError
from kfac_dist.training.checkpoints.checkpoint import Checkpoints
from kfac_dist.training.checkpoints.table import read_table

TABLES = sorted((Path(__file__).parent / "tables").glob("*.metadata"))


def read(contents: bytes, directory: Path) -> Metadata:
    (directory / ".metadata").write_bytes(contents)
    return read_table(directory)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stem)
def test_every_interpreters_table_says_the_same(table: Path, tmp_path: Path) -> None:
    found = read(table.read_bytes(), tmp_path)
    entries = {
        name: entry if isinstance(entry, BytesStorageMetadata) else (entry.size, entry.properties, len(entry.chunks))
        for name, entry in found.state_dict_metadata.items()
    }
    assert entries == {
        "model.a.weight": (torch.Size([2, 3]), TensorProperties(torch.float32), 1),
        "model.a.bias": (torch.Size([2]), TensorProperties(torch.bfloat16), 1),
        "kfac.count": BytesStorageMetadata(),
    }
    weight = found.state_dict_metadata["model.a.weight"]
    assert isinstance(weight, TensorStorageMetadata)
    assert (weight.chunks[0].offsets, weight.chunks[0].sizes) == (torch.Size([0, 0]), torch.Size([2, 3]))
    place = found.storage_data[MetadataIndex("model.a.weight", [0, 0])]
    assert isinstance(place, storage_info_type())
    assert place.relative_path == "__0_0.distcp"
    assert isinstance(found.storage_meta, StorageMeta)
    assert str(found.storage_meta.checkpoint_id).endswith("checkpoints/step-00000007.writing")


def test_tables_of_all_kinds_are_there() -> None:
    assert any(b"getattr" in table.read_bytes() for table in TABLES)
    assert any(b"pathlib._local" in table.read_bytes() for table in TABLES)
    assert len(TABLES) == 5


class _Words(pickle._Pickler):  # type: ignore[name-defined]
    """Pickles enums and paths as some interpreter does."""

    member: Callable[[enum.Enum], Any]
    paths: str

    def reducer_override(self, found: Any) -> Any:
        return self.member(found) if isinstance(found, enum.Enum) else NotImplemented

    def save(self, found: Any, save_persistent_id: bool = True) -> None:
        if found is pathlib.PosixPath:
            self.write(pickle.SHORT_BINUNICODE + bytes([len(self.paths)]) + self.paths.encode())
            self.write(pickle.SHORT_BINUNICODE + bytes([9]) + b"PosixPath" + pickle.STACK_GLOBAL)
        else:
            super().save(found, save_persistent_id)


def _dotted(member: enum.Enum) -> str:
    return f"{type(member).__qualname__}.{member.name}"


@pytest.mark.parametrize("paths", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize(
    "member",
    [lambda m: (type(m), (m.value,)), lambda m: (getattr, (type(m), m.name)), _dotted],
    ids=["called by its value", "getattr by its name", "dotted name"],
)
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_checkpoint_loads_in_any_interpreters_words(
    member: Callable[[enum.Enum], Any], paths: str, protocol: int, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path, 2, SoloCommunicator())
    saved = {"model": {"a": torch.arange(6.0).view(2, 3)}, "kfac": {"count": 5}}
    path = checkpoints.save(7, saved, {})
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    table = read_table(path)
    assert table.storage_meta is not None
    table.storage_meta.checkpoint_id = pathlib.PosixPath("/scratch/a")
    stream = io.BytesIO()
    words = _Words(stream, protocol)
    words.member, words.paths = member, paths  # type: ignore[assignment]
    words.dump(table)
    (path / ".metadata").write_bytes(stream.getvalue())
    loaded: dict[str, Any] = {"model": {"a": torch.zeros(2, 3)}, "kfac": {"count": 0}}
    checkpoints.load(checkpoint, loaded)
    assert loaded["kfac"] == {"count": 5}
    torch.testing.assert_close(loaded["model"]["a"], saved["model"]["a"], rtol=0, atol=0)


# ---- a hostile table


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


_FORMATS = _global("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")
_TABLE = _global("torch.distributed.checkpoint.metadata", "Metadata")
_GETATTR = _global("builtins", "getattr")
_PATH = _global("pathlib", "PosixPath")
_SIZE = _global("torch", "Size")


def _call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def _text(value: str) -> bytes:
    return f"V{value}\n".encode()


# Each would take a step out of what a table may say, most of them towards code.
HOSTILE = {
    "an enum's method": _call(_GETATTR, _FORMATS, _text("__init_subclass__")),
    "an enum's dictionary": _call(_GETATTR, _FORMATS, _text("__dict__")),
    "an enum's class": _call(_GETATTR, _FORMATS, _text("__class__")),
    "an enum's bases": _call(_GETATTR, _FORMATS, _text("__mro__")),
    "a private name of an enum": _call(_GETATTR, _FORMATS, _text("_member_map_")),
    "a number for a name": _call(_GETATTR, _FORMATS, b"I0\n"),
    "a default": _call(_GETATTR, _FORMATS, _text("nowhere"), _SIZE),
    "a member of a member": _call(
        _GETATTR, _call(_GETATTR, _FORMATS, _text("TORCH_CHANNELS_LAST")), _text("__class__")
    ),
    "a path's method": _call(_call(_GETATTR, _call(_PATH, _text("/tmp/x")), _text("write_text")), _text("x")),
    "a class's method": _call(_GETATTR, _PATH, _text("home")),
    "a function's globals": _call(_GETATTR, _call(_GETATTR, _TABLE, _text("__init__")), _text("__globals__")),
    "getattr of itself": _call(_GETATTR, _GETATTR, _text("__self__")),
    "getattr of torch": _call(_GETATTR, _global("torch", "float32"), _text("__class__")),
    "getattr by another name": _call(_global("operator", "attrgetter"), _text("system")),
    "getattr of Python 2": _call(_global("__builtin__", "getattr"), _FORMATS, _text("__dict__")),
    "a dotted name": b"\x80\x04" + b"\x8c\x25torch.distributed.checkpoint.metadata\x8c\x11Metadata.__init__\x93.",
    "a dotted dunder of an enum": b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata"
    b"\x8c\x1e_MEM_FORMAT_ENCODING.__class__\x93.",
    "a dotted name of torch": b"\x80\x04\x8c\x05torch\x8c\x11float32.__class__\x93.",
    "a module's function": _call(_global("torch", "load"), _text("/tmp/x")),
    "a new enum": _call(_FORMATS, _text("Other"), b"(Va\nl"),
    "eval": _call(_global("builtins", "eval"), _text("1")),
    "a class, altered by a state": _TABLE + b"}(V__init__\n" + _SIZE + b"u" + b"b",
    "a class, altered by slots": _TABLE + b"N}(V__init__\n" + _SIZE + b"u\x86" + b"b",
    "getattr, altered": _GETATTR + b"N}(V__defaults__\n" + _SIZE + b"u\x86" + b"b",
    "a type, altered": _global("collections", "OrderedDict") + b"N}(Vget\n" + _SIZE + b"u\x86" + b"b",
    "a dtype, altered": _global("torch", "float32") + b"N}(Vx\nI1\nu\x86" + b"b",
    "an extension": b"\x80\x02\x82\x01",
    "a persistent name": b"Pnowhere\n",
    "a table that ends": _TABLE[:-3],
    "no pickle": b"\x00\x01\x02",
    "nothing": b"",
    "a circle": b"]q\x00h\x00a",
    "a set": b"\x80\x04\x8f.",
    "an instance of what a name stands for": b"(i" + b"os\nsystem\n",
}


@pytest.mark.parametrize("contents", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_table_is_refused(contents: bytes, tmp_path: Path) -> None:
    before = {kind: dict(vars(kind)) for kind in (Metadata, TensorProperties, StorageMeta, pathlib.PosixPath)}
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read(contents if contents.endswith(b".") else contents + b".", tmp_path)
    assert all(dict(vars(kind)) == names for kind, names in before.items())


@pytest.mark.parametrize("inside", ["_StorageInfo", "TensorProperties", "planner_data", "MetadataIndex"])
def test_a_hostile_value_deep_in_a_table_is_refused(inside: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return getattr, (torch.Size, "__class__")

    found = read(TABLES[0].read_bytes(), tmp_path)
    weight = found.state_dict_metadata["model.a.weight"]
    assert isinstance(weight, TensorStorageMetadata)
    match inside:
        case "_StorageInfo":
            next(iter(found.storage_data.values())).length = Bomb()
        case "TensorProperties":
            weight.properties.pin_memory = Bomb()  # type: ignore[assignment]
        case "planner_data":
            found.planner_data = {"a": [1, (2, Bomb())]}
        case _:
            found.storage_data[MetadataIndex("b", None, Bomb())] = found.storage_data.popitem()[1]  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"asks for '__class__' of torch\.Size"):
        read(pickle.dumps(found), tmp_path)


@pytest.mark.parametrize("place", ["../other/__0_0.distcp", "/etc/hostname", "a/b", "", ".."])
def test_values_lie_in_the_checkpoint(place: str, tmp_path: Path) -> None:
    found = read(TABLES[0].read_bytes(), tmp_path)
    next(iter(found.storage_data.values())).relative_path = place
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        read(pickle.dumps(found), tmp_path)


def test_fields_of_another_torch_are_passed_over(tmp_path: Path) -> None:
    found = read(TABLES[0].read_bytes(), tmp_path)
    found.added_later = 3  # type: ignore[attr-defined]
    found.__dict__.pop("version", None)
    again = read(pickle.dumps(found), tmp_path)
    assert not hasattr(again, "added_later")
    assert again.storage_data.keys() == found.storage_data.keys()


def test_the_interpreter_in_use_is_among_those_that_load(tmp_path: Path) -> None:
    """What is written here is read here: the row of this interpreter, whichever it is."""
    checkpoints = Checkpoints(tmp_path, 1, SoloCommunicator())
    path = checkpoints.save(1, {"a": torch.ones(2)}, {})
    assert read_table(path).state_dict_metadata.keys() == {"a"}, sys.version
    shutil.rmtree(path)
