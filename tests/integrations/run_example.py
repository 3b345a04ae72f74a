"""Runs an example as its user would, where no compiler need be there."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"

if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    if any(argument.startswith("zero") for argument in sys.argv):
        import deepspeed  # noqa: F401

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    name = sys.argv.pop(1)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
