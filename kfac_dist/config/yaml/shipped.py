"""The configurations that ship with the package, by name: `digits_autoencoder` is configs/digits_autoencoder.yaml.

Packed into an installed package, beside the package in a checkout. `base.yaml` holds the values common to all; it is no
run by itself, and no name.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from kfac_dist.errors import ConfigError, did_you_mean

SUFFIX = ".yaml"
_SHARED = "base"


def shipped_directory() -> Path:
    """Return the folder of the shipped configurations.

    Raises:
        ConfigError: It can't be found.
    """
    package = Path(__file__).parents[2]
    places = (package / "configs", package.parent / "configs")
    for place in places:
        if (place / f"{_SHARED}{SUFFIX}").is_file():
            return place
    raise ConfigError(
        f"the shipped configurations are neither in {places[0]} nor in {places[1]}: install kfac_dist again, or run "
        "from a checkout"
    )


def shipped_names() -> list[str]:
    """Return the names of the shipped runs, in alphabetical order."""
    names = (path.name.removesuffix(SUFFIX) for path in shipped_directory().glob(f"*{SUFFIX}"))
    return sorted(name for name in names if name != _SHARED)


def shipped_file(name: str) -> Path:
    """Return the file of a shipped run.

    Raises:
        ConfigError: There is no such run: lists the existing ones.
    """
    names = shipped_names()
    if name not in names:
        raise ConfigError(f"no shipped run is named {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}")
    return shipped_directory() / f"{name}{SUFFIX}"


def find_config(path: Path) -> Path:
    """Return the file that CONFIG stands for: the shipped run of that name, unless a file of that name is there.

    A folder of that name, such as that of the run's own files, is no configuration.
    """
    if path.name != str(path) or path.name not in shipped_names():
        return path
    return path if os.path.exists(path) and not path.is_dir() else shipped_file(path.name)


def meant(path: Path) -> str:
    """Return the end of a message about a missing file: a similar file in its folder, or a shipped run."""
    siblings = [str(file) for file in sorted(path.parent.glob("*.y*ml")) if file.is_file()]
    close = difflib.get_close_matches(str(path), siblings, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    names = shipped_names()
    stem = path.name.removesuffix(SUFFIX)
    if stem in names:
        return f"; the shipped run is named {stem}, and `kfac-dist init {stem}` writes its file"
    if path.parent == Path():
        return f", and no shipped run has that name{did_you_mean(stem, names)}; there are {', '.join(names)}"
    return ""
