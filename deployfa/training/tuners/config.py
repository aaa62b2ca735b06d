"""What to adapt and how: ``VeFAConfig`` and ``LoRFAConfig``, saved by PEFT as ``adapter_config.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from deployfa.errors import InputError
from deployfa.training.tuners.peft_type import add_member

__all__ = ["FeatureConfig", "LoRFAConfig", "VeFAConfig"]

_SHARE_GROUPS = [
    ["query", "key", "value"],
    ["q_proj", "k_proj", "v_proj"],
    ["q_lin", "k_lin", "v_lin"],
    ["to_q", "to_k", "to_v"],
    ["gate_proj", "up_proj"],
]


@dataclass
class FeatureConfig(PeftConfig):
    """What both methods have in common.  Raises ``InputError`` on a value that means nothing.

    target_modules, exclude_modules: names, a regular expression, or (targets) ``"all-linear"``, as everywhere in PEFT.
    modules_to_save: modules trained and saved whole, such as a classifier head.
    layers_to_transform, layers_pattern: keep only the targets in these layers, as everywhere in PEFT.
    bias: ``"shift"`` adds a trained δ: (k,) to the input of every site, ``"none"`` does not.
    share_input: sites that receive the same tensor share one set of parameters, which are trained together.
    share_groups: which names, under one parent module, receive the same tensor.  Only sites with equal in_features
        share.  The names are taken at their word: with cross-attention, where the query reads another tensor than key
        and value, sharing is still a valid model, but no longer a change of one common input.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names, a regular expression or 'all-linear'"}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names or a regular expression of modules to leave alone"}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved whole"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "only these layer numbers"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "the name of the list of layers"})
    bias: str = field(default="none", metadata={"help": "'shift' adds a trained δ to the input, 'none' does not"})
    share_input: bool = field(default=False, metadata={"help": "one set of parameters for sites with the same input"})
    share_groups: list[list[str]] = field(
        default_factory=lambda: [list(group) for group in _SHARE_GROUPS],
        metadata={"help": "names, under one parent, that receive the same input"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.bias not in {"none", "shift"}:
            raise InputError(f"bias is '{self.bias}'; use 'none' or 'shift'")
        names = [name for group in self.share_groups for name in group]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"share_groups names '{twice[0]}' twice; a site has one input, so list it once")

    def to_dict(self) -> dict[str, Any]:
        """Sets in order: PEFT turns ``"all-linear"`` into one, and the same training should write the same file."""
        return {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}


@dataclass
class VeFAConfig(FeatureConfig):
    """``T(x) = (1 + λ) ⊙ x [+ δ]``, λ: (k,), 0 at the start.  Source: arXiv 2510.19155."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_member("VEFA")


@dataclass
class LoRFAConfig(FeatureConfig):
    """``T(x) = x + alpha/r · B (A x) [+ δ]``, A: (r, k), B: (k, r), B 0 at the start.  Source: arXiv 2510.19155v1.

    dropout: probability with which an input of A is dropped while training; x itself always passes whole.
    """

    r: int = field(default=8, metadata={"help": "rank"})
    alpha: float = field(default=8, metadata={"help": "the low-rank path is scaled by alpha / r"})
    dropout: float = field(default=0.0, metadata={"help": "dropout on the low-rank path, while training"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_member("LORFA")
        if self.r < 1:
            raise InputError(f"r is {self.r}; the rank must be 1 or more")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout is {self.dropout}; use a probability from 0 up to, not including, 1")
