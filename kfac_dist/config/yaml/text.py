"""Text of files that a user names: regular files only, of a size that a person writes.

A device or a FIFO would be read without an end, or waited for.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from kfac_dist.errors import ConfigError

# The shipped runs have 2 kB; a resolved configuration with every default has 5.
MOST_BYTES = 2**18

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Return the text of a file, which is UTF-8.

    Args:
        path: The file.
        most: Bytes that it may have.

    Raises:
        FileNotFoundError: There is none.
        ConfigError: It is no regular file, has too many bytes, isn't text, or can't be read.
    """
    try:
        with _opened(path) as file:
            data = file.read(most + 1)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in its name
        raise ConfigError(f"{str(path)!r}: can't be the name of a file: {error}") from error
    if len(data) > most:
        raise ConfigError(f"{path}: has {max(size, len(data)):,} bytes, more than the {most:,} that are read")
    if (place := data.find(b"\0")) >= 0:
        raise ConfigError(f"{path}: not text (byte {place} is NUL): save the file as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}): save the file as UTF-8") from error


def _opened(path: Path) -> BinaryIO:
    # Looked at before it is opened, which alone may wait or have effects, and not waited for afterwards.
    kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    if kind is not None:
        raise ConfigError(f"{path}: is {kind}, expected a regular file")
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
