"""Tables, plots, HTML of what was measured."""

from deployfa.report.demo_report import DemoReport

__all__ = ["DemoReport"]
