"""`fastgessl report`: one self-contained HTML page on a run, or on several with a comparison."""

from fastgessl.report.page import write_report

__all__ = ["write_report"]
