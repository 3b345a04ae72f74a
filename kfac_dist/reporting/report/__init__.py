"""`kfac-dist report`: one HTML page about runs that works offline."""

from kfac_dist.reporting.report.page import write_report
from kfac_dist.reporting.report.runs import RunData, read_run, read_runs

__all__ = ["RunData", "read_run", "read_runs", "write_report"]
