"""`kfac-dist report`: one page on what runs did and why, which needs nothing but a browser."""

from kfac_dist.reporting.report.page import write_report
from kfac_dist.reporting.report.runs import RunData, read_run, read_runs

__all__ = ["RunData", "read_run", "read_runs", "write_report"]
