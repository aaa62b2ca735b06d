"""A PEFT directory: ``adapter_config.json`` + ``adapter_model.safetensors`` (+ ``deployfa.json``, written by us).

Layout of the tensors, as PEFT 0.21 saves them: ``base_model.model.SITE.NAME`` with the adapter's own name left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from deployfa.adapter.adapter import Adapter, AdapterMeta, BaseReference
from deployfa.adapter.peft_convolutions import CONVOLUTIONS, convolution_of, convolutions, grouped, ungrouped
from deployfa.adapter.peft_ia3 import KEPT, edit_from, feedforward_modules, kept_vectors, restored, vector_of
from deployfa.adapter.peft_refusals import refuse_config, refuse_leftover, refuse_method
from deployfa.adapter.safetensors_io import read_safetensors, write_safetensors
from deployfa.adapter.torch_zip import read_torch_zip
from deployfa.edits import Array, Edit
from deployfa.errors import AdapterFormatError, EditError

__all__ = ["from_state", "load", "save"]

_PREFIX = "base_model.model."
_META = "deployfa.json"
#: PEFT's parameter name → ours, per PEFT type.  ``.weight`` endings are PEFT's way of keeping A and B as modules.
_NAMES: dict[str, dict[str, str]] = {
    "VEFA": {"vefa_lambda": "lambda", "vefa_delta": "delta"},
    "LORFA": {"lorfa_A": "A", "lorfa_B": "B", "lorfa_delta": "delta"},
    "LORA": {"lora_A.weight": "out_A", "lora_B.weight": "out_B"},
    "IA3": {"ia3_l": "l"},
}
_TASKS = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation"}


def load(path: Path) -> Adapter:
    """Read the PEFT checkpoint in ``path``; raises ``AdapterFormatError`` with what is missing."""
    config_file = path / "adapter_config.json"
    if not config_file.is_file():
        raise AdapterFormatError(f"'{path}' has no adapter_config.json; pass a PEFT checkpoint directory")
    try:
        config: dict[str, Any] = msgspec.json.decode(config_file.read_bytes(), type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"'{config_file}' is not valid JSON ({error}); copy it again") from error
    method = str(config.get("peft_type", "")).upper()
    if method not in _NAMES:
        raise refuse_method(str(path), method, _NAMES)
    if method == "LORA":
        refuse_config(str(path), config)
    tensors = _tensors(path)
    edits, modules = from_state(tensors, config, str(path))
    if method == "IA3" and (path / KEPT).is_file():
        vectors = {name.removeprefix(_PREFIX).removesuffix(".ia3_l"): array for name, array in tensors.items()}
        edits = restored(edits, vectors, read_safetensors(path / KEPT)[0])
    config |= convolutions({name.removeprefix(_PREFIX): array for name, array in tensors.items()})
    meta = _meta(path, config, method)
    return Adapter(
        method=meta.method,
        edits=edits,
        modules=modules,
        base=meta.base,
        labels=tuple(meta.labels),
        config=meta.config,
        training=meta.training,
        found=f"PEFT {method} directory" + ("" if (path / _META).is_file() else " not written by deployfa"),
    )


def save(adapter: Adapter, folder: Path) -> None:
    """Write ``adapter`` into the existing ``folder`` so that ``PeftModel.from_pretrained`` takes it.

    PEFT keeps s as alpha / r in the config and not in a tensor: raises ``AdapterFormatError`` if the adapter's config
    says another scale than its edits, or an edit has a part that PEFT's method lacks.
    """
    peft_type = adapter.method.upper()
    if peft_type not in _NAMES:
        raise AdapterFormatError(f"method '{adapter.method}' has no PEFT form; save it as .safetensors")
    try:
        tensors = {
            f"{_PREFIX}{site}.{name}": array
            for site, edit in adapter.edits.items()
            for name, array in _to_state(site, edit, peft_type, adapter.config).items()
        }
    except EditError as error:
        raise AdapterFormatError(str(error)) from error
    for module, parameters in adapter.modules.items():
        tensors |= {f"{_PREFIX}{module}.{name}": array for name, array in parameters.items()}
    config = {**_default_config(adapter), **adapter.config, "peft_type": peft_type}
    config.pop(CONVOLUTIONS, None)
    if peft_type == "IA3":
        config["feedforward_modules"] = feedforward_modules(adapter.edits, config)
        kept = kept_vectors(adapter.edits)
        if kept:
            write_safetensors(folder / KEPT, kept, {"format": "pt"})
    _check_scales(adapter, config)
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config, order="sorted")))
    (folder / _META).write_bytes(msgspec.json.format(msgspec.json.encode(adapter.meta, order="sorted")))


def _to_state(site: str, edit: Edit, peft_type: str, config: Mapping[str, Any]) -> dict[str, Array]:
    """PEFT's name → tensor, in PEFT's shape; raises ``EditError`` for a part that PEFT's method lacks."""
    parts = {name: array for name, array in edit.tensors().items() if name not in {"s", "out_s"}}
    axes, groups = convolution_of(site, config)
    if peft_type == "IA3":
        return {"ia3_l": vector_of(site, edit, axes)} if parts else {}
    theirs = {ours: name for name, ours in _NAMES[peft_type].items()}
    unknown = [name for name in parts if name not in theirs]
    if unknown:
        raise EditError(f"site '{site}': PEFT's {peft_type} has no {unknown[0]}; save as .safetensors")
    if "out_B" in parts and axes:
        parts["out_B"] = grouped(site, parts["out_B"], axes, groups)
    return {theirs[name]: array for name, array in parts.items()}


