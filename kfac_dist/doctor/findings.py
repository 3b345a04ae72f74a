"""The doctor's findings, and the report that holds them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from enum import StrEnum

from kfac_dist.doctor.fisher.report import FisherReport
from kfac_dist.errors import KFACError


class Severity(StrEnum):
    """Severity of a finding."""

    ERROR = "error"
    WARNING = "warning"
    FINE = "fine"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: Name of the check.
        severity: Whether the run can start.
        text: The finding, and for a problem a correction.
    """

    check: str
    severity: Severity
    text: str

    @classmethod
    def of(cls, check: str, error: KFACError) -> Finding:
        """Turn an error into a finding."""
        return cls(check, Severity.ERROR, str(error))


@dataclass(frozen=True)
class ParameterRow:
    """K-FAC's treatment of one parameter.

    Attributes:
        name: Its name in the model.
        shape: Its shape.
        dtype: Its type.
        block: Name of its block; None if it has none.
        kind: The block's kind; `Diagonal` where `kfac.curvature.uncovered: diagonal` stands in for one.
        factors: Sizes of the block's factors, such as `A 65  G 100`; on the block's first parameter only, as are
            `factor_bytes`, `inversion_cost` and `owners`.
        reason: Reason why no block covers it, and its treatment.
        factor_bytes: Bytes of the block's factors, or of the diagonal.
        inversion_cost: Σ n³ over the matrices that are inverted.
        owners: The ranks that invert.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    block: str | None = None
    kind: str = ""
    factors: str = ""
    reason: str = ""
    factor_bytes: int = 0
    inversion_cost: float = 0.0
    owners: tuple[int, ...] = ()


@dataclass(frozen=True)
class CurvatureRow:
    """One block's K-FAC approximation beside its block of the exact Gauss–Newton matrix (GGN).

    Attributes:
        block: Name of the block.
        samples: Samples that both were computed from.
        positions: Positions of a sample that share the weight, T; for unit-wise blocks, that are terms of their own.
        error: `‖A⊗G − GGN‖ / ‖GGN‖` in Frobenius norms; None if it was not computed.
        cosine: `⟨A⊗G, GGN⟩ / (‖A⊗G‖ ‖GGN‖)`.
        exact: Whether the two have to be equal.
        expected: The expectation, in words, or why nothing was computed.
    """

    block: str
    samples: int
    positions: int
    error: float | None
    cosine: float | None
    exact: bool
    expected: str


@dataclass(frozen=True)
class Report:
    """Everything that the doctor found.

    Attributes:
        name: Name of the run.
        environment: Ranks, device, versions.
        parameters: A row a parameter.
        findings: The checks in their order.
        curvature: Factors against the exact curvature.
        plan_hash: Hash of the plan that the ranks agreed on.
        load: Inversion cost of each rank.
        fisher: The diagonal Fisher's estimators, if they were asked for and could be measured.
    """

    name: str
    environment: dict[str, str]
    parameters: tuple[ParameterRow, ...] = ()
    findings: tuple[Finding, ...] = ()
    curvature: tuple[CurvatureRow, ...] = ()
    plan_hash: str = ""
    load: tuple[float, ...] = ()
    fisher: FisherReport | None = None

    @property
    def ready(self) -> bool:
        """Whether nothing speaks against the run."""
        return not any(finding.severity is Severity.ERROR for finding in self.findings)

    @property
    def verdict(self) -> str:
        """The report in one sentence."""
        errors = sum(finding.severity is Severity.ERROR for finding in self.findings)
        warnings = sum(finding.severity is Severity.WARNING for finding in self.findings)
        remarks = f"{warnings} remark{'s' if warnings > 1 else ''}" if warnings else ""
        if errors:
            also = f", and {remarks}" if remarks else ""
            return f"not ready: {errors} thing{'s' if errors > 1 else ''} to put right{also}"
        return f"ready, with {remarks}" if remarks else "ready"

    def to_json(self) -> str:
        """Return the report as JSON; the keys are the attributes' names."""
        values = {"verdict": self.verdict, "ready": self.ready, **dataclasses.asdict(self)}
        return json.dumps(values, indent=2, ensure_ascii=False)
