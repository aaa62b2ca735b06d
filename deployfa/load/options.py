"""What to send, and how fast; every option is checked before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from deployfa.errors import InputError
from deployfa.load.adapters import AdapterSpec

__all__ = ["LoadOptions"]

#: Send times and answers of one run are kept: 26 bytes a request.
_MOST_REQUESTS = 50_000_000


@dataclass(frozen=True)
class LoadOptions:
    """``rate``: requests a second.  ``duration``, ``warmup``, ``timeout``: seconds.  ``texts``: what is asked, drawn at
    random; without any, raw tensors (``batch``, ``tokens``).  ``adapters``: see ``AdapterSpec.parse``; ``None`` names
    none.  ``slo_ms``: the latency objective.  ``max_connections``: ``None`` is as many as it takes.

    Raises ``InputError`` for anything that cannot be sent.
    """

    url: str
    rate: float = 200.0
    duration: float = 30.0
    model: str | None = None
    adapters: AdapterSpec | None = None
    texts: Sequence[str] = ()
    tokens: int = 16
    batch: int = 1
    strength: float | None = None
    slo_ms: float | None = None
    token: str | None = field(default=None, repr=False)
    warmup: float = 2.0
    timeout: float = 10.0
    seed: int = 0
    max_connections: int | None = None

    def __post_init__(self) -> None:
        _positive("--rate", self.rate, "requests a second, such as 200")
        _positive("--duration", self.duration, "seconds, such as 30")
        _positive("--timeout", self.timeout, "seconds, such as 10")
        if self.slo_ms is not None:
            _positive("--slo-ms", self.slo_ms, "milliseconds, such as 50")
        for name, value in (
            ("--tokens", self.tokens),
            ("--batch", self.batch),
            ("--max-connections", self.connections),
        ):
            _positive(name, value, "a count of at least 1")
        if not (math.isfinite(self.warmup) and self.warmup >= 0):
            raise InputError(f"--warmup {self.warmup:g} is not a length of time; give seconds, or 0 for none")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed} is negative; give 0 or more")
        if self.rate * (self.duration + self.warmup) > _MOST_REQUESTS:
            raise InputError(
                f"{self.rate:g} requests a second for {self.duration + self.warmup:g} s are more than "
                f"{_MOST_REQUESTS:,} requests; lower --rate or --duration"
            )
        if self.strength is not None and self.adapters is None:
            raise InputError("--strength is of adapters and none are named; pass --adapters too")
        if self.strength is not None and not math.isfinite(self.strength):
            raise InputError(f"--strength {self.strength} is not a finite number; 0 is the base, 1 the adapter")
        _check_url(self.url)

    @property
    def connections(self) -> int:
        return 1 if self.max_connections is None else self.max_connections

    @property
    def base_url(self) -> str:
        """``http://host:port[/prefix]``, without a slash or ``/v2`` at the end; ``http`` where no scheme is given."""
        url = self.url if "://" in self.url else f"http://{self.url}"
        return url.rstrip("/").removesuffix("/v2").rstrip("/")

    @property
    def payload(self) -> str:
        """For the report: ``16 tokens, batch 1`` or ``3 texts``."""
        if self.texts:
            return f"{len(self.texts):,} text{'s' if len(self.texts) > 1 else ''}"
        return f"{self.tokens} tokens, batch {self.batch}"


def _positive(name: str, value: float, example: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} {value:g} is not above 0; give {example}")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        raise InputError(f"'{url}' is not the address of a server; give one such as http://localhost:8000")
