"""How equal: a bundle against the PyTorch model with the unfolded adapter, or against what was stored of it."""

from deployfa.parity.report import ParityReport, Stage
from deployfa.parity.verify import verify

__all__ = ["ParityReport", "Stage", "verify"]
