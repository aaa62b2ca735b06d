"""Load a base model, name what the checkpoint did not bring, and fingerprint the rest."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from deployfa.adapter import Adapter, fingerprint
from deployfa.errors import ExportError, InputError
from deployfa.tasks import ZERO_SHOT, Task, task_of
from deployfa.training import efficientnet_lite  # noqa: F401  (registers it)

__all__ = ["Base", "base_fingerprint", "label_order", "load_base", "load_base_of", "quiet"]

_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert"}


@dataclass(frozen=True, eq=False)
class Base:
    """A base model in float32 and the modules its checkpoint did not bring (a fresh classifier head)."""

    model: nn.Module
    name: str
    task: str
    fresh_modules: tuple[str, ...]

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @property
    def does(self) -> Task:
        return task_of(self.task)

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens, that the position embeddings allow."""
        config: Any = self.model.config
        positions = int(getattr(config, "max_position_embeddings", 0) or 512)
        # RoBERTa counts positions from the padding id on
        offset = int(getattr(config, "pad_token_id", 0) or 0) + 1 if config.model_type in _OFFSET_POSITIONS else 0
        return positions if self.does.kind == "prompt" else min(positions - offset, 512)


def load_base(name: str | Path, task: str, *, labels: Sequence[str] | None, seed: int = 0) -> Base:
    """Load ``name`` (a directory or hub id) for ``task`` with ``len(labels)`` outputs, float32, eval mode.

    ``labels=None`` keeps those of the checkpoint.  The base's name is absolute where it is a directory.
    Modules that the checkpoint lacks are initialised from ``seed``.  Raises ``InputError`` if it cannot be loaded.
    """
    if task == ZERO_SHOT:
        return _load_zero_shot(name, labels)
    auto: Any = getattr(transformers, task_of(task).auto_class)
    torch.manual_seed(seed)
    outputs: dict[str, Any] = {}
    if labels is not None:
        ids = {label: number for number, label in enumerate(labels)}
        outputs = {"num_labels": len(labels), "label2id": ids, "id2label": {n: label for label, n in ids.items()}}
    try:
        with quiet():
            model, loading = auto.from_pretrained(
                str(name),
                **outputs,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _unloadable(name, error) from error
    missing = set(loading["missing_keys"]) | {key[0] for key in loading["mismatched_keys"]}
    fresh = sorted({key.rpartition(".")[0] for key in missing})
    return Base(model.eval(), _known(name), task, tuple(fresh))


def _load_zero_shot(name: str | Path, labels: Sequence[str] | None) -> Base:
    """The head is no fresh module: it follows from the labels, and so does the base's fingerprint."""
    from deployfa.training.zero_shot import load_zero_shot

    if not labels:
        raise InputError("the head is made of the names of the labels, and there are none; train with deployfa train")
    try:
        with quiet():
            model: nn.Module = load_zero_shot(name, labels)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _unloadable(name, error) from error
    return Base(model.eval(), _known(name), ZERO_SHOT, ())


def _known(name: str | Path) -> str:
    """A relative path would mean something else in another directory."""
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _unloadable(name: str | Path, error: Exception) -> InputError:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(f"cannot load a model from '{name}' ({first_line}); pass its directory with --model")


def label_order(name: str | Path, labels: Sequence[str]) -> list[str]:
    """``labels`` in the order of the checkpoint's own outputs, if it has a head for just these; else as they are.

    A head that was trained to say {0: POSITIVE, 1: NEGATIVE} must not be trained on with the two swapped.
    """
    try:
        with quiet():
            config: Any = transformers.AutoConfig.from_pretrained(str(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        # load_base says what is wrong with it
        return list(labels)
    own = [str(config.id2label[number]) for number in sorted(config.id2label)]
    return own if sorted(own) == sorted(labels) else list(labels)


def load_base_of(adapter: Adapter, name: str | Path) -> Base:
    """``load_base`` with as many outputs as ``adapter`` was trained for.

    An adapter that names no labels (a checkpoint of plain PEFT) has as many as its own head, or as the checkpoint's.
    Raises ``InputError`` if neither the checkpoint nor the adapter brings a module that the model needs, and
    ``BaseMismatchError`` if that is because it is another base.
    """
    base = load_base(name, adapter.base.task, labels=adapter.labels or None)
    if not adapter.labels:
        count = _outputs(base.model, adapter)
        if count is not None:
            base = load_base(name, adapter.base.task, labels=[f"LABEL_{number}" for number in range(count)])
    lost = [path for path in base.fresh_modules if path not in adapter.modules]
    if lost:
        # another base explains it better
        adapter.check_base(base_fingerprint(base.model, without=list(adapter.modules)))
        raise InputError(
            f"neither '{name}' nor the adapter has weights for '{lost[0]}', so it would answer at random; train the "
            "adapter with that module in modules_to_save"
        )
    return base


def _outputs(model: nn.Module, adapter: Adapter) -> int | None:
    """How many outputs the adapter's own head has: the rows of the one array that has another number than the model's,
    ``None`` if all are alike."""
    own = model.state_dict()
    for path, parameters in adapter.modules.items():
        for name, array in parameters.items():
            tensor = own.get(f"{path}.{name}")
            if tensor is None or not array.ndim or tuple(tensor.shape[1:]) != array.shape[1:]:
                continue
            if tensor.shape[0] != array.shape[0]:
                return int(array.shape[0])
    return None


def base_fingerprint(model: nn.Module, *, without: Sequence[str] = ()) -> str:
    """``deployfa.adapter.fingerprint`` over the state dict of ``model``.

    Adapters on it (PEFT's layers) are looked through; modules in ``without``, which the adapter brings itself, and
    their insides are left out.  Raises ``ExportError`` if nothing is left.
    """
    inner = getattr(model, "base_model", None)
    root = inner.model if inner is not None and hasattr(model, "peft_config") else model
    named = list(_base_tensors(root.state_dict(), getattr(inner, "prefix", None), without))
    if not named:
        raise ExportError("the base model has no tensors left to fingerprint; adapt fewer modules")
    return fingerprint(
        (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), _bytes(tensor)) for name, tensor in named
    )


def _base_tensors(
    state: dict[str, torch.Tensor], adapter_prefix: str | None, without: Sequence[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    for key, tensor in state.items():
        parts = key.split(".")
        if adapter_prefix is not None and any(part.startswith(adapter_prefix) for part in parts):
            continue
        if "modules_to_save" in parts:
            continue
        name = ".".join(part for part in parts if part not in {"base_layer", "original_module"})
        if not any(name.startswith(f"{module}.") for module in without):
            yield name, tensor


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the loading reports and version warnings of libraries; errors still come as exceptions."""
    names = ("torch", "torch.onnx", "torch.export", "onnx_ir", "onnxscript", "transformers", "peft", "accelerate")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
