"""A run that can be looked at: one page of one or several runs, and the same as a table."""

from vqgan_accel.report.compare import compare
from vqgan_accel.report.page import report

__all__ = ["compare", "report"]
