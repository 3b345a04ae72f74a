"""Stand-ins for SLURM's commands: shell scripts on a PATH of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NO_SUCH_JOB = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'


def install(directory: Path, monkeypatch: pytest.MonkeyPatch, **commands: str | None) -> None:
    """Put commands with these bodies in place of those of this host, if it has any; None for one that is not there."""
    folder = directory / "commands"
    folder.mkdir(exist_ok=True)
    for name, body in commands.items():
        if body is not None:
            (folder / name).write_text(f"#!/bin/sh\nPATH={os.defpath}\n{body}\n")
            (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
