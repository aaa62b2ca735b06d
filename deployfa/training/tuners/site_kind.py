"""What VeFA and LoRFA have to know of the layer they change: where its input's channels are, and how an edit folds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deployfa.edits import Array, Edit, fold_conv, fold_matrix
from deployfa.errors import PlanError, SiteError

__all__ = ["SiteKind", "check_site", "site_kind", "to_numpy"]

Folded = tuple[Array, Array | None]


class SiteKind(Protocol):
    """One way for a layer to read its k input channels."""

    @property
    def name(self) -> str:
        """``"dense"`` or ``"conv"``."""

    def in_features(self, layer: Any) -> int:
        """k."""

    def along_channels(self, vector: Tensor) -> Tensor:
        """(k,) in the shape that broadcasts over the channels of an input."""

    def mix_channels(self, x: Tensor, matrix: Tensor) -> Tensor:
        """``matrix x`` over the channels of x; matrix: (out, k)."""

    def fold(self, site: str, layer: Any, edit: Edit) -> Folded:
        """The weight, as the layer lays it out, and the bias with ``edit`` in them; float64."""


@dataclass(frozen=True)
class _Dense:
    """``torch.nn.Linear``, W: (d, k), and transformers' ``Conv1D``, W: (k, d).  Channels are the last axis."""

    transposed: bool
    name: str = "dense"

    def in_features(self, layer: Any) -> int:
        return int(layer.weight.shape[0] if self.transposed else layer.in_features)

    def along_channels(self, vector: Tensor) -> Tensor:
        return vector

    def mix_channels(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix)

    def fold(self, site: str, layer: Any, edit: Edit) -> Folded:
        weight = to_numpy(layer.weight)
        bias = None if layer.bias is None else to_numpy(layer.bias)
        folded, folded_bias = fold_matrix(edit, weight.T if self.transposed else weight, bias)
        return np.ascontiguousarray(folded.T) if self.transposed else folded, folded_bias


@dataclass(frozen=True)
class _Conv:
    """``torch.nn.Conv2d``, W: (d, k/groups, height, width).  Channels are axis -3, with or without a batch axis."""

    name: str = "conv"

    def in_features(self, layer: Any) -> int:
        return int(layer.in_channels)

    def along_channels(self, vector: Tensor) -> Tensor:
        return vector[:, None, None]

    def mix_channels(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.conv2d(x, matrix[:, :, None, None])

    def fold(self, site: str, layer: Any, edit: Edit) -> Folded:
        # Circular, reflected and replicated padding copy δ along with x; zeros are put in after δ was added.
        if edit.delta is not None and layer.padding_mode == "zeros" and _pads(layer):
            raise PlanError(
                f"site '{site}': δ does not fold through zero padding, the border sees zeros in its place; "
                "keep the adapter unmerged, or train with bias='none'"
            )
        bias = None if layer.bias is None else to_numpy(layer.bias)
        return fold_conv(edit, to_numpy(layer.weight), bias, groups=layer.groups)


_KINDS: dict[type[nn.Module], SiteKind] = {
    nn.Linear: _Dense(transposed=False),
    Conv1D: _Dense(transposed=True),
    nn.Conv2d: _Conv(),
}


def site_kind(site: str, layer: nn.Module) -> SiteKind:
    """The kind of ``layer``; raises ``SiteError`` if it is none that can be adapted."""
    for layer_type, kind in _KINDS.items():
        if isinstance(layer, layer_type):
            return kind
    raise SiteError(
        f"site '{site}' is a {type(layer).__name__}; target torch.nn.Linear, torch.nn.Conv2d or transformers' Conv1D"
    )


def check_site(site: str, layer: nn.Module, parent: nn.Module) -> None:
    """Raise ``SiteError`` if ``layer`` is of no known kind, or if ``parent`` reads its weight without calling it.

    An adapter on such a layer would train nothing, or would be left out of inference, without a word.
    """
    site_kind(site, layer)
    if isinstance(parent, nn.MultiheadAttention):
        raise SiteError(f"site '{site}': torch.nn.MultiheadAttention reads its weight and never calls it; exclude it")
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise SiteError(
            f"site '{site}': torch.nn.TransformerEncoderLayer's fast path skips it in inference; "
            "call torch.backends.mha.set_fastpath_enabled(False) first"
        )


def to_numpy(tensor: Tensor) -> Array:
    """``tensor`` as float64, which holds every smaller float exactly; numpy has no bfloat16."""
    return np.asarray(tensor.detach().to("cpu", torch.float64).numpy())


def _pads(layer: nn.Conv2d) -> bool:
    if layer.padding == "same":
        return any(step * (size - 1) > 0 for step, size in zip(layer.dilation, layer.kernel_size, strict=True))
    return layer.padding != "valid" and any(int(p) > 0 for p in layer.padding)
