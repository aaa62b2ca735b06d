"""PEFT checkpoints that are no edits of layers: which one it is, why, and what to do instead.  As of PEFT 0.21."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deployfa.errors import AdapterFormatError

__all__ = ["MERGE", "TRAIN", "refuse_config", "refuse_leftover", "refuse_method"]

MERGE = "merge it with PEFT's merge_and_unload() and export the merged model"
TRAIN = "it cannot be merged either; train vefa, lorfa or lora instead"

#: Methods that PEFT can merge into the weights.
_MERGEABLE = {
    "ADALORA": "AdaLoRA",
    "ADAMSS": "AdaMSS",
    "BEFT": "BEFT",
    "BOFT": "BOFT",
    "BONE": "Bone",
    "C3A": "C3A",
    "DEFT": "DEFT",
    "DELORA": "DeLoRA",
    "FOURIERFT": "FourierFT",
    "FROD": "FRoD",
    "GLORA": "GLoRA",
    "GRALORA": "GraLoRA",
    "HIRA": "HiRA",
    "HRA": "HRA",
    "LILY": "Lily",
    "LN_TUNING": "LayerNorm tuning",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "MISS": "MiSS",
    "OFT": "OFT",
    "OSF": "OSF",
    "PEANUT": "PEANuT",
    "PSOFT": "PSOFT",
    "PVERA": "PVeRA",
    "RANDLORA": "RandLoRA",
    "ROAD": "RoAd",
    "SHIRA": "SHiRA",
    "SUPERTUNING": "Supertuning",
    "TINYLORA": "TinyLoRA",
    "TRAINABLE_TOKENS": "trainable tokens",
    "UNILORA": "Uni-LoRA",
    "VBLORA": "VB-LoRA",
    "VERA": "VeRA",
    "WAVEFT": "WaveFT",
}
#: Methods that leave every layer as it is: name, and what they do instead.
_BESIDE = {
    "ADAPTION_PROMPT": ("adaption prompt", "adds trained tokens to the attention"),
    "CARTRIDGE": ("Cartridge", "adds a trained key-value cache"),
    "CPT": ("CPT", "adds trained tokens to the input"),
    "MULTITASK_PROMPT_TUNING": ("multitask prompt tuning", "adds trained tokens to the input"),
    "POLY": ("Poly", "mixes its parts anew for every task"),
    "PREFIX_TUNING": ("prefix tuning", "adds trained keys and values to the attention"),
    "PROMPT_TUNING": ("prompt tuning", "adds trained tokens to the input"),
    "P_TUNING": ("p-tuning", "adds trained tokens to the input"),
    "SHADOW": ("Shadow", "runs a second model beside the base"),
    "XLORA": ("X-LoRA", "mixes its LoRAs anew for every input"),
}
#: Options of LoRA that change what it computes at inference: what they do, and the way out.
_VARIANTS = {
    "use_dora": ("is a DoRA checkpoint, whose change depends on the base weights", MERGE),
    "alora_invocation_tokens": ("is an aLoRA checkpoint, which acts only after its invocation tokens", TRAIN),
    "arrow_config": ("is a LoRA with arrow_config, which routes between adapters", TRAIN),
    "kasa_config": ("is a LoRA with kasa_config, which truncates the base weights", MERGE),
    "layer_replication": ("is a LoRA with layer_replication, which stacks copies of the base's layers", TRAIN),
    "monteclora_config": ("is a LoRA with monteclora_config, which is no plain s B A", MERGE),
    "target_parameters": ("is a LoRA with target_parameters, which changes parameters of no single layer", MERGE),
    "use_bdlora": ("is a LoRA with use_bdlora, which is no plain s B A", MERGE),
    "use_qalora": ("is a LoRA with use_qalora, which is no plain s B A", TRAIN),
    "velora_config": ("is a LoRA with velora_config, which keeps more than A and B", MERGE),
}
#: Ways to start LoRA that take its first product out of the base weights: A and B belong to what is left of them.
_RESIDUAL = ("corda", "loftq", "lora_ga", "olora", "pissa")


def refuse_method(where: str, method: str, known: Iterable[str]) -> AdapterFormatError:
    """The error for a checkpoint of a PEFT ``method`` that is none of ``known``."""
    reads = f"deployfa reads {', '.join(sorted(name.lower() for name in known))}"
    if method in _MERGEABLE:
        return AdapterFormatError(f"'{where}' is a PEFT {_MERGEABLE[method]} checkpoint; {reads}; {MERGE}")
    if method in _BESIDE:
        name, does = _BESIDE[method]
        return AdapterFormatError(f"'{where}' is a PEFT {name} checkpoint, which {does} and edits no layer; {TRAIN}")
    return AdapterFormatError(f"'{where}' is a PEFT {method or 'unnamed'} checkpoint; {reads}; if PEFT can, {MERGE}")


def refuse_config(where: str, config: Mapping[str, Any]) -> None:
    """Raise ``AdapterFormatError`` if a LoRA's config makes it more than s B A on the base weights."""
    for option, (what, way_out) in _VARIANTS.items():
        if config.get(option):
            raise AdapterFormatError(f"'{where}' {what}; {way_out}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
        raise AdapterFormatError(
            f"'{where}' is a LoRA that began with init_lora_weights='{start}', which changes the base weights; save it "
            f"with path_initial_model_for_weight_conversion, or {MERGE}"
        )


def refuse_leftover(where: str, tensor: str, method: str, config: Mapping[str, Any]) -> AdapterFormatError:
    """The error for a ``tensor`` that is neither part of an edit nor of a module in ``modules_to_save``."""
    bias = config.get("bias")
    what = f"belongs to no {method} site"
    if tensor.endswith(".lora_B.bias"):
        what = "comes from lora_bias=True, a shift of the output"
    elif ".lora_embedding_" in tensor:
        what = "is LoRA of an embedding, which has no input features to edit"
    elif ".trainable_tokens_" in tensor or ".token_adapter." in tensor:
        what = "comes from trainable_token_indices, which trains rows of an embedding"
    elif ".base_layer." in tensor and "lora_" in tensor:
        what = "is LoRA of a projection inside torch.nn.MultiheadAttention, which is no layer of its own"
    elif tensor.endswith(".bias") and bias not in (None, "none"):
        what = f"comes from bias='{bias}', which trains biases of the base"
    elif tensor.endswith(".weight"):
        what = "is a whole weight that modules_to_save does not name, as of a resized embedding"
    return AdapterFormatError(f"'{where}': tensor '{tensor}' {what}; {MERGE}")
