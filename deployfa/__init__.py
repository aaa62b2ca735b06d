"""deployfa: train, fold, verify, time and run feature-space adapters (VeFA, LoRFA).

Everything public is importable from here; each name is loaded when it is first used, so ``import deployfa`` needs
neither torch nor a runtime.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deployfa.adapter import Adapter, BaseReference
    from deployfa.bench import BenchReport, Contender, Shape
    from deployfa.bundle import Bundle, Manifest
    from deployfa.bundle.open_engine import open_slots
    from deployfa.delta import Delta, export_delta
    from deployfa.edits import Edit, LowRank
    from deployfa.errors import DeployfaError
    from deployfa.graph import Plan, apply_adapter, make_plan
    from deployfa.mixed import MixedRunner, open_table
    from deployfa.parity import ParityReport
    from deployfa.pipeline import export, plan_adapter
    from deployfa.predict import Answer, Predictor
    from deployfa.runtimes.slots import SlotRunner
    from deployfa.slots import export_slots, slot_adapter
    from deployfa.tables import AdapterTable
    from deployfa.train import TrainReport
    from deployfa.training.capture import capture
    from deployfa.training.tuners import LoRFAConfig, VeFAConfig

_HOMES = {
    "Adapter": "adapter",
    "AdapterTable": "tables",
    "Answer": "predict",
    "BaseReference": "adapter",
    "BenchReport": "bench",
    "Bundle": "bundle",
    "Contender": "bench",
    "Delta": "delta",
    "DeployfaError": "errors",
    "Edit": "edits",
    "LoRFAConfig": "training.tuners",
    "LowRank": "edits",
    "Manifest": "bundle",
    "MixedRunner": "mixed",
    "ParityReport": "parity",
    "Plan": "graph",
    "Predictor": "predict",
    "Shape": "bench",
    "SlotRunner": "runtimes.slots",
    "TrainReport": "train",
    "VeFAConfig": "training.tuners",
    "apply_adapter": "graph",
    "capture": "training.capture",
    "export": "pipeline",
    "export_delta": "delta",
    "export_slots": "slots",
    "make_plan": "graph",
    "open_slots": "bundle.open_engine",
    "open_table": "mixed",
    "plan_adapter": "pipeline",
    "slot_adapter": "slots",
}

__all__ = [
    "Adapter",
    "AdapterTable",
    "Answer",
    "BaseReference",
    "BenchReport",
    "Bundle",
    "Contender",
    "Delta",
    "DeployfaError",
    "Edit",
    "LoRFAConfig",
    "LowRank",
    "Manifest",
    "MixedRunner",
    "ParityReport",
    "Plan",
    "Predictor",
    "Shape",
    "SlotRunner",
    "TrainReport",
    "VeFAConfig",
    "__version__",
    "apply_adapter",
    "capture",
    "export",
    "export_delta",
    "export_slots",
    "make_plan",
    "open_slots",
    "open_table",
    "plan_adapter",
    "slot_adapter",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("deployfa")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'deployfa' has no attribute '{name}'")
    if home.startswith("training"):
        _require_torch(name)
    return getattr(importlib.import_module(f"deployfa.{home}"), name)


def __dir__() -> list[str]:
    return __all__


def _require_torch(name: str) -> None:
    from importlib.util import find_spec

    from deployfa.errors import MissingExtraError

    for package in ("torch", "transformers", "peft"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "train", f"deployfa.{name}")
