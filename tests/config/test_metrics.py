"""The metrics section: off by default, and what is no port is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfac_dist.config.schema import MetricsConfig
from kfac_dist.config.yaml.load import load_config
from kfac_dist.errors import ConfigError

CONFIG = Path(__file__).parents[2] / "configs/byte_gpt.yaml"


def test_nothing_is_served_unless_it_is_asked_for_and_then_to_this_host_only() -> None:
    assert load_config(CONFIG).metrics.port is None
    metrics = load_config(CONFIG, ["metrics.port=9400"]).metrics
    assert (metrics.port, metrics.host) == (9400, "127.0.0.1")
    assert metrics.stale_seconds == MetricsConfig().stale_seconds


@pytest.mark.parametrize("override", ["metrics.port=0", "metrics.port=65536", "metrics.port='9400'", "metrics.host=''"])
def test_what_nobody_can_listen_at_is_refused(override: str) -> None:
    key, value = override.split("=")
    with pytest.raises(ConfigError, match=f"{key}: found {value}, expected"):
        load_config(CONFIG, [override])


def test_a_run_without_steps_is_stale_after_a_while_at_least() -> None:
    with pytest.raises(ConfigError, match=r"metrics\.stale_seconds: found 0"):
        load_config(CONFIG, ["metrics.stale_seconds=0"])
