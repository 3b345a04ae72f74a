"""The `metrics` section: which numbers of a run are taken, and where they can be read while it trains."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from kfac_dist.config.section import CountOrZero, Flag, Seconds, Section
from kfac_dist.errors import did_you_mean

# Registered by `kfac_dist.reporting.sinks.add_sink`.
SINK_NAMES: set[str] = set()

Port = Annotated[int, Field(ge=1, le=65535, strict=True)]


class MetricsConfig(Section):
    """Metrics beside losses, and the address at which rank 0 serves them to Prometheus over HTTP.

    Attributes:
        port: Port of `/metrics` and `/health`; null serves nothing.
        host: Address to listen at; 0.0.0.0 serves every network of the node, with no password.
        stale_seconds: `/health` answers 503 once no step has been taken for so long; more than evaluations and
            checkpoints take.
        relative_variance: Noise of each parameter's gradient, at each evaluation and in `relative_variance.json` at
            the end; of optimizers that average gradients and their squares with one β.
        spectra: Times per run that the spectra of all factors are read and written to `curvature.jsonl`, at the refresh
            that comes next; each costs an eigenvalue decomposition beside the inversions. 0 never does.
        sinks: Name of a registered metric sink to its arguments: each record of `metrics.jsonl` goes there, too.
    """

    port: Port | None = None
    host: Annotated[str, Field(min_length=1, max_length=253)] = "127.0.0.1"
    stale_seconds: Seconds = 600.0
    relative_variance: Flag = False
    spectra: CountOrZero = 20
    sinks: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("sinks")
    @classmethod
    def _sinks_are_registered(cls, sinks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in sinks:
            if name not in SINK_NAMES:
                known = ", ".join(sorted(SINK_NAMES)) or "none"
                raise ValueError(
                    f"found {name[:60]!r}{did_you_mean(name, SINK_NAMES)}; registered by the modules under extensions: "
                    f"{known}"
                )
        return sinks
