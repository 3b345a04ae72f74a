"""From `kfac-dist launch --with LAUNCHER` to a command: the same scripts that a shell runs.

torchrun, mpirun (or mpi), deepspeed    launch/<script>.sh CONFIG ARGUMENTS…
slurm                                   kfac-dist submit CONFIG ARGUMENTS…
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kfac_dist.errors import ConfigError

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*=")
# Options of launch/*.sh, `train` and `submit` without a value.
_FLAGS = frozenset(
    {"--build", "--check", "--compare", "--dry-run", "--help", "-h", "--live", "--no-ssh", "--overwrite", "--quiet"}
)


class LauncherName(StrEnum):
    """Programs that start the ranks."""

    TORCHRUN = "torchrun"
    SLURM = "slurm"
    MPI = "mpi"
    MPIRUN = "mpirun"
    DEEPSPEED = "deepspeed"


@dataclass(frozen=True)
class Command:
    """A program, ready to take this process's place.

    Attributes:
        words: The program and its arguments.
        environment: Variables to set in addition to the existing ones.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str]

    def replace_this_process(self) -> None:
        """Become that program: signals reach it, and its exit code is ours. Never returns."""
        os.execvpe(self.words[0], self.words, {**os.environ, **self.environment})


def launch_command(launcher: LauncherName, config: Path, arguments: Sequence[str]) -> Command:
    """The command that trains `config` on ranks that `launcher` starts.

    Args:
        launcher: Launcher of the ranks.
        config: The run's YAML file.
        arguments: Options of the script and of `kfac-dist train`, in any order.

    Raises:
        ConfigError: The script can't be found.
    """
    words: tuple[str, ...]
    match launcher:
        case LauncherName.TORCHRUN:
            words = ("bash", str(_script("torchrun.sh")))
        case LauncherName.MPI | LauncherName.MPIRUN:
            words = ("bash", str(_script("mpirun.sh")))
        case LauncherName.DEEPSPEED:
            words = ("bash", str(_script("deepspeed.sh")))
        case LauncherName.SLURM:
            words = (sys.executable, "-m", "kfac_dist", "submit")
    return Command((*words, str(config), *arguments), {"PYTHON": sys.executable})


def overrides_in(arguments: Sequence[str]) -> list[str]:
    """The KEY=VALUE arguments among options and their values, which may have a = as well."""
    before = ("", *arguments)
    return [
        argument
        for option, argument in zip(before, arguments, strict=False)
        if _OVERRIDE.match(argument) and not _takes_value(option)
    ]


def _takes_value(word: str) -> bool:
    return word.startswith("-") and "=" not in word and word not in _FLAGS


def _script(name: str) -> Path:
    """A file of launch/: packed into an installed package, beside the package in a checkout."""
    package = Path(__file__).parent
    places = (package / "launch" / name, package.parent / "launch" / name)
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(
        f"the launch script {name} is neither {places[0]} nor {places[1]}: install kfac_dist again, or run from a "
        "checkout"
    )
