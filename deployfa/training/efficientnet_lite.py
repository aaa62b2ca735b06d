"""EfficientNet-Lite as a model that transformers loads, saves and trains like its own.

Source of the network: the package efficientnet-lite-pytorch (M. Tan & Q. Le, arXiv 1905.11946; its Lite variants have
ReLU6 and no squeeze-and-excitation).  Importing this module registers it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from deployfa.errors import MissingExtraError

__all__ = ["EfficientNetLiteConfig", "EfficientNetLiteForImageClassification"]


class EfficientNetLiteConfig(PreTrainedConfig):
    """``variant``: the package's name of the network.  ``image_size``: in pixels, even sides; paddings depend on it."""

    model_type = "deployfa_efficientnet_lite"

    variant: str = "efficientnet-lite0"
    image_size: int = 224
    num_channels: int = 3
    dropout_rate: float = 0.2
    drop_connect_rate: float = 0.0
    initializer_range: float = 0.02


class EfficientNetLiteForImageClassification(PreTrainedModel):
    """(batch, 3, image_size, image_size) → ``logits`` (batch, num_labels)."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise MissingExtraError("efficientnet-lite-pytorch", "train", "an EfficientNet-Lite") from error
        self.network = EfficientNet.from_name(
            config.variant,
            image_size=config.image_size,
            dropout_rate=config.dropout_rate,
            drop_connect_rate=config.drop_connect_rate,
        )
        features = self.network._fc.in_features
        # a head of our own, by the name that every classifier of transformers gives it
        del self.network._fc
        self.dropout = nn.Dropout(config.dropout_rate)
        self.classifier = nn.Linear(features, config.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **_: Any
    ) -> ImageClassifierOutput:
        pooled = self.network.extract_features(pixel_values).mean((2, 3))
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModelForImageClassification.register(EfficientNetLiteConfig, EfficientNetLiteForImageClassification, exist_ok=True)
