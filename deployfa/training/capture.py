"""Take the adapter out of a trained PEFT model."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from deployfa.adapter import Adapter, BaseReference
from deployfa.adapter.peft_convolutions import CONVOLUTIONS
from deployfa.adapter.peft_directory import from_state
from deployfa.edits import Array
from deployfa.training.base import base_fingerprint

__all__ = ["capture", "head_only"]


def capture(
    model: peft.PeftModel,
    *,
    adapter_name: str = "default",
    base_name: str = "",
    task: str = "text-classification",
    labels: Sequence[str] = (),
    training: Mapping[str, Any] | None = None,
) -> Adapter:
    """The named adapter of ``model`` as an ``Adapter``, with the fingerprint of the base below it."""
    config = _plain(model.peft_config[adapter_name].to_dict()) | _convolutions(model)
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter_name)
    edits, modules = from_state({name: _numpy(tensor) for name, tensor in state.items()}, config, "the trained model")
    return Adapter(
        method=str(config["peft_type"]).lower(),
        edits=edits,
        modules=modules,
        base=BaseReference(
            name=base_name or str(config.get("base_model_name_or_path") or ""),
            fingerprint=base_fingerprint(model, without=list(modules)),
            architecture=type(model.get_base_model()).__name__,
            task=task,
        ),
        labels=tuple(labels),
        config=config,
        training=dict(training or {}),
        found="captured from a PEFT model",
    )


def head_only(
    model: torch.nn.Module,
    modules: Sequence[str],
    *,
    base_name: str,
    task: str,
    labels: Sequence[str],
    training: Mapping[str, Any],
) -> Adapter:
    """An adapter without edits: only the trained ``modules`` of ``model``."""
    replaced = {
        path: {name: _numpy(p) for name, p in model.get_submodule(path).named_parameters(recurse=False)}
        for path in modules
    }
    base = BaseReference(
        name=base_name,
        fingerprint=base_fingerprint(model, without=modules),
        architecture=type(model).__name__,
        task=task,
    )
    return Adapter("head", {}, replaced, base, tuple(labels), {}, dict(training), "captured from a model")


def _convolutions(model: torch.nn.Module) -> dict[str, dict[str, list[int]]]:
    """The adapted convolutions, for the adapter's config: see ``deployfa.adapter.peft_convolutions``."""
    layers = {
        path.removeprefix("base_model.model."): module.get_base_layer()
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    found = {
        path: [layer.weight.dim() - 2, layer.groups]
        for path, layer in layers.items()
        if isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d)
    }
    return {CONVOLUTIONS: found} if found else {}


def _numpy(tensor: torch.Tensor) -> Array:
    detached = tensor.detach().cpu().contiguous()
    if detached.dtype == torch.bfloat16:
        stored: Array = detached.view(torch.uint16).numpy().view(ml_dtypes.bfloat16).copy()
        return stored
    array: Array = detached.numpy().copy()
    return array


def _plain(value: Any) -> Any:
    """PEFT's config as JSON has it: enums by value, sets as sorted lists."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
