"""``TorchRunner``: a PyTorch module behind the same seam as a graph, to compare the two."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from deployfa.edits import Array
from deployfa.errors import MissingExtraError, RuntimeTargetError
from deployfa.runtimes.runner import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["TorchRunner"]


class TorchRunner:
    """``module`` in evaluation and inference mode; its training flags are put back after each run.

    input_names: the arguments of ``forward``; when ``forward`` has none of these names they are passed in this order.
    output_names: which fields of a ``ModelOutput``, or the names of the tensors returned, in order; an empty tuple
    takes every tensor there is.  Floating-point feeds are cast to the dtype of the module's parameters, so one set of
    feeds serves a float32 and a float64 module.

    A module does not say what it takes, so ``inputs`` is a convention: names ending in ``_ids`` or ``_mask`` are int64
    of (batch, sequence); others have the module's dtype and a shape of ``("...",)``, any.

    Raises ``MissingExtraError`` without torch.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        input_names: Sequence[str],
        output_names: Sequence[str] = ("logits",),
    ) -> None:
        _import_torch()
        self.module = module
        self._parts = tuple(module.modules())
        self._dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
        dtype = "float32" if self._dtype is None else str(self._dtype).removeprefix("torch.")
        self._inputs = tuple(_convention(name, dtype) for name in input_names)
        self._outputs = tuple(TensorSpec(name, dtype, ("...",)) for name in output_names)
        self._by_name = _takes_names(module, input_names)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One inference.  Raises ``RuntimeTargetError`` on a missing or extra feed or output, and when it fails."""
        torch = _import_torch()
        names = [spec.name for spec in self._inputs]
        if set(names) != set(feeds):
            wrong = sorted(set(names) ^ set(feeds))[0]
            what = "is missing" if wrong in names else "is not an input of this module"
            raise RuntimeTargetError(f"input '{wrong}' {what}; feed exactly: {', '.join(names)}")
        with torch.inference_mode(), self._evaluating():
            tensors = {name: self._to_torch(feeds[name]) for name in names}
            try:
                result = self.module(**tensors) if self._by_name else self.module(*tensors.values())
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                text = str(error).strip().splitlines()
                raise RuntimeTargetError(
                    f"PyTorch failed while running ({text[0] if text else type(error).__name__}); check the shapes fed"
                ) from error
            return self._pick(result)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = [part for part in self._parts if part.training]
        for part in training:
            part.training = False
        try:
            yield
        finally:
            for part in training:
                part.training = True

    def _to_torch(self, array: Array) -> Any:
        torch = _import_torch()
        if not array.flags.writeable or not array.flags.c_contiguous:
            array = array.copy(order="C")
        if array.dtype.name == "bfloat16":
            tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        return tensor.to(self._dtype) if tensor.is_floating_point() and self._dtype is not None else tensor

    def _pick(self, result: Any) -> dict[str, Array]:
        torch = _import_torch()
        names = [spec.name for spec in self._outputs]
        if isinstance(result, Mapping):
            found = {key: value for key, value in result.items() if isinstance(value, torch.Tensor)}
            missing = [name for name in names if name not in found]
            if missing:
                raise RuntimeTargetError(f"the module returned no '{missing[0]}'; it returned: {', '.join(found)}")
            return {name: _to_numpy(found[name]) for name in names or found}
        values = list(result) if isinstance(result, tuple | list) else [result]
        if not names:
            values = [value for value in values if isinstance(value, torch.Tensor)]
            names = [f"output_{index}" for index in range(len(values))]
        if len(values) < len(names):
            raise RuntimeTargetError(f"the module returned {len(values)} outputs; it was asked for {', '.join(names)}")
        return {name: _to_numpy(value) for name, value in zip(names, values, strict=False)}


def _import_torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtraError("torch", "train", "running a PyTorch model") from error
    return torch


def _convention(name: str, dtype: str) -> TensorSpec:
    if name.endswith(("_ids", "_mask")):
        return TensorSpec(name, "int64", ("batch", "sequence"))
    return TensorSpec(name, dtype, ("...",))


def _takes_names(module: Any, names: Sequence[str]) -> bool:
    parameters = inspect.signature(module.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return not any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters.values())
    return all(name in parameters for name in names)


def _to_numpy(tensor: Any) -> Array:
    """bfloat16, which numpy does not know, widens to float32: exact."""
    plain = tensor.detach().cpu()
    if str(plain.dtype) == "torch.bfloat16":
        plain = plain.float()
    return np.asarray(plain.numpy())