def _default_config(adapter: Adapter) -> dict[str, Any]:
    """What PEFT must know of an adapter that was not made by PEFT."""
    found: dict[str, Any] = {
        "target_modules": sorted(adapter.edits),
        "modules_to_save": sorted(adapter.modules) or None,
    }
    low = next((low for edit in adapter.edits.values() if (low := edit.input_low_rank or edit.output_low_rank)), None)
    if low is not None and "r" not in adapter.config:
        alpha = "lora_alpha" if adapter.method.upper() == "LORA" else "alpha"
        found |= {"r": low.rank, alpha: low.s * low.rank}
    if any(edit.delta is not None for edit in adapter.edits.values()):
        found["bias"] = "shift"
    return found


def _check_scales(adapter: Adapter, config: Mapping[str, Any]) -> None:
    for site, edit in adapter.edits.items():
        low = edit.input_low_rank or edit.output_low_rank
        if low is None:
            continue
        if _scaling(site, config) != low.s:
            raise AdapterFormatError(
                f"site '{site}': s is {low.s}, but the config's alpha and r give {_scaling(site, config)}; "
                "save it as .safetensors"
            )
        rank = _pattern(site, config.get("rank_pattern"), config.get("r", 8))
        if rank != low.rank:
            raise AdapterFormatError(
                f"site '{site}': its rank is {low.rank}, but the config says {rank}; save it as .safetensors"
            )


def _tensors(path: Path) -> dict[str, Array]:
    safe, legacy = path / "adapter_model.safetensors", path / "adapter_model.bin"
    if safe.is_file():
        return read_safetensors(safe)[0]
    if legacy.is_file():
        content = read_torch_zip(legacy)
        if isinstance(content, dict) and all(isinstance(a, np.ndarray) for a in content.values()):
            return dict(content)
    raise AdapterFormatError(f"'{path}' has no adapter_model.safetensors; copy the whole PEFT directory")


