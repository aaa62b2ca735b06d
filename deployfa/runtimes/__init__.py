"""Runtimes: each a ``Runner`` with ``run(feeds) -> outputs``."""

from deployfa.runtimes.runner import Runner, TensorSpec

__all__ = ["Runner", "TensorSpec"]
