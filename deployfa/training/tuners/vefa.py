"""VeFA: ``T(x) = (1 + λ) ⊙ x [+ δ]``.  Source: arXiv 2510.19155."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from deployfa.edits import Edit
from deployfa.training.tuners.config import VeFAConfig
from deployfa.training.tuners.layer import FeatureLayer
from deployfa.training.tuners.model import FeatureModel
from deployfa.training.tuners.site_kind import to_numpy

__all__ = ["VeFAConv2d", "VeFALayer", "VeFALinear", "VeFAModel"]


class VeFALayer(FeatureLayer):
    """λ: (k,) per adapter, 0 at the start."""

    prefix = "vefa_"
    adapter_layer_names = ("vefa_lambda", "vefa_delta")
    vefa_lambda: nn.ParameterDict

    def create(self, adapter_name: str, config: VeFAConfig) -> None:
        self.vefa_lambda[adapter_name] = nn.Parameter(torch.zeros(self.in_features))

    def change(self, adapter_name: str, x: Tensor) -> Tensor:
        # x + λ x, not (1 + λ) x: in bfloat16 the sum 1 + λ has a step of 0.008, which would round a small λ away.
        return torch.addcmul(x, x, self.kind.along_channels(self.vefa_lambda[adapter_name]).to(x.dtype))

    def edit_without_shift(self, adapter_name: str) -> Edit:
        return Edit(lam=to_numpy(self.vefa_lambda[adapter_name]))


class VeFALinear(VeFALayer):
    """VeFA on a dense layer; PEFT's ``"all-linear"`` knows adapted layers by this word in the class name."""


class VeFAConv2d(VeFALayer):
    """VeFA on a convolution."""


class VeFAModel(FeatureModel):
    """PEFT's tuner for VeFA; made by ``peft.get_peft_model(model, VeFAConfig(...))``."""

    prefix = "vefa_"
    tuner_layer_cls = VeFALayer
    layer_classes: ClassVar[dict[str, type[FeatureLayer]]] = {"dense": VeFALinear, "conv": VeFAConv2d}
