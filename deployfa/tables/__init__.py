"""Adapters as rows of tensors: what a slot holds and a table stacks."""

from deployfa.tables.adapter_table import AdapterInfo, AdapterTable
from deployfa.tables.fleet import Fleet, open_fleet, write_fleet
from deployfa.tables.history import Member
from deployfa.tables.layout import Head, Layout, LowRanks, Segment, Vectors
from deployfa.tables.lease import Lease
from deployfa.tables.row import base_row, row_of

__all__ = [
    "AdapterInfo",
    "AdapterTable",
    "Fleet",
    "Head",
    "Layout",
    "Lease",
    "LowRanks",
    "Member",
    "Segment",
    "Vectors",
    "base_row",
    "open_fleet",
    "row_of",
    "write_fleet",
]
