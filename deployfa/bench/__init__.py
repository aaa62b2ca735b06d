"""How fast: contenders in processes of their own, interleaved in one run, with intervals on every comparison."""

from deployfa.bench.comparison import bench
from deployfa.bench.contender import Contender, Shape
from deployfa.bench.results import BenchReport, Ceiling, ContenderReport, Result

__all__ = ["BenchReport", "Ceiling", "Contender", "ContenderReport", "Result", "Shape", "bench"]
