"""The truth: the base model in PyTorch with the *unfolded* adapter, in float64 or float32.

T(x) is computed by hooks on the base model's own layers, from the same arrays that the graph got.  A test holds this
against the PEFT tuners, which compute it their own way.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from deployfa.adapter import Adapter
from deployfa.edits import Array, Edit, LowRank
from deployfa.errors import EditError, SiteError
from deployfa.training.base import Base, base_fingerprint, load_base_of
from deployfa.training.decoder import decoder_call

__all__ = ["adapted_model", "answer", "attach", "float64_throughout", "load_adapted"]


def adapted_model(adapter: str | Path, model: str | Path | None = None) -> nn.Module:
    """Adapter file + base model → a float32 PyTorch model in eval mode (for ``bench --against torch``)."""
    loaded = Adapter.load(adapter)
    base = load_base_of(loaded, model or loaded.base.name)
    return load_adapted(base, loaded, dtype=torch.float32)


def load_adapted(base: Base, adapter: Adapter, *, dtype: torch.dtype, edits: bool = True) -> nn.Module:
    """A copy of ``base`` in ``dtype`` with ``adapter`` attached, unfolded; ``edits=False`` leaves only the head."""
    return attach(copy.deepcopy(base.model).to(dtype).eval(), adapter, edits=edits)


def attach(model: nn.Module, adapter: Adapter, *, edits: bool = True) -> nn.Module:
    """Hook every edit onto ``model`` and write the replaced modules over its own, in the dtype that ``model`` has and
    on its device, where it must stay.

    Raises ``SiteError`` for a site or parameter that the model lacks, ``EditError`` for a transposed LoRA convolution.
    """
    modules = dict(model.named_modules())
    for path, parameters in adapter.modules.items():
        state = modules[path].state_dict() if path in modules else {}
        for name, array in parameters.items():
            if name not in state or tuple(state[name].shape) != array.shape:
                raise SiteError(f"the base model has no '{path}.{name}' of shape {array.shape}; pass another --model")
            state[name].copy_(_tensor(array))
    if edits:
        weighted = {
            name for name, module in modules.items() if isinstance(getattr(module, "weight", None), nn.Parameter)
        }
        missing = sorted(set(adapter.edits) - weighted)
        if missing:
            raise SiteError.unknown(missing, weighted)
        for path, edit in adapter.edits.items():
            if edit.output_low_rank is not None and getattr(modules[path], "transposed", False):
                raise EditError(
                    f"site '{path}': a LoRA of a transposed convolution has no form here; merge it with PEFT"
                )
            _hook(modules[path], edit)
    return model


def answer(model: nn.Module, feeds: Mapping[str, Array]) -> Array:
    """The logits of ``model`` for the feeds of its graph, floats among them in the dtype that the model has.

    Feeds that ``forward`` does not take are left out.  Call it within ``torch.inference_mode()``.
    """
    accepted = set(inspect.signature(model.forward).parameters)
    dtype = next(model.parameters()).dtype
    taken: dict[str, Any] = {}
    for name, array in feeds.items():
        if name.partition(".")[0] in accepted:
            tensor = torch.from_numpy(np.array(array))
            taken[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if any("." in name for name in taken):
        taken = decoder_call(taken)
    logits: Array = model(**taken).logits.numpy()
    return logits


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Run a float64 model in float64: inside the block PyTorch takes float64 where code asks for float32 by name.

    The norms, rotary embeddings and softmaxes of Llama and its kin compute in float32 whatever the dtype of the model,
    and their rounding, nearly half of a float32 run's, would stand in the truth.
    """
    with _Float64():
        yield


class _Float64(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def check_base(base: Base, adapter: Adapter, *, allow_mismatch: bool = False) -> str | None:
    """``Adapter.check_base`` on the fingerprint of ``base`` without the modules that the adapter replaces."""
    actual = base_fingerprint(base.model, without=list(adapter.modules))
    return adapter.check_base(actual, allow_mismatch=allow_mismatch)


def _hook(module: nn.Module, edit: Edit) -> None:
    weight: Any = module.weight
    channels_first = isinstance(module, nn.modules.conv._ConvNd)
    spatial = weight.dim() - 2 if channels_first else 0
    lam = _vector(edit.lam, weight, spatial, add=1.0)
    delta = _vector(edit.delta, weight, spatial)
    low = _matrices(edit.input_low_rank, weight)
    out = _matrices(edit.output_low_rank, weight)
    scale = _vector(edit.output_scale, weight, spatial, add=1.0)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        module_input[0] = x
        changed = x if lam is None else x * lam
        if low is not None:
            changed = changed + _mix(x, low, channels_first)
        if delta is not None:
            changed = changed + delta
        return (changed, *args[1:])

    def after(_: nn.Module, __: Any, y: torch.Tensor) -> torch.Tensor:
        if out is not None:
            x = module_input[0]
            assert x is not None
            if channels_first and out[0].dim() > 2:
                y = y + torch.einsum("or,br...->bo...", out[1], _convolve(module, x, out[0]))
            else:
                y = y + _mix(x, out, channels_first)
        return y if scale is None else y * scale

    module_input: list[torch.Tensor | None] = [None]
    module.register_forward_pre_hook(before)
    if out is not None or scale is not None:
        module.register_forward_hook(after)


def _convolve(module: Any, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """``x`` convolved as ``module`` does, but over all its channels at once: LoRA's A knows no groups."""
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[kernel.dim() - 2]
    padding = module.padding
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    return convolve(x, kernel, None, module.stride, padding, module.dilation)


def _mix(x: torch.Tensor, low: tuple[torch.Tensor, torch.Tensor], channels_first: bool) -> torch.Tensor:
    """``B (A x)`` along the features of ``x``; B carries s."""
    a, b = low
    a = a.reshape(a.shape[0], -1)
    if channels_first:
        return torch.einsum("or,rk,bk...->bo...", b, a, x)
    return (x @ a.T) @ b.T


def _vector(array: Array | None, like: torch.Tensor, spatial: int, *, add: float = 0.0) -> torch.Tensor | None:
    if array is None:
        return None
    # added in float64 and rounded once: 1 + λ is IA3's own number, which λ alone in float32 would not give back
    vector = (_tensor(array) + add).to(like)
    return vector.reshape(-1, *([1] * spatial))


def _matrices(low: LowRank | None, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    if low is None:
        return None
    return _tensor(low.a).to(like), low.s * _tensor(low.b).to(like)


def _tensor(array: Array) -> torch.Tensor:
    """float64 from any float array, bfloat16 included."""
    return torch.from_numpy(np.ascontiguousarray(array.astype(np.float64)))
