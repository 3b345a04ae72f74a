"""The `metrics` section: which numbers of a run are taken, and where they can be read while it trains."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kfac_dist.config.section import CountOrZero, Flag, Seconds, Section

Port = Annotated[int, Field(ge=1, le=65535, strict=True)]


class MetricsConfig(Section):
    """What is measured beside losses, and whether rank 0 serves it as Prometheus metrics over HTTP, and to whom.

    Attributes:
        port: Port of `/metrics` and `/health`; null serves nothing.
        host: Address to listen at; 0.0.0.0 serves every network of the node, with no password.
        stale_seconds: `/health` answers 503 once no step has been taken for so long; more than evaluations and
            checkpoints take.
        relative_variance: How noisy each parameter's gradient is, at each evaluation and in `relative_variance.json` at
            the end; of optimizers that average gradients and their squares with one β.
        spectra: How often in a run the spectra of all factors are read and written to `curvature.jsonl`, at the refresh
            that comes next; each costs an eigenvalue decomposition beside the inversions. 0 never does.
    """

    port: Port | None = None
    host: Annotated[str, Field(min_length=1, max_length=253)] = "127.0.0.1"
    stale_seconds: Seconds = 600.0
    relative_variance: Flag = False
    spectra: CountOrZero = 20
