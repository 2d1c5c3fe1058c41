"""One HTML page about one run."""

from agents.report.page import write_report

__all__ = ["write_report"]
