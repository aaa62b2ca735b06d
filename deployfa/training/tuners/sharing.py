"""Sites that receive the same tensor share their parameters: each site holds the same ``nn.Parameter`` objects.

The state dict still names every site, so a file has each site's own values, equal within a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deployfa.errors import EditError
from deployfa.training.tuners.layer import FeatureLayer

__all__ = ["check_shared_values", "share_parameters"]


def share_parameters(model: nn.Module, adapter_name: str, groups: Sequence[Sequence[str]]) -> None:
    """Within each parent module and group of names, sites of equal kind and in_features use the first one's.

    To be called again after PEFT replaces parameters (to cast them, or to load with ``low_cpu_mem_usage``).
    """
    for parent in model.modules():
        children = dict(parent.named_children())
        for group in groups:
            owners: dict[tuple[str, int], FeatureLayer] = {}
            for layer in (children.get(name) for name in group):
                if isinstance(layer, FeatureLayer) and adapter_name in layer._get_available_adapters():
                    owner = owners.setdefault((layer.kind.name, layer.in_features), layer)
                    if owner is not layer:
                        layer.adopt(adapter_name, owner)


def check_shared_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Raise ``EditError`` if ``values`` (parameter name → tensor) give a shared parameter two different values.

    ``load_state_dict`` would keep the last one without a word.
    """
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in values:
            other = first.setdefault(id(parameter), name)
            if not torch.equal(values[name], values[other]):
                raise EditError(
                    f"'{other}' and '{name}' differ in the file but share one parameter; load with share_input=False"
                )