def from_state(
    tensors: Mapping[str, Array], config: Mapping[str, Any], origin: str
) -> tuple[dict[str, Edit], dict[str, dict[str, Array]]]:
    """PEFT's adapter state → edits by site, and the rest, which PEFT calls ``modules_to_save``.

    ``origin`` names the checkpoint in errors.  Raises ``AdapterFormatError`` on a tensor that belongs to neither.
    """
    method = str(config["peft_type"]).upper()
    sites: dict[str, dict[str, Array]] = {}
    modules: dict[str, dict[str, Array]] = {}
    for full_name, array in tensors.items():
        name = full_name.removeprefix(_PREFIX)
        for theirs, ours in _NAMES[method].items():
            if name.endswith(f".{theirs}") and ".base_layer." not in name:
                sites.setdefault(name.removesuffix(f".{theirs}"), {})[ours] = array
                break
        else:
            owner, _, parameter = name.rpartition(".")
            saved = config.get("modules_to_save") or []
            if not isinstance(saved, list) or not all(isinstance(module, str) for module in saved):
                raise AdapterFormatError(f"'{origin}': modules_to_save is not a list of names; copy the config again")
            if not any(_inside(owner, module) for module in saved):
                raise refuse_leftover(origin, full_name, method, config)
            modules.setdefault(owner, {})[parameter] = array
    try:
        return {site: _edit(site, parts, config, method) for site, parts in sites.items()}, modules
    except EditError as error:
        raise AdapterFormatError(f"'{origin}': {error}") from error


def _edit(site: str, tensors: Mapping[str, Array], config: Mapping[str, Any], method: str) -> Edit:
    parts = dict(tensors)
    if method == "IA3":
        return edit_from(site, parts["l"], config)
    prefix = "out_" if method == "LORA" else ""
    if method in {"LORA", "LORFA"}:
        parts[f"{prefix}s"] = np.asarray(_scaling(site, config), dtype=np.float64)
        b = parts.get(f"{prefix}B")
        if b is not None and b.ndim > 2 and b.size == b.shape[0] * b.shape[1]:
            parts[f"{prefix}B"] = ungrouped(b.reshape(b.shape[:2]), len(parts.get(f"{prefix}A", ())))
    return Edit.from_tensors(site, parts)


def _inside(owner: str, module: str) -> bool:
    """Whether ``owner`` is, or lies in, a module whose path ends in ``module``: PEFT's rule, by which ``classifier``
    takes DistilBERT's ``pre_classifier`` along."""
    parts = owner.split(".")
    return any(".".join(parts[: count + 1]).endswith(module) for count in range(len(parts)))


def _scaling(site: str, config: Mapping[str, Any]) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA, with PEFT's per-module patterns.

    Raises ``EditError`` on a config that gives no finite number.
    """
    try:
        return _ratio(site, config)
    except (ArithmeticError, AttributeError, TypeError, ValueError, re.error) as error:
        raise EditError(f"site '{site}': the config's r and alpha give no scale ({error}); copy it again") from error


def _ratio(site: str, config: Mapping[str, Any]) -> float:
    rank = _pattern(site, config.get("rank_pattern"), config.get("r", 8))
    alpha_name = "lora_alpha" if "lora_alpha" in config else "alpha"
    alpha = _pattern(site, config.get("alpha_pattern"), config.get(alpha_name, 8))
    if not float(rank) > 0:
        raise ValueError(f"the rank is {rank}")
    return float(alpha) / (float(rank) ** 0.5 if config.get("use_rslora") else float(rank))


def _pattern(site: str, patterns: Mapping[str, float] | None, default: float) -> float:
    """PEFT's rule (``get_pattern_key``): the first pattern that matches the end of the module path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", site):
            return value
    return default


def _meta(path: Path, config: dict[str, Any], method: str) -> AdapterMeta:
    file = path / _META
    if file.is_file():
        try:
            return msgspec.json.decode(file.read_bytes(), type=AdapterMeta)
        except (ValueError, RecursionError) as error:
            raise AdapterFormatError(f"'{file}' is broken ({error}); copy it again") from error
    base = BaseReference(
        name=str(config.get("base_model_name_or_path") or ""),
        task=_TASKS.get(str(config.get("task_type")), "text-classification"),
    )
    return AdapterMeta(method=method.lower(), base=base, config=config)
