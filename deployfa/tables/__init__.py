"""Adapters as rows of tensors: what a slot holds and a table stacks."""

from deployfa.tables.layout import Head, Layout, LowRanks, Segment, Vectors
from deployfa.tables.row import base_row, row_of

__all__ = ["Head", "Layout", "LowRanks", "Segment", "Vectors", "base_row", "row_of"]
