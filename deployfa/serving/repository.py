"""The models of a server by name: loaded, reloaded and unloaded while others answer."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployfa.errors import DeployfaError, RequestError
from deployfa.serving.model import VERSION, ServedModel

__all__ = ["Repository"]


@dataclass(slots=True)
class _Entry:
    """``state``: as the repository extension names it; ``reason``: why it is not READY."""

    path: Path
    model: ServedModel | None = None
    state: str = "UNAVAILABLE"
    reason: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Repository:
    """``open_model``: name, path → a model that is warm; called in a thread.  ``bundles``: name → directory."""

    def __init__(self, bundles: Mapping[str, Path], open_model: Callable[[str, Path], ServedModel]) -> None:
        self._entries = {name: _Entry(path) for name, path in bundles.items()}
        self._open = open_model

    def find(self, name: str) -> ServedModel:
        """Raises ``RequestError``: 404 for a model that there is not, 503 for one that is not loaded (yet)."""
        entry = self._known(name)
        if entry.model is None:
            if entry.state == "LOADING":
                raise RequestError(f"model '{name}' is being loaded; try again", 503, retry_after_s=1.0)
            raise RequestError(f"model '{name}' is not loaded ({entry.reason}); load it first", 404)
        return entry.model

    def names(self) -> list[str]:
        return list(self._entries)

    def loaded(self) -> dict[str, ServedModel]:
        return {name: entry.model for name, entry in self._entries.items() if entry.model is not None}

    def index(self, *, ready: bool) -> list[dict[str, str]]:
        """Every model and its state; ``ready``: only those that would answer."""
        found = []
        for name, entry in self._entries.items():
            reason = entry.reason if entry.model is None else (entry.model.reason or "")
            state = entry.state if entry.model is None or not reason else "UNAVAILABLE"
            if state == "READY" or not ready:
                found.append({"name": name, "version": VERSION, "state": state, "reason": reason})
        return found

    def not_ready(self) -> str | None:
        """The first model that would not answer, and why.  One that was unloaded on purpose does not count."""
        for name, entry in self._entries.items():
            if entry.model is None and entry.reason != _UNLOADED:
                return f"model '{name}' is not loaded: {entry.reason or 'loading'}"
            if entry.model is not None and entry.model.reason is not None:
                return f"model '{name}': {entry.model.reason}"
        return None

    async def load(self, name: str) -> None:
        """Load ``name``, or load it again: the old one answers until the new one is warm, and stays if that fails.

        Raises ``RequestError``: 404 for a name that there is not, 400 with the reason if it does not load.
        """
        entry = self._known(name)
        async with entry.lock:
            if entry.model is None:
                entry.state, entry.reason = "LOADING", ""
            try:
                fresh = await asyncio.to_thread(self._open, name, entry.path)
            except Exception as error:
                told = str(error) if isinstance(error, DeployfaError) else f"{type(error).__name__}: {error}"
                if entry.model is None:
                    entry.state, entry.reason = "UNAVAILABLE", told
                raise RequestError(f"model '{name}' does not load: {told}") from error
            old, entry.model = entry.model, fresh
            entry.state, entry.reason = "READY", ""
        if old is not None:
            await asyncio.to_thread(old.close)

    async def unload(self, name: str) -> None:
        """No new requests; those that were accepted are answered first.  Raises ``RequestError``, 404."""
        entry = self._known(name)
        async with entry.lock:
            old, entry.model = entry.model, None
            entry.state, entry.reason = "UNAVAILABLE", _UNLOADED
        if old is not None:
            await asyncio.to_thread(old.close)

    def changing(self, name: str) -> asyncio.Lock:
        """Held by whoever changes the model: its adapters do not change while it is loaded again."""
        return self._known(name).lock

    def gauges(self) -> Mapping[str, Mapping[str, float]]:
        """For ``Metrics.watch``."""
        models = self.loaded()
        found: dict[str, dict[str, float]] = {
            "queue_requests": {name: float(model.waiting) for name, model in models.items()},
            "ready": {name: float(model.reason is None) for name, model in models.items()},
        }
        registries = {name: model.registry for name, model in models.items() if model.registry is not None}
        found["adapters_resident"] = {name: float(each.resident) for name, each in registries.items()}
        return found

    def counters(self) -> Mapping[str, Mapping[str, float]]:
        """For ``Metrics.watch``: what happened to adapters."""
        found: dict[str, dict[str, float]] = {}
        for name, model in self.loaded().items():
            counts: Mapping[str, Any] = model.registry.counters if model.registry is not None else {}
            for count, value in counts.items():
                found.setdefault(f"adapter_{count}", {})[name] = float(value)
        return found

    def _known(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, self._entries, n=4) or list(self._entries)[:6]
            raise RequestError(f"no model '{name[:80]}'; there are: {', '.join(near) or 'none'}", 404)
        return entry


_UNLOADED = "unloaded"
