"""The architectures that the placements are tried on: MiniLM and EfficientNet-Lite0 with their real weights, the others
tiny and randomly initialised.

Every linear layer and convolution that runs is adapted, the head included, and a mixture's router; the weights of its
experts are one tensor of three axes and no layer of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.pytorch_utils import Conv1D

from deployfa.assets import fetch
from deployfa.training.samples import TEXT

__all__ = ["ARCHITECTURES", "Architecture"]

Feeds = dict[str, torch.Tensor]
_LAYERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)
_ROUTERS = {"MixtralTopKRouter", "Qwen2MoeTopKRouter"}
_VOCABULARY, _END = 100, 99
_TEXT = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True, eq=False)
class Architecture:
    """``build()`` makes the model, ``feeds(rows)`` its inputs, ``output`` is what is compared,
    ``None`` the tensor that the model returns.

    dynamic: input → axis → name of the dimension.  rows: how many the comparison takes; the noise of few numbers
    scatters.
    """

    build: Callable[[], nn.Module]
    feeds: Callable[[int], Feeds]
    dynamic: Mapping[str, Mapping[int, str]]
    output: str | None
    rows: int = 32

    def model(self) -> nn.Module:
        return self.build().eval()

    @staticmethod
    def is_layer(module: nn.Module) -> bool:
        return isinstance(module, _LAYERS) or type(module).__name__ in _ROUTERS


def _random(kind: Callable[[Any], nn.Module], config: Any) -> Callable[[], nn.Module]:
    """A builder of ``kind(config)`` with weights large enough that no layer is nearly linear or nearly idle.

    Every other vector (bias, scale of a norm) stays as its module makes it: the zeros and ones that all models start
    with are the initializers that exporters merge.
    """

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = kind(config)
        generator = torch.Generator().manual_seed(1)

        def noise(like: torch.Tensor, scale: float) -> torch.Tensor:
            return scale * torch.randn(like.shape, generator=generator)

        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                if parameter.dim() > 1:
                    fan_in = parameter[0].numel() if parameter.dim() != 3 else parameter.shape[-1]
                    parameter.copy_(noise(parameter, fan_in**-0.5))
                elif parameter.dim() == 1 and number % 2:
                    parameter.add_(noise(parameter, 0.2))
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.add_(noise(module.running_mean, 0.2))
                    module.running_var.mul_(noise(module.running_var, 0.4).exp())
        return model

    return build


def _text(rows: int, names: Sequence[str] = _TEXT[:2]) -> Feeds:
    """Rows of 3 to 9 tokens (5, for two rows), padded on the right with token 0; each ends with the token ``_END``."""
    generator = torch.Generator().manual_seed(2)
    length = 5 if rows == 2 else 9
    ids = torch.randint(3, _END, (rows, length), generator=generator)
    lengths = torch.randint(3, length + 1, (rows, 1), generator=generator)
    position = torch.arange(length)
    ids = torch.where(position == lengths - 1, _END, torch.where(position < lengths, ids, 0))
    feeds = {"input_ids": ids, "attention_mask": (position < lengths).long(), "token_type_ids": ids % 2}
    return {name: feeds[name] for name in names}


def _translation(rows: int) -> Feeds:
    generator = torch.Generator().manual_seed(3)
    return _text(rows) | {
        "decoder_input_ids": torch.randint(3, _END, (rows, 4 if rows == 2 else 6), generator=generator)
    }


def _images(size: int, name: str = "pixel_values") -> Callable[[int], Feeds]:
    return lambda rows: {name: torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(4))}


def _sound(rows: int) -> Feeds:
    return {"input_features": torch.randn(rows, 8, 40, generator=torch.Generator().manual_seed(5))}


def _sentences(
    kind: Callable[[Any], nn.Module], config: Any, output: str = "logits", *, kinds: bool = False
) -> Architecture:
    """kinds: whether the model has embeddings for the kind of a token (sentence A or B)."""
    feeds = _TEXT if kinds else _TEXT[:2]
    return Architecture(_random(kind, config), lambda rows: _text(rows, feeds), dict.fromkeys(feeds, TEXT), output)


def _pictures(kind: Callable[[Any], nn.Module], config: Any, output: str = "logits") -> Architecture:
    return Architecture(_random(kind, config), _images(32), {"pixel_values": {0: "batch"}}, output)


def _minilm() -> nn.Module:
    model: nn.Module = tf.AutoModel.from_pretrained(str(fetch("minilm")), dtype=torch.float32)
    return model


def _efficientnet_lite0() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    # the weights do not depend on the size of the image; at 224 the numpy evaluation takes minutes
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=64)
    weights = fetch("efficientnet-lite0") / "efficientnet-lite0-57934424.pth"
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model


_TOKENS: dict[str, Any] = {"vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LABELS: dict[str, Any] = {**_TOKENS, "num_labels": 16}
_SIZE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_DECODER: dict[str, Any] = {**_TOKENS, **_SIZE, "max_position_embeddings": 64, "use_cache": False}
_GPT2: dict[str, Any] = {
    **_LABELS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "use_cache": False,
}  # fmt: skip
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2}
_MIXTURE: dict[str, Any] = {**_GROUPED, "num_experts_per_tok": 2}
_T5: dict[str, Any] = {
    "vocab_size": _VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "use_cache": False,
}  # fmt: skip
_IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8, "num_labels": 16}

ARCHITECTURES: dict[str, Architecture] = {
    "MiniLM-L6 (real weights)": Architecture(
        _minilm,
        lambda rows: _text(rows, _TEXT),
        dict.fromkeys(_TEXT, TEXT),
        "last_hidden_state",
        rows=16,
    ),
    "BERT": _sentences(tf.BertForSequenceClassification, tf.BertConfig(**_LABELS, **_SIZE), kinds=True),
    "RoBERTa": _sentences(
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig(**_LABELS, **_SIZE, type_vocab_size=1, max_position_embeddings=66),
    ),
    "DistilBERT": _sentences(
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig(**_LABELS, dim=32, hidden_dim=64, n_layers=2, n_heads=4),
    ),
    # one layer called three times: every call reads one weight
    "ALBERT": _sentences(
        tf.AlbertForSequenceClassification,
        tf.AlbertConfig(**{**_LABELS, **_SIZE, "num_hidden_layers": 3}, embedding_size=16),
        kinds=True,
    ),
    # its relative positions are projected by layers whose input is a constant
    "DeBERTa-v2": _sentences(
        tf.DebertaV2ForSequenceClassification,
        tf.DebertaV2Config(
            **_LABELS, **_SIZE, type_vocab_size=0, relative_attention=True, pos_att_type=["p2c", "c2p"],
            position_buckets=8, max_relative_positions=16, share_att_key=False,
        ),
    ),
    "ELECTRA": _sentences(
        tf.ElectraForSequenceClassification, tf.ElectraConfig(**_LABELS, **_SIZE, embedding_size=16), kinds=True
    ),
    "ModernBERT": _sentences(
        tf.ModernBertForSequenceClassification, tf.ModernBertConfig(**_LABELS, **_SIZE, cls_token_id=1, sep_token_id=2)
    ),
    # Conv1D sites read a (batch * sequence, k) view
    "GPT-2 (classifier)": _sentences(tf.GPT2ForSequenceClassification, tf.GPT2Config(**_GPT2)),
    "GPT-2 (tied head)": _sentences(tf.GPT2LMHeadModel, tf.GPT2Config(**_GPT2)),
    "OPT (tied head)": _sentences(
        tf.OPTForCausalLM,
        tf.OPTConfig(
            **_TOKENS, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=16, use_cache=False,
        ),
    ),
    "Llama (grouped queries)": _sentences(
        tf.LlamaForCausalLM, tf.LlamaConfig(**_GROUPED, tie_word_embeddings=False)
    ),
    "Llama (tied head)": _sentences(tf.LlamaForCausalLM, tf.LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
    "Qwen2": _sentences(tf.Qwen2ForCausalLM, tf.Qwen2Config(**_GROUPED)),
    "Gemma": _sentences(tf.GemmaForCausalLM, tf.GemmaConfig(**_DECODER, num_key_value_heads=1, head_dim=8)),
    "Phi": _sentences(tf.PhiForCausalLM, tf.PhiConfig(**_DECODER)),
    "Mixtral": _sentences(tf.MixtralForCausalLM, tf.MixtralConfig(**_MIXTURE, num_local_experts=4)),
    "Qwen2-MoE": _sentences(
        tf.Qwen2MoeForCausalLM,
        tf.Qwen2MoeConfig(**_MIXTURE, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40),
    ),
    "T5 (encoder)": _sentences(tf.T5EncoderModel, tf.T5Config(**_T5), "last_hidden_state"),
    "T5 (gated, with decoder)": Architecture(
        _random(tf.T5ForConditionalGeneration, tf.T5Config(**_T5, feed_forward_proj="gated-gelu")),
        _translation,
        {"input_ids": TEXT, "attention_mask": TEXT, "decoder_input_ids": {0: "batch", 1: "decoder_sequence"}},
        "logits",
    ),
    "ViT": _pictures(tf.ViTForImageClassification, tf.ViTConfig(**_SIZE, **_IMAGE)),
    "DINOv2": _pictures(
        tf.Dinov2ForImageClassification,
        tf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, **_IMAGE),
    ),
    "CLIP (vision)": _pictures(
        tf.CLIPVisionModelWithProjection,
        tf.CLIPVisionConfig(**_SIZE, image_size=32, patch_size=8, projection_dim=16),
        "image_embeds",
    ),
    "CLIP (text)": _sentences(
        tf.CLIPTextModelWithProjection,
        tf.CLIPTextConfig(
            **_SIZE, vocab_size=_VOCABULARY, projection_dim=16, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=_END,
        ),
        "text_embeds",
    ),
    "Swin": _pictures(
        tf.SwinForImageClassification,
        tf.SwinConfig(
            image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=16
        ),
    ),
    "ConvNeXt": _pictures(
        tf.ConvNextForImageClassification,
        tf.ConvNextConfig(
            hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, image_size=32, layer_scale_init_value=1.0, num_labels=16
        ),
    ),
    "ResNet": _pictures(
        tf.ResNetForImageClassification,
        tf.ResNetConfig(
            embedding_size=16, hidden_sizes=[32, 64], depths=[1, 2], layer_type="bottleneck", num_labels=16
        ),
    ),
    "EfficientNet-Lite0 (real weights)": Architecture(
        _efficientnet_lite0, _images(64, "inputs"), {"inputs": {0: "batch"}}, None, rows=8
    ),
    "Whisper (encoder)": Architecture(
        _random(
            WhisperEncoder,
            tf.WhisperConfig(
                d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, num_mel_bins=8,
                max_source_positions=20, decoder_start_token_id=1, **_TOKENS,
            ),
        ),
        _sound,
        {"input_features": {0: "batch"}},
        "last_hidden_state",
    ),
}  # fmt: skip
