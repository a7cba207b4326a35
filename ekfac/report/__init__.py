"""``python -m ekfac report``: one self-contained page about a network's curvature."""

from ekfac.report.page import render, write_report
from ekfac.report.sources import ReportError, SavedLayer, Subject, read_subject

__all__ = [
    "ReportError",
    "SavedLayer",
    "Subject",
    "read_subject",
    "render",
    "write_report",
]
