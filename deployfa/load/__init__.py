"""How a server holds up: open-loop load for a server that speaks the Open Inference Protocol v2 (REST)."""

from deployfa.load.find_rate import find_rate
from deployfa.load.options import LoadOptions
from deployfa.load.report import LoadReport, RateReport
from deployfa.load.run import run_load

__all__ = ["LoadOptions", "LoadReport", "RateReport", "find_rate", "run_load"]
