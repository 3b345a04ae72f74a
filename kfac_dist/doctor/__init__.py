"""`kfac-dist doctor`: K-FAC's treatment of a run's model and data, and checks of it.

examine      the order of the checks, and the report
parameters   one row a parameter: its block or why it has none, its costs, its owner
samples      values that aren't finite, targets that the loss doesn't know
plans        the same plan on every rank, the same blocks for any number of ranks
scale        statistics of a batch against those of its samples, one by one
curvature    the factors against the exact Gauss–Newton matrix
fisher       on request: both estimators of the diagonal Fisher, at first and over some steps
findings     problems, and corrections
view         the report on a terminal
"""

from kfac_dist.doctor.examine import examine
from kfac_dist.doctor.findings import Finding, Report, Severity
from kfac_dist.doctor.fisher.examine import FisherRequest

__all__ = ["Finding", "FisherRequest", "Report", "Severity", "examine"]
