"""The adapter: edits per site, replaced modules, and where they came from.  Plain arrays, no framework."""

from deployfa.adapter.adapter import Adapter, BaseReference
from deployfa.adapter.fingerprint import fingerprint

__all__ = ["Adapter", "BaseReference", "fingerprint"]
