"""From a bundle's directory to a model that is warm: its runner, its table, the adapters it had before."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from deployfa.bundle import Bundle
from deployfa.errors import InputError
from deployfa.runtimes.runner import Spinning
from deployfa.serving.adapter_store import AdapterStore
from deployfa.serving.adapters import AdapterRegistry
from deployfa.serving.backends import Backend, FixedBackend, PackBackend, SlotBackend, open_backend
from deployfa.serving.fair_queue import Policy
from deployfa.serving.holders import FixedHolder, SlotHolder, TableHolder
from deployfa.serving.model import ServedModel
from deployfa.serving.runs import Batch

__all__ = ["ModelOpener", "Running"]

#: Room for adapters in a table beside those that may be in memory: replaced ones that are still being answered with.
_SPARE = 64


@dataclass(frozen=True, kw_only=True)
class Running:
    """How models run.  ``threads``: of one operator, ``None`` for all cores; ``spinning``: whether idle threads keep
    polling, by default for the gap between two operators; ``max_resident``: adapters of a model in memory, the rest on
    disk, ``None`` for no limit."""

    target: str | None = None
    engine: str | None = None
    threads: int | None = None
    spinning: Spinning = "brief"
    default_adapter: str | None = None
    max_resident: int | None = None


class ModelOpener:
    """``(name, path)`` → a warm model; blocks, so it is called in a thread.  ``state``: where adapters are kept that
    were loaded while serving, ``None`` for nowhere."""

    def __init__(
        self,
        running: Running,
        policy: Policy,
        *,
        state: Path | None,
        loop: asyncio.AbstractEventLoop,
        executor: Executor,
        observe: Callable[[str, Batch], None],
        log: logging.Logger,
    ) -> None:
        self._running = running
        self._policy = policy
        self._state = state
        self._loop = loop
        self._executor = executor
        self._observe = observe
        self._log = log
        #: one folder is opened once, however often the model is
        self._stores: dict[str, AdapterStore] = {}

    def __call__(self, name: str, path: Path) -> ServedModel:
        """Raises what ``Bundle.open`` and the runners raise, and ``InputError`` for a bundle that generates."""
        running = self._running
        bundle = Bundle.open(path)
        if bundle.manifest.preprocessing.kind == "prompt":
            raise InputError(f"'{path}' generates text, which is not served yet; use: deployfa run {path} --prompt ...")
        tables = bundle.manifest.tables
        most = (running.max_resident or 0) + len(tables.adapters if tables is not None else ()) + _SPARE
        backend = open_backend(
            bundle,
            target=running.target,
            engine=running.engine,
            threads=running.threads,
            spinning=running.spinning,
            max_adapters=most if running.max_resident is not None else None,
        )
        model = ServedModel(
            name,
            bundle,
            backend,
            self._registry(name, bundle, backend),
            policy=self._policy,
            loop=self._loop,
            executor=self._executor,
            observe=lambda batch: self._observe(name, batch),
            default_adapter=self._default(backend),
        )
        model.warm_up()
        return model

    def _registry(self, name: str, bundle: Bundle, backend: Backend) -> AdapterRegistry | None:
        if isinstance(backend, FixedBackend):
            return None
        store = None
        if isinstance(backend, SlotBackend):
            holder: TableHolder | SlotHolder | FixedHolder = SlotHolder(bundle, backend.runner)
        elif isinstance(backend, PackBackend) and backend.table is not None:
            holder = TableHolder(backend.table)
        else:
            holder = FixedHolder(bundle)
        if self._state is not None and not isinstance(holder, FixedHolder):
            store = self._stores.get(name)
            if store is None:
                store = self._stores[name] = AdapterStore(self._state / name)
        registry = AdapterRegistry(holder, store=store, max_resident=self._running.max_resident)
        for adapter, reason in registry.restore():
            self._log.warning("adapter not restored", extra={"fields": {"adapter": adapter, "reason": reason}})
        return registry

    def _default(self, backend: Backend) -> str | None:
        if self._running.default_adapter is not None or not isinstance(backend, SlotBackend):
            return self._running.default_adapter
        return "default"
