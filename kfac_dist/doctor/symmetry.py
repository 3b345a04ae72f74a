"""The asymmetry of factors and inverses, before anything makes them symmetric."""

from __future__ import annotations

from kfac_dist.config.schema import Solver
from kfac_dist.distributed.communicators.base import Communicator
from kfac_dist.doctor.findings import Finding, Severity
from kfac_dist.preconditioner.kfac import KFAC

# Rounding leaves far less; more means that one half of a matrix isn't the other's mirror image.
TOLERANCE = 1e-3
_NAMES = {"factor": "factors", "inverse": "inverses"}


def examine_symmetry(kfac: KFAC, ranks: Communicator) -> list[Finding]:
    """Name the layer whose factor, and the one whose inverse, was the least symmetric when last solved; collective.

    Args:
        kfac: After a refresh.
        ranks: The ranks.
    """
    gathered = ranks.gather_objects(kfac.monitor.asymmetries(), label="symmetry")
    found = {key: value for own in gathered for key, value in own.items()}
    said, largest = [], 0.0
    for kind, plural in _NAMES.items():
        values = {name: value for (name, which), value in found.items() if which == kind}
        if values:
            worst = max(values, key=lambda name: values[name])
            said.append(f"{plural} by at most {values[worst]:.1e} of their largest entry ({worst})")
            largest = max(largest, *values.values())
        elif kind == "factor":
            said.append("factors not, because only one half of them is measured")
        elif kfac.solver_access.config.inversion.solver is Solver.EIGEN:
            said.append("eigenbases can't be compared")
    if not found:
        return []
    severity = Severity.FINE if largest <= TOLERANCE else Severity.WARNING
    return [Finding("symmetry", severity, f"asymmetric before it is mirrored: {'; '.join(said)}")]
