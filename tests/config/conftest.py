"""What the tests of configurations share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.bad import GOOD


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(GOOD)
    return file
