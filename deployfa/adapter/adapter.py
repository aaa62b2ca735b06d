"""``Adapter``: what a trained adapter is once the framework is taken away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from deployfa.edits import Array, Edit
from deployfa.errors import AdapterFormatError, BaseMismatchError, EditError, InputError

__all__ = ["FORMAT", "Adapter", "AdapterMeta", "BaseReference"]

FORMAT = "deployfa-adapter/1"


class BaseReference(msgspec.Struct, frozen=True, kw_only=True):
    """Which base model an adapter belongs to.

    ``name`` is the directory or hub id it was trained from (a hint, never trusted); ``fingerprint`` is the identity
    (see ``deployfa.adapter.fingerprint``), ``None`` when the file does not carry one.
    """

    name: str = ""
    fingerprint: str | None = None
    architecture: str = ""
    task: str = "text-classification"


class AdapterMeta(msgspec.Struct, frozen=True, kw_only=True):
    """Everything in an adapter file that is not a tensor."""

    method: str
    base: BaseReference = BaseReference()
    labels: list[str] = []
    config: dict[str, Any] = {}
    training: dict[str, Any] = {}


@dataclass(frozen=True, eq=False)
class Adapter:
    """``{site: edit}``, replaced whole modules ``{module path: {parameter: array}}``, and their origin."""

    method: str
    edits: Mapping[str, Edit]
    modules: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    base: BaseReference = field(default_factory=BaseReference)
    labels: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    found: str = "built in memory"

    @classmethod
    def load(cls, path: str | Path) -> Adapter:
        """Read a ``.pt``, a ``.safetensors`` or a PEFT directory; ``found`` says which it was.

        Nothing in the file is executed.  Raises ``InputError`` if there is no such path and ``AdapterFormatError`` if
        what is there is not an adapter.
        """
        from deployfa.adapter import formats

        path = Path(path)
        if not path.exists():
            raise InputError(f"no adapter at '{path}'; pass a .pt, a .safetensors or a PEFT directory")
        return formats.load(path)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write to ``path``: ``.pt`` (needs torch), ``.safetensors``, or, without a suffix, a PEFT directory.

        Written aside and renamed.  Raises ``OutputExistsError`` unless ``force``.
        """
        from deployfa.adapter import formats

        path = Path(path)
        formats.save(self, path, force=force)
        return path

    @property
    def meta(self) -> AdapterMeta:
        return AdapterMeta(
            method=self.method,
            base=self.base,
            labels=list(self.labels),
            config=dict(self.config),
            training=dict(self.training),
        )

    @property
    def parameters(self) -> int:
        """Trained numbers in the edits, without replaced modules."""
        return sum(edit.parameters for edit in self.edits.values())

    @property
    def module_parameters(self) -> int:
        """Trained numbers in replaced modules (the head)."""
        return sum(array.size for module in self.modules.values() for array in module.values())

    def tensors(self) -> dict[str, Array]:
        """Every tensor under its name in the file: ``edit/SITE/NAME`` and ``module/PATH/PARAMETER``."""
        named = {f"edit/{site}/{name}": a for site, edit in self.edits.items() for name, a in edit.tensors().items()}
        named |= {f"module/{path}/{name}": a for path, module in self.modules.items() for name, a in module.items()}
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array], meta: AdapterMeta, *, found: str) -> Adapter:
        """The inverse of ``tensors`` and ``meta``; raises ``AdapterFormatError`` on tensors that make no edit."""
        sites: dict[str, dict[str, Array]] = {}
        modules: dict[str, dict[str, Array]] = {}
        for full_name, array in tensors.items():
            kind, _, rest = full_name.partition("/")
            owner, _, name = rest.rpartition("/")
            if kind not in {"edit", "module"} or not owner:
                raise AdapterFormatError(f"unknown tensor '{full_name}' in the adapter; written by a newer deployfa?")
            (sites if kind == "edit" else modules).setdefault(owner, {})[name] = array
        try:
            edits = {site: Edit.from_tensors(site, parts) for site, parts in sites.items()}
        except EditError as error:
            # what does not even make an edit is a broken file, not an edit that fits no site
            raise AdapterFormatError(str(error)) from error
        return cls(
            method=meta.method,
            edits=edits,
            modules=modules,
            base=meta.base,
            labels=tuple(meta.labels),
            config=meta.config,
            training=meta.training,
            found=found,
        )

    def check_base(self, actual: str, *, allow_mismatch: bool = False) -> str | None:
        """Compare the base's fingerprint with the one the adapter was trained on.

        Returns a warning to show, or ``None``; raises ``BaseMismatchError`` on another base unless ``allow_mismatch``.
        """
        expected = self.base.fingerprint
        if expected is None:
            return "the adapter names no base fingerprint, so the base could not be checked"
        if expected == actual:
            return None
        text = (
            f"the adapter was trained on base {_short(expected)} ({self.base.name}), but this base is {_short(actual)}"
        )
        if not allow_mismatch:
            raise BaseMismatchError(f"{text}; pass that base with --model, or --allow-base-mismatch to go on anyway")
        return f"{text}; going on because of --allow-base-mismatch, the results are not those of training"


def _short(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:")[:12]
