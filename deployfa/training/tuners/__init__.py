"""VeFA and LoRFA as methods of Hugging Face PEFT; importing this makes PEFT know them.

``get_peft_model(model, VeFAConfig(target_modules="all-linear"))``, ``save_pretrained``, ``PeftModel.from_pretrained``
and ``merge_and_unload`` then work as for PEFT's own methods.
"""

from __future__ import annotations

from peft.utils import register_peft_method

from deployfa.training.tuners.config import LoRFAConfig, VeFAConfig
from deployfa.training.tuners.lorfa import LoRFALayer, LoRFAModel
from deployfa.training.tuners.peft_type import add_member
from deployfa.training.tuners.vefa import VeFALayer, VeFAModel

__all__ = ["LoRFAConfig", "LoRFALayer", "LoRFAModel", "VeFAConfig", "VeFALayer", "VeFAModel"]


def _register() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    for name, config, model in (("vefa", VeFAConfig, VeFAModel), ("lorfa", LoRFAConfig, LoRFAModel)):
        # PEFT refuses a second registration, which a reloaded module would be.
        if add_member(name.upper()) not in PEFT_TYPE_TO_TUNER_MAPPING:
            register_peft_method(name=name, config_cls=config, model_cls=model)


_register()
