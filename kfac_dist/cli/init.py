"""`kfac-dist init`: a first configuration, to be changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from kfac_dist.cli.exits import exit_codes
from kfac_dist.config.yaml.commented import commented_yaml, head_comment
from kfac_dist.config.yaml.shipped import SUFFIX, shipped_file, shipped_names
from kfac_dist.errors import ConfigError

FIRST = "digits_autoencoder"


def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped run, see --list.")] = FIRST,
    out: Annotated[Path | None, typer.Option(help="The file to write; NAME.yaml by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    names: Annotated[bool, typer.Option("--list", help="List the shipped runs, and write nothing.")] = False,
) -> None:
    """Write a shipped run as one commented YAML file, to be changed and trained."""
    with exit_codes():
        if names:
            for known in shipped_names():
                print(f"{known:32} {_about(known)}")
            return
        shipped = shipped_file(name)
        path = out if out is not None else Path(f"{name}{SUFFIX}")
        text = commented_yaml(shipped, path)
        try:
            with path.open("w" if force else "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise ConfigError(f"{path}: is there already: give another --out, or --force to replace it") from None
        except OSError as error:
            raise ConfigError(f"{path}: can't be written: {error.strerror}") from error
        print(f"{path}: written; check it: kfac-dist train {path} --check")


def _about(name: str) -> str:
    """Return the first sentence of a shipped file's head."""
    head = " ".join(head_comment(shipped_file(name)))
    return re.split(r"\.(?= [A-Z]|$)", head)[0]
