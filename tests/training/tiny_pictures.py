"""Tiny random vision models as directories, and pictures of two kinds for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import nn

SIZE = 32
_BODY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_IMAGE: dict[str, Any] = {"image_size": SIZE, "patch_size": 8}
_VISION = {**_BODY, **_IMAGE, "intermediate_size": 64}
#: recipe → what makes the model
MODELS: dict[str, Callable[[], Any]] = {
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**_VISION, num_labels=5)),
    "dinov2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**_BODY, **_IMAGE, mlp_ratio=2, num_labels=5)),
    "clip": lambda: tf.CLIPForImageClassification(
        tf.CLIPConfig(
            vision_config=_VISION, text_config={**_BODY, "intermediate_size": 64, "vocab_size": 40}, num_labels=5
        )
    ),
    "resnet": lambda: tf.ResNetForImageClassification(
        tf.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], layer_type="bottleneck", num_labels=5)
    ),
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": SIZE, "width": SIZE}},
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 36},
        "crop_size": {"height": SIZE, "width": SIZE},
    },
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
    },
    "resnet": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": SIZE}, "crop_pct": 0.875},
}


def save_tiny(name: str, folder: Path) -> Path:
    """The directory of a model of five labels whose weights are large enough that no layer is idle."""
    torch.manual_seed(0)
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(0.2 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.mul_((0.4 * torch.randn(module.running_var.shape, generator=generator)).exp())
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name]))
    return folder


def save_pictures(file: Path, count: int = 24) -> Path:
    """Lying and standing stripes."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 2
    images = random.integers(0, 90, (count, 24, 24, 3))
    for image, label in zip(images, labels, strict=True):
        image[(slice(None), slice(None, None, 4)) if label else slice(None, None, 4)] += 160
    np.savez(file, images=images.astype(np.uint8), labels=labels, label_names=np.array(["lying", "standing"]))
    return file
