"""The layer that stands in for a site: it changes the input, then calls the site; and it folds and takes back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from deployfa.edits import Array, Edit
from deployfa.errors import EditError, InputError, PlanError
from deployfa.training.tuners.config import FeatureConfig
from deployfa.training.tuners.site_kind import site_kind, to_numpy

__all__ = ["FeatureLayer"]


class FeatureLayer(nn.Module, BaseTunerLayer):
    """``y = W T(x) + c`` around a site that computes ``y = W x + c``; a subclass says what T is.

    One adapter at a time: ``T2(T1(x))`` depends on an order that PEFT's list of active adapters does not promise, so
    a second active adapter at the same site is refused with ``InputError``.  Adapters on different sites go together.

    T is computed in the dtype of x, whatever the dtype of the parameters; the site then does as it would with x.
    """

    prefix: ClassVar[str]
    adapter_layer_names: tuple[str, ...]

    def __init__(self, base_layer: nn.Module, site: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.site = site
        self.kind = site_kind(site, base_layer)
        self.in_features = self.kind.in_features(base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._before_merge: tuple[nn.Parameter, nn.Parameter | None] | None = None

    @abstractmethod
    def create(self, adapter_name: str, config: Any) -> None:
        """Make the parameters of a new adapter, at the identity; δ excepted."""

    @abstractmethod
    def change(self, adapter_name: str, x: Tensor) -> Tensor:
        """T(x) without δ, in the dtype of x."""

    @abstractmethod
    def edit_without_shift(self, adapter_name: str) -> Edit:
        """The adapter's parameters as an ``Edit``, without δ."""

    @property
    def shifts(self) -> nn.ParameterDict:
        """Adapter → δ: (k,), for the adapters that have one."""
        shifts = getattr(self, f"{self.prefix}delta")
        assert isinstance(shifts, nn.ParameterDict)
        return shifts

    def update_layer(self, adapter_name: str, config: FeatureConfig) -> None:
        """Add an adapter to this site; ``set_adapter`` makes it active."""
        self.create(adapter_name, config)
        if config.bias == "shift":
            self.shifts[adapter_name] = nn.Parameter(torch.zeros(self.in_features))
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def adopt(self, adapter_name: str, owner: FeatureLayer) -> None:
        """Use the parameters of ``owner`` for ``adapter_name``: the same objects, trained together."""
        for name in self.adapter_layer_names:
            if adapter_name in getattr(owner, name):
                getattr(self, name)[adapter_name] = getattr(owner, name)[adapter_name]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the adapter of this site; raises ``InputError`` if more than one of the names has one here."""
        self.only_one([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def only_one(self, adapter_names: Iterable[str]) -> str | None:
        """The one of ``adapter_names`` that this site has; raises ``InputError`` if it has several."""
        here = self._get_available_adapters()
        found = [name for name in dict.fromkeys(adapter_names) if name in here]
        if len(found) > 1:
            listed = "' and '".join(found)
            raise InputError(f"site '{self.site}': adapters '{listed}' would act together; keep one of them active")
        return found[0] if found else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``W T(x) + c``; ``W x + c`` while adapters are disabled, which, as in PEFT, takes a merge back for good."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        name = None if self.disable_adapters or self.merged else self.only_one(self.active_adapters)
        if name is not None:
            x = self.change(name, x)
            if name in self.shifts:
                x = x + self.kind.along_channels(self.shifts[name]).to(x.dtype)
        return self.base_layer(x, *args, **kwargs)

    def edit(self, adapter_name: str) -> Edit:
        """The adapter's parameters as plain float64 arrays."""
        edit = self.edit_without_shift(adapter_name)
        delta = to_numpy(self.shifts[adapter_name]) if adapter_name in self.shifts else None
        return Edit(edit.lam, edit.input_low_rank, delta)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the active adapter, or the one of ``adapter_names``, into the site.

        Computed in float64 and cast once.  The site gets parameters of its own, so a weight tied to the embedding
        leaves the embedding as it is; the ones before are kept for ``unmerge``.  A site without a bias gains one if
        the adapter has δ, which ``from_pretrained`` of an architecture without that bias would not read back.

        safe_merge: refuse a fold that is not finite, before anything is changed.

        Raises ``PlanError`` where the fold is not exact or the weight is quantised, ``EditError`` for a low rank
        before a grouped convolution or a fold that is not finite, ``InputError`` for more than one adapter.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        name = self.only_one([*self.merged_adapters, *wanted])
        if name is None or self.merged:
            return
        layer: Any = self.get_base_layer()
        if not layer.weight.is_floating_point():
            raise PlanError(f"site '{self.site}': its weight is quantised ({layer.weight.dtype}); merge before that")
        edit = self.edit(name)
        weight, bias = self.kind.fold(self.site, layer, edit)
        new_weight = _parameter(weight, layer.weight)
        new_bias = layer.bias
        if edit.delta is not None:
            assert bias is not None
            new_bias = _parameter(bias, layer.weight if layer.bias is None else layer.bias)
        if safe_merge and not all(p is None or bool(torch.isfinite(p).all()) for p in (new_weight, new_bias)):
            raise EditError(
                f"site '{self.site}': the fold of adapter '{name}' holds NaN or infinity in {new_weight.dtype}; "
                "the training diverged, or the dtype is too small"
            )
        self._before_merge = (layer.weight, layer.bias)
        layer.weight, layer.bias = new_weight, new_bias
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the parameters from before ``merge`` back: the same objects, not one bit changed."""
        if self._before_merge is None:
            return
        layer: Any = self.get_base_layer()
        for parameter in self._before_merge:
            if parameter is not None:  # a model that was moved or cast while merged did not take these with it
                parameter.data = parameter.data.to(layer.weight.device, layer.weight.dtype)
        layer.weight, layer.bias = self._before_merge
        self._before_merge = None
        self.merged_adapters.clear()


def _parameter(array: Array, like: Tensor) -> nn.Parameter:
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(like.device, like.dtype)
    return nn.Parameter(tensor, requires_grad=like.requires_grad)
