"""ONNX graphs: find sites, plan placements, rewrite a clone, fuse for a runtime.  onnx_ir only, no torch."""

from deployfa.graph.plan import Plan, make_plan
from deployfa.graph.rewrite import apply_adapter
from deployfa.graph.sites import Site, find_sites

__all__ = ["Plan", "Site", "apply_adapter", "find_sites", "make_plan"]
