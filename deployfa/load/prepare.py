"""A server before the load: asked what it is, and a first request answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import numpy as np

from deployfa.bench.machine import Machine, describe_machine
from deployfa.errors import LoadError
from deployfa.load.arrivals import poisson_times
from deployfa.load.client import Client, Outcome, open_client
from deployfa.load.discovery import (
    ServerInfo,
    find_model,
    model_inputs,
    model_path,
    served_adapters,
    server_info,
)
from deployfa.load.open_loop import Samples, open_loop
from deployfa.load.options import LoadOptions
from deployfa.load.report import LoadReport, LoadSettings, summarise
from deployfa.load.requests import Requests
from deployfa.versions import installed

__all__ = ["PACKAGES", "Prepared", "Progress", "load_settings", "prepare"]

#: (what, seconds done, seconds in all)
Progress = Callable[[str, float, float], None]
PACKAGES = ("aiohttp", "uvloop")


@dataclass(frozen=True)
class Prepared:
    """A server that was asked everything and has answered a first request."""

    client: Client
    options: LoadOptions
    machine: Machine
    server: ServerInfo
    model: str
    requests: Requests

    async def report(self, rate: float, seconds: float, number: int, progress: Progress | None) -> LoadReport:
        samples, adapters = await self.samples(rate, seconds, number, progress)
        named = len({adapters[index] for index in samples.index.tolist()}) if self.options.adapters is not None else 0
        return self.summary(samples, rate, seconds, named)

    async def samples(
        self, rate: float, seconds: float, number: int, progress: Progress | None
    ) -> tuple[Samples, list[int]]:
        """What was measured, and the adapter of every request of the schedule.

        number: of the run, so that each has draws of its own; what is drawn for one purpose changes no other.
        """
        options, build = self.options, self.requests.build
        send_bytes = self.client.sender(model_path(self.model) + "/infer")
        arrivals, picks, ranks = (
            np.random.default_rng(sequence) for sequence in np.random.SeedSequence((options.seed, number)).spawn(3)
        )
        times = poisson_times(rate, options.warmup + seconds, arrivals)
        items = picks.integers(0, self.requests.items, len(times)).tolist()
        spec = options.adapters
        adapters = spec.draw(len(times), ranks).tolist() if spec is not None else [0] * len(times)

        async def send(index: int) -> tuple[int, float]:
            return await send_bytes(*build(items[index], adapters[index]))

        def show(done: float, total: float) -> None:
            if progress is not None:
                progress(f"sending {rate:.4g}/s", done, total)

        samples = await open_loop(times, send, warmup=options.warmup, seconds=seconds, progress=show)
        return samples, adapters

    def summary(self, samples: Samples, rate: float, seconds: float, adapters_named: int) -> LoadReport:
        return summarise(
            samples,
            url=self.options.base_url,
            server=self.server,
            model=self.model,
            settings=load_settings(self.options, rate, seconds),
            slo_ms=self.options.slo_ms,
            adapters_named=adapters_named,
            event_loop=type(asyncio.get_running_loop()).__module__.partition(".")[0],
            machine=self.machine,
            versions=installed(PACKAGES),
        )


@contextlib.asynccontextmanager
async def prepare(options: LoadOptions) -> AsyncIterator[Prepared]:
    async with open_client(
        options.base_url,
        token=options.token,
        timeout=options.timeout,
        max_connections=options.max_connections,
    ) as client:
        server = await server_info(client)
        model = await find_model(client, options.model)
        inputs = await model_inputs(client, model)
        spec, names, certain = options.adapters, list[str](), True
        if spec is not None:
            served = await served_adapters(client, model)
            names, certain = spec.resolve(served, client.base_url), served is not None
        requests = Requests(
            model,
            inputs,
            texts=options.texts,
            tokens=options.tokens,
            batch=options.batch,
            adapters=names,
            strength=options.strength,
            generator=np.random.default_rng(options.seed),
        )
        # names that the server did not list are tried one by one where the caller wrote them down
        tried = range(len(names)) if spec is not None and spec.names and not certain else range(1)
        for adapter in tried:
            await _try(client, model, requests, adapter, names[adapter] if names else None)
        machine = await asyncio.to_thread(describe_machine)
        yield Prepared(client, options, machine, server, model, requests)


async def _try(client: Client, model: str, requests: Requests, adapter: int, name: str | None) -> None:
    """Raise ``LoadError`` where the server refuses what is to be sent.  Being busy is no refusal."""
    body, headers = requests.build(0, adapter)
    reply = await client.ask("POST", model_path(model) + "/infer", body=body, headers=headers)
    if reply.status in (Outcome.OK, 503):
        return
    whose = f" for adapter '{name}'" if name is not None else ""
    raise LoadError(
        f"{client.base_url} refuses a first request to model '{model}'{whose} (HTTP {reply.status}: {reply.text}); "
        "nothing was sent after it, change the request or look at the server"
    )


def load_settings(options: LoadOptions, rate: float, seconds: float) -> LoadSettings:
    return LoadSettings(
        rate_per_s=rate,
        duration_s=seconds,
        warmup_s=options.warmup,
        timeout_s=options.timeout,
        payload=options.payload,
        adapters=options.adapters.text if options.adapters is not None else None,
        strength=options.strength,
        max_connections=options.max_connections,
        seed=options.seed,
    )
