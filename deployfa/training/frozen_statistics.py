"""Keep what a batch normalisation has learnt while an adapter trains around it.

In training mode a batch normalisation normalises by the batch at hand and moves its running statistics.  Those belong
to the base: the deployed graph has the base's own, so an adapter must be trained with them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["freeze_statistics"]


def freeze_statistics(model: nn.Module) -> int:
    """Let every norm with running statistics use them, in training mode too; how many there are.

    At every call, because the Trainer puts the whole model into training mode at every step.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    found = [norm for norm in norms if norm.track_running_stats]
    for norm in found:
        norm.register_forward_pre_hook(_use_own)
    return len(found)


def _use_own(norm: nn.Module, _: Any) -> None:
    norm.eval()
