"""`kfac.curvature.class_conditional`: statistics that are kept apart by class."""

from __future__ import annotations

from typing import Any

from kfac_dist.config.section import Count, Positive, Section


class ClassConditionalConfig(Section):
    """One A and one G for each class, combined into the Kronecker product that is nearest to Σ π_c A_c⊗G_c.

    `true` in YAML means all defaults, `false` is null.

    Attributes:
        classes: C, the number of classes. The training loop takes it from the model's outputs; a `KFAC` that is built
            by hand, and `kfac-dist plan`, have to be told.
        limit_gib: GiB that a rank may give to these statistics, C times the ordinary ones; more is refused before
            anything is allocated.
    """

    classes: Count | None = None
    limit_gib: Positive = 4.0


def from_flag(value: Any) -> Any:
    """Read `true` as a section of defaults and `false` as none."""
    if isinstance(value, bool):
        return {} if value else None
    return value
