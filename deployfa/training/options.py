"""What ``deployfa train`` was asked to do, checked before anything long starts."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from deployfa.errors import InputError

__all__ = ["METHODS", "FitOptions", "Method"]

Method = Literal["vefa", "lorfa", "lora", "full", "head"]
METHODS: tuple[Method, ...] = ("vefa", "lorfa", "lora", "full", "head")


class FitOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Hyperparameters.  ``alpha`` defaults to ``rank`` for LoRFA and to ``2 * rank`` for LoRA, as in the paper's code
    and PEFT's examples; ``sites`` is PEFT's ``target_modules``; ``shift`` adds δ; ``precision="auto"`` is bf16 where
    the processor multiplies it natively, else fp32."""

    method: Method
    learning_rate: float
    epochs: float = 2.0
    batch_size: int = 32
    rank: int = 8
    alpha: float | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    max_length: int = 128
    sites: str | list[str] = "all-linear"
    shift: bool = False
    share_input: bool = False

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs", "batch_size", "rank", "max_length"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be above 0 and finite")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha):
            raise InputError(f"alpha is {self.alpha}; it must be finite and not 0, or nothing is trained")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; it must lie in [0, 2**32)")

    @property
    def scaled_alpha(self) -> float:
        if self.alpha is not None:
            return self.alpha
        return float(self.rank * (2 if self.method == "lora" else 1))
