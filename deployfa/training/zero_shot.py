"""CLIP's picture tower with a head that its text tower writes: class names are all it needs to know a class.

Source: A. Radford et al., Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from deployfa.errors import InputError

__all__ = ["TEMPLATE", "CLIPZeroShotClassifier", "load_zero_shot"]

TEMPLATE = "a photo of a {label}."


class CLIPZeroShotClassifier(transformers.PreTrainedModel):
    """``logits = W x / ‖x‖``, x the projected picture, W: (labels, projection) the scaled embeddings of the labels:
    the ``logits_per_image`` of the whole CLIP, without its text tower."""

    config_class = transformers.CLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: Any, clip: Any, weights: torch.Tensor) -> None:
        super().__init__(config)
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection
        self.classifier = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
        self.classifier.weight = nn.Parameter(weights.clone())

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **_: Any
    ) -> ImageClassifierOutput:
        embedded = self.visual_projection(self.vision_model(pixel_values=pixel_values).pooler_output)
        logits = self.classifier(embedded / embedded.norm(dim=-1, keepdim=True))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def load_zero_shot(name: str | Path, labels: Sequence[str]) -> CLIPZeroShotClassifier:
    """CLIP ``name``, a directory or hub id, as a classifier of ``labels``, float32.

    Raises what ``from_pretrained`` raises, and ``InputError`` for a model that is no CLIP.
    """
    clip: Any = transformers.AutoModel.from_pretrained(str(name), dtype=torch.float32, trust_remote_code=False)
    if not isinstance(clip, transformers.CLIPModel):
        raise InputError(f"'{name}' is a {type(clip).__name__}; pass the directory of a CLIPModel with --model")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
    clip.eval()
    sentences = [TEMPLATE.format(label=label) for label in labels]
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        read = clip.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        embedded = clip.text_projection(read.pooler_output)
        weights = clip.logit_scale.exp() * embedded / embedded.norm(dim=-1, keepdim=True)
    config: Any = clip.config.vision_config
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    return CLIPZeroShotClassifier(config, clip, weights)
