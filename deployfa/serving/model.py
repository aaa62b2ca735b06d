"""One bundle being served: from tensors, sentences or pictures to answers, its adapters, what it says of itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from deployfa.bundle import Bundle
from deployfa.edits import Array
from deployfa.errors import DeployfaError, InputError, RequestError
from deployfa.graph.index_ranges import index_ranges
from deployfa.graph.storage import load_graph
from deployfa.serving.adapters import AdapterRegistry
from deployfa.serving.backends import Backend
from deployfa.serving.batcher import Batcher
from deployfa.serving.fair_queue import Policy
from deployfa.serving.limits import IMAGE
from deployfa.serving.pictures import PictureInput
from deployfa.serving.request import InferRequest
from deployfa.serving.runs import Batch, BatchRunner
from deployfa.serving.signature import Signature
from deployfa.serving.statistics import ModelStatistics
from deployfa.serving.taken import Taken
from deployfa.serving.text import LABEL, SCORE, TEXT, TextInput, labelled, unmasked
from deployfa.serving.work import Answered, Work

__all__ = ["VERSION", "Inference", "ServedModel"]

#: A bundle has one version.
VERSION = "1"
#: Sentences of fewer bytes are tokenised at once, which takes less time than to hand them to a thread.
_SHORT = 2048


@dataclass(frozen=True, slots=True)
class Inference:
    """An answer and whose it is: ``outputs`` in the model's order, of which the client may want some."""

    outputs: Mapping[str, Array]
    adapter: str
    labels: tuple[str, ...]
    rows: int
    answered: Answered


