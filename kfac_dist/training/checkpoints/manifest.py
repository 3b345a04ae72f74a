"""`manifest.json`: a checkpoint's files and checksums, by which incomplete or altered checkpoints are detected.

    {"format": 2, "step": …, the run's own facts, "files": {"__0_0.distcp": {"bytes": …, "sha256": …}, …}, "sha256": …}

It is written last; its own hash is that of all its other values. Names and sizes are looked at whenever checkpoints are
listed; contents only before one is loaded, by all ranks together, since that reads every byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfac_dist.config.yaml.text import read_text
from kfac_dist.errors import CheckpointError, ConfigError

MANIFEST = "manifest.json"
FORMAT = 2
# Thousands of ranks have a file each.
_MOST_BYTES = 64 * 2**20
NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class FileFacts:
    """The size and hash of a file.

    Attributes:
        bytes: Its size.
        sha256: Hexadecimal hash of its contents.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: Its directory.
        step: Optimizer steps that it holds.
        facts: Values saved beside the tensors, as plain JSON.
        files: Its files by name.
    """

    path: Path
    step: int
    facts: dict[str, Any]
    files: dict[str, FileFacts]


def file_facts(path: Path) -> FileFacts:
    """Return the size and checksum of a file."""
    with path.open("rb") as stream:
        return FileFacts(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def write_manifest(directory: Path, facts: dict[str, Any], files: dict[str, FileFacts]) -> None:
    """Write the manifest of a checkpoint whose files are on disk, and sync it and the directory."""
    listed = {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in sorted(files.items())}
    values = {"format": FORMAT, **facts, "files": listed}
    with (directory / MANIFEST).open("w") as stream:
        json.dump({**values, "sha256": _hash(values)}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    sync_directory(directory)


def read_manifest(path: Path) -> Checkpoint:
    """Return the checkpoint in a directory, by the names and sizes of its files; not collective.

    Raises:
        CheckpointError: The directory holds no complete checkpoint: names the missing file.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    if not NAME.fullmatch(path.name):
        raise CheckpointError(f"{path}: not a complete checkpoint (those are named step-<number>)")
    try:
        facts = json.loads(read_text(path / MANIFEST, _MOST_BYTES))
        version = facts.pop("format")
        if version != FORMAT:
            raise CheckpointError(f"{path}: its format is {version}, this version of kfac_dist reads {FORMAT}")
        if facts.pop("sha256") != _hash({"format": version, **facts}):
            raise CheckpointError(f"{path}: damaged, {MANIFEST} has other contents than were written")
        files = {str(name): FileFacts(**file) for name, file in facts.pop("files").items()}
        step = int(facts.pop("step"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not a complete checkpoint, {MANIFEST} is missing") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} can't be read: {error}") from error
    for name, file in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != file.bytes:
            state = "is missing" if found is None else f"has {found} bytes instead of {file.bytes}"
            raise CheckpointError(f"{path}: not a complete checkpoint, {name} {state}")
    return Checkpoint(path, step, facts, files)


def damaged(checkpoint: Checkpoint, part: int, parts: int) -> str | None:
    """Return the problem with a checkpoint's contents, or None; reads every `parts`-th file from `part` on."""
    for name in sorted(checkpoint.files)[part::parts]:
        try:
            found = file_facts(checkpoint.path / name)
        except OSError as error:
            return f"{checkpoint.path}: damaged, {name} can't be read: {error}"
        if found != checkpoint.files[name]:
            return f"{checkpoint.path}: damaged, {name} has other contents than were written (by its SHA-256)"
    return None


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
