"""PEFT's tuner for both methods: puts the layers in, lets sites share, and merges all sites or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from deployfa.errors import SiteError
from deployfa.training.tuners.layer import FeatureLayer
from deployfa.training.tuners.sharing import check_shared_values, share_parameters
from deployfa.training.tuners.site_kind import check_site, site_kind

__all__ = ["FeatureModel"]


class FeatureModel(BaseTuner):
    """What ``VeFAModel`` and ``LoRFAModel`` have in common.  ``layer_classes``: kind of site → layer."""

    layer_classes: ClassVar[dict[str, type[FeatureLayer]]]
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    peft_config: dict[str, Any]

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Look at every target before the first is replaced, so that a refusal leaves the model as it was."""
        _maybe_include_all_linear_layers(peft_config, model)
        adapted: list[str] = []  # by an earlier adapter; what is inside of these is no target
        for site, module in model.named_modules():
            if not site or any(site.startswith(f"{outer}.") for outer in adapted):
                continue
            if isinstance(module, BaseTunerLayer):
                adapted.append(site)
            if isinstance(module, self.tuner_layer_cls) or not self._check_target_module_exists(peft_config, site):
                continue
            if isinstance(module, BaseTunerLayer):
                raise SiteError(f"site '{site}' has a {type(module).__name__} already; merge that adapter first")
            check_site(site, module, model.get_submodule(site.rpartition(".")[0]))

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, FeatureLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer_class = self.layer_classes[site_kind(current_key, target).name]
        layer = layer_class(target, current_key)
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    # Sharing

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._share(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT calls this last, after loading too; casting, and loading onto the meta device, make new parameters.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self._share(adapter_name)

    def _share(self, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        if config.share_input:
            share_parameters(self.model, adapter_name, config.share_groups)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_shared_values(model, remapped)
        return remapped

    # δ.  PEFT reads config.bias as LoRA's, "none", "all" or "lora_only": which of the base's own biases to train.
    # Our "shift" is a parameter of the layer like any other and leaves the base's biases alone.

    @contextmanager
    def _as_if_without_bias(self) -> Iterator[None]:
        configs = self.peft_config
        self.peft_config = {name: replace(config, bias="none") for name, config in configs.items()}
        try:
            yield
        finally:
            self.peft_config = configs

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        with self._as_if_without_bias():
            super()._mark_only_adapters_as_trainable(model)

    def disable_adapter_layers(self) -> None:
        """Switch every adapter off: the model is the base again, bit for bit."""
        with self._as_if_without_bias():
            super().disable_adapter_layers()

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        """Nothing to check: PEFT allows one adapter with a bias, because those train the base's; ours do not."""

    # Merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold the adapter into every site, or into none: a site's refusal takes back the ones before it.

        Raises what ``FeatureLayer.merge`` raises.
        """
        layers = [m for m in self.model.modules() if isinstance(m, FeatureLayer) and not m.merged]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except Exception:
            for layer in layers:
                layer.unmerge()
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:  # before the first layer is taken out, so that a refusal leaves the model whole
            self.merge_adapter(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
