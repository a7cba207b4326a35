"""Report of ``python -m ekfac report``: a self-contained page about curvature."""

from ekfac.report.page import render, write_report
from ekfac.report.report_input import ReportError, SavedLayer, Subject, read_subject

__all__ = [
    "ReportError",
    "SavedLayer",
    "Subject",
    "read_subject",
    "render",
    "write_report",
]
