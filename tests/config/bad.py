"""A configuration to be spoilt, and the command line that refuses it."""

from __future__ import annotations

from typer.testing import CliRunner

from kfac_dist.cli import app

GOOD = """\
run:
  name: good
model:
  name: autoencoder
  args: {dims: [64, 8]}
data: digits
loss:
  name: sigmoid_cross_entropy
optimizer:
  lr: 0.1
  momentum: 0.9
train:
  batch_size: 64
  steps: 4
kfac:
  curvature:
    factor_every: 10
  inversion:
    inverse_every: 100
"""


def refused(arguments: list[str]) -> str:
    """Run `kfac-dist train` in this process; return what it printed after checking how it ended."""
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    assert "Traceback" not in result.output
    assert all(line.startswith("error: ") for line in result.output.splitlines()), result.output
    return result.output