class ServedModel:
    """Made in a thread, used on an event loop.  ``default_adapter``: of requests that name none."""

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        backend: Backend,
        registry: AdapterRegistry | None,
        *,
        policy: Policy,
        loop: asyncio.AbstractEventLoop,
        executor: Executor,
        observe: Callable[[Batch], None],
        default_adapter: str | None = None,
    ) -> None:
        self.name = name
        self.bundle = bundle
        self.backend = backend
        self.registry = registry
        self.statistics = ModelStatistics()
        self.default_adapter = default_adapter
        self._loop = loop
        self._executor = executor
        names = [spec.name for spec in backend.inputs]
        self.text = TextInput(bundle, names) if _reads_text(bundle, names) else None
        self.image = PictureInput(bundle) if PictureInput.reads(bundle, names) else None
        ranges = index_ranges(load_graph(bundle.graph))
        fill = self.text.pad_id if self.text is not None else 0
        self.signature = Signature(backend.inputs, backend.outputs, ranges=ranges, fill=fill)
        outputs = self.signature.outputs
        self.classifies = len(outputs[0].shape) == 2 and not {LABEL, SCORE} & {spec.name for spec in outputs}
        self.policy = policy if self.signature.batch is not None else _one_by_one(policy)
        self._probe = self._feeds(1, 1)
        self._runs = BatchRunner(backend, self.signature, self.statistics, self._probe, observe)
        self._batcher = Batcher(self._runs, self.policy, name=name, deliver=self._deliver)

    @property
    def outputs(self) -> list[str]:
        """All that a client can ask for, in order."""
        own = [spec.name for spec in self.signature.outputs]
        return [*own, LABEL, SCORE] if self.classifies else own

    @property
    def waiting(self) -> int:
        return self._batcher.waiting

    @property
    def reason(self) -> str | None:
        """Why it would not answer now; ``None`` if it would."""
        if self._runs.broken is not None:
            return self._runs.broken
        return None if self._batcher.alive else "it is being unloaded"

    def warm_up(self) -> None:
        """Run what a first request would otherwise pay for: memory, kernels, every power of two of rows.

        Raises what the runner raises if the model does not run at all.
        """
        taken = self._any_adapter()
        try:
            rows = 1
            while rows <= self.policy.max_rows:
                length = max(1, min(16, self.policy.max_tokens // rows))
                feeds = self._feeds(rows, length)
                work = Work(feeds, rows, length, None, taken, None, 0.0, 0.0, lambda answer: None)
                for _ in range(2):
                    self.backend.run(self.signature.batched([feeds], [rows], length), [work])
                rows *= 2
        finally:
            taken.close()

    def take(self, name: str | None) -> Taken | None:
        """The adapter of one request if it is in memory; see ``AdapterRegistry.take``."""
        name = name if name is not None else self.default_adapter
        if self.registry is None:
            if name is not None:
                raise RequestError(f"model '{self.name}' is one adapter; leave the parameter 'adapter' out")
            return _WHOLE
        if name is None:
            raise RequestError(
                f"model '{self.name}' has several adapters; name one as parameters: {{\"adapter\": NAME}}, one of: "
                + self.registry.some_names()
            )
        try:
            return self.registry.take(name)
        except InputError as error:
            raise RequestError(str(error), 404) from error

    async def infer(
        self, request: InferRequest, *, arrived: float, deadline: float, gone: asyncio.Future[Any] | None = None
    ) -> Inference:
        """Raises ``RequestError``.  ``arrived``, ``deadline``: ``time.monotonic`` seconds; ``gone``: done when the
        client is."""
        adapter, strength = self._wanted_adapter(request.parameters)
        taken = self.take(adapter)
        if taken is None:
            taken = await self._fetch(adapter or self.default_adapter or "")
        handed = False
        try:
            feeds = await self._feeds_of(request)
            rows = self.signature.check(feeds, max_rows=self.policy.max_rows, max_tokens=self.policy.max_tokens)
            group = (rows.shape, self.backend.group(taken, strength))
            future: asyncio.Future[Answered] = self._loop.create_future()

            def done(answer: Answered | Exception) -> None:
                if future.done():
                    return
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

            work = Work(rows.feeds, rows.rows, rows.length, group, taken, strength, arrived, deadline, done)
            self._batcher.submit(work)
            handed = True
            answered = await self._answer(work, future, deadline, gone)
        finally:
            if not handed:
                taken.close()
        return self._inference(answered, taken, rows.rows)

    async def _answer(
        self, work: Work, future: asyncio.Future[Answered], deadline: float, gone: asyncio.Future[Any] | None
    ) -> Answered:
        timer = self._loop.call_later(max(0.0, deadline - time.monotonic()), _expire, future)
        if gone is not None:
            gone.add_done_callback(lambda _: _leave(future))
        try:
            return await future
        except BaseException:
            # too late, or the client is gone: the model need not begin
            self._batcher.cancel(work)
            raise
        finally:
            timer.cancel()

    def _inference(self, answered: Answered, taken: Taken, rows: int) -> Inference:
        outputs = dict(answered.outputs)
        if self.classifies:
            first = self.signature.outputs[0].name
            outputs[first] = unmasked(outputs[first])
        labels = taken.labels or tuple(self.bundle.labels if self.registry is None else ())
        return Inference(outputs, taken.name, labels, rows, answered)

    def label(self, inference: Inference) -> Mapping[str, Array]:
        """``label`` and ``score`` of a classifier's answer."""
        return labelled(inference.outputs[self.signature.outputs[0].name], inference.labels)

    def close(self, timeout: float | None = None) -> bool:
        """Answer what waits, take no more; False if that took longer than ``timeout`` seconds.  Blocks."""
        return self._batcher.close(timeout)

    def _wanted_adapter(self, parameters: Mapping[str, Any]) -> tuple[str | None, float | None]:
        adapter, strength = parameters.get("adapter"), parameters.get("strength")
        if adapter is not None and not isinstance(adapter, str):
            raise RequestError(f"parameter 'adapter' is {str(adapter)[:40]}; send its name, a text")
        if strength is None:
            return adapter, None
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0.0 <= strength <= 1.0:
            raise RequestError(f"parameter 'strength' is {str(strength)[:40]}; send a number from 0, the base, to 1")
        return adapter, float(strength)

    async def _fetch(self, name: str) -> Taken:
        assert self.registry is not None  # only a registry says that something is not in memory
        try:
            return await self._loop.run_in_executor(self._executor, self.registry.fetch, name)
        except DeployfaError as error:
            # a name that went meanwhile is the client's affair, a file that cannot be read is ours
            raise RequestError(str(error), 500 if name in self.registry else 404) from error

    async def _feeds_of(self, request: InferRequest) -> Mapping[str, Array]:
        inputs = request.inputs
        if self.image is not None and IMAGE in inputs:
            return await self._pictures(self.image, inputs)
        if self.text is None or TEXT not in inputs:
            return inputs
        if len(inputs) > 1:
            raise RequestError(f"'{TEXT}' takes the place of all other inputs; send it alone, or the others")
        texts = self.text.decoded(inputs[TEXT], self.policy.max_rows)
        if sum(map(len, texts)) <= _SHORT:
            return self.text.encode(texts)
        return await self._loop.run_in_executor(self._executor, self.text.encode, texts)

    async def _pictures(self, image: PictureInput, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if len(inputs) > 1:
            raise RequestError(f"'{IMAGE}' takes the place of all other inputs; send it alone, or the others")
        files = image.decoded(inputs[IMAGE], self.policy.max_rows)
        return await self._loop.run_in_executor(self._executor, image.encode, files)

    def _deliver(self, give_out: Callable[[], None]) -> None:
        # the loop may be closed: then nobody is left to be answered
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(give_out)

    def _feeds(self, rows: int, length: int) -> dict[str, Array]:
        """Feeds that the model can answer: ones where a mask or a row of a table is wanted."""
        feeds: dict[str, Array] = {}
        for spec in self.signature.inputs:
            sizes = [
                rows
                if size == self.signature.batch
                else length
                if size == self.signature.padded
                else (size if isinstance(size, int) else 1)
                for size in spec.shape
            ]
            one = spec.name != "token_type_ids" and self.signature.ranges.get(spec.name, 2) > 1
            feeds[spec.name] = np.full(sizes, 1 if one else 0, spec.dtype)
        return feeds

    def _any_adapter(self) -> Taken:
        taken = self.registry.take("base") if self.registry is not None else _WHOLE
        assert taken is not None  # the base is always in memory
        return taken


@dataclass(slots=True)
class _Whole:
    """The adapter of a bundle that has one: nothing to hold."""

    name: str = ""
    labels: tuple[str, ...] = ()

    def close(self) -> None:
        pass


_WHOLE = _Whole()


def _expire(future: asyncio.Future[Answered]) -> None:
    if not future.done():
        error = RequestError("the request's deadline has passed; send fewer requests, or a longer timeout", 503)
        error.retry_after_s = 1.0
        future.set_exception(error)


def _leave(future: asyncio.Future[Answered]) -> None:
    if not future.done():
        future.set_exception(RequestError("the client is gone", 499))


def _one_by_one(policy: Policy) -> Policy:
    """For graphs without a dimension that counts rows."""
    return Policy(max_rows=1, max_tokens=policy.max_tokens, max_queue=policy.max_queue)


def _reads_text(bundle: Bundle, names: Sequence[str]) -> bool:
    return bundle.manifest.preprocessing.kind == "text" and set(names) <= {
        "input_ids",
        "attention_mask",
        "token_type_ids",
    }
