"""LoRFA: ``T(x) = x + s · B (A x) [+ δ]``, ``s = alpha / r``.  Source: arXiv 2510.19155v1."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deployfa.edits import Edit, LowRank
from deployfa.training.tuners.config import LoRFAConfig
from deployfa.training.tuners.layer import FeatureLayer
from deployfa.training.tuners.model import FeatureModel
from deployfa.training.tuners.site_kind import to_numpy

__all__ = ["LoRFAConv2d", "LoRFALayer", "LoRFALinear", "LoRFAModel"]


class LoRFALayer(FeatureLayer):
    """A: (r, k), drawn as LoRA's, and B: (k, r), 0 at the start, per adapter."""

    prefix = "lorfa_"
    adapter_layer_names = ("lorfa_A", "lorfa_B", "lorfa_delta")
    other_param_names = ("scaling", "dropout")
    lorfa_A: nn.ParameterDict
    lorfa_B: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, site: str) -> None:
        super().__init__(base_layer, site)
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}

    def create(self, adapter_name: str, config: LoRFAConfig) -> None:
        self.scaling[adapter_name] = config.alpha / config.r
        self.dropout[adapter_name] = config.dropout
        a = torch.empty(config.r, self.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.lorfa_A[adapter_name] = nn.Parameter(a)
        self.lorfa_B[adapter_name] = nn.Parameter(torch.zeros(self.in_features, config.r))

    def change(self, adapter_name: str, x: Tensor) -> Tensor:
        # Under autocast both products run in its dtype; the sum is in that of x.
        inner = F.dropout(x, self.dropout[adapter_name], self.training)
        for matrices in (self.lorfa_A, self.lorfa_B):
            inner = self.kind.mix_channels(inner, matrices[adapter_name].to(x.dtype))
        return torch.add(x, inner.to(x.dtype), alpha=self.scaling[adapter_name])

    def edit_without_shift(self, adapter_name: str) -> Edit:
        a, b = to_numpy(self.lorfa_A[adapter_name]), to_numpy(self.lorfa_B[adapter_name])
        return Edit(input_low_rank=LowRank(a, b, self.scaling[adapter_name]))


class LoRFALinear(LoRFALayer):
    """LoRFA on a dense layer; PEFT's ``"all-linear"`` knows adapted layers by this word in the class name."""


class LoRFAConv2d(LoRFALayer):
    """LoRFA on a convolution."""


class LoRFAModel(FeatureModel):
    """PEFT's tuner for LoRFA; made by ``peft.get_peft_model(model, LoRFAConfig(...))``."""

    prefix = "lorfa_"
    tuner_layer_cls = LoRFALayer
    layer_classes: ClassVar[dict[str, type[FeatureLayer]]] = {"dense": LoRFALinear, "conv": LoRFAConv2d}
