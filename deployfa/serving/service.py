"""What all routes share: the models, who may do what, whether the server still takes requests."""

from __future__ import annotations

import hmac
import logging
from concurrent.futures import Executor
from dataclasses import dataclass, field

from deployfa.errors import RequestError
from deployfa.serving.http import Intake, Scope, header
from deployfa.serving.limits import Limits
from deployfa.serving.logs import LOGGER
from deployfa.serving.metrics import Metrics
from deployfa.serving.model import VERSION, ServedModel
from deployfa.serving.repository import Repository

__all__ = ["Access", "Service"]


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may do what.  ``token``: of every request but health; ``admin_token``: of what changes the server; ``None``:
    everybody may ask, nobody may change.  ``mutual_tls``: every client has shown a certificate, so all may."""

    token: str | None = None
    admin_token: str | None = None
    mutual_tls: bool = False

    def check(self, scope: Scope) -> None:
        """Raises ``RequestError``, 401, unless the request may ask."""
        if self.token is not None and not self._bears(scope, self.token, self.admin_token):
            raise RequestError("a token is needed; send the header 'Authorization: Bearer TOKEN'", 401)

    def check_admin(self, scope: Scope) -> None:
        """Raises ``RequestError``: 403 where nothing can be changed, 401 without the token."""
        if self.admin_token is not None:
            if not self._bears(scope, self.admin_token):
                raise RequestError("the admin token is needed; send the header 'Authorization: Bearer TOKEN'", 401)
        elif not self.mutual_tls:
            raise RequestError("this server cannot be changed; start it with --admin-token", 403)

    @staticmethod
    def _bears(scope: Scope, *tokens: str | None) -> bool:
        scheme, _, given = (header(scope, b"authorization") or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        given = given.strip()
        return any([hmac.compare_digest(given, token.encode()) for token in tokens if token is not None])


@dataclass(kw_only=True)
class Service:
    """``executor``: for what would hold up the event loop.  ``timeout_s``: of a request that names none, and the
    longest that one can name."""

    repository: Repository
    metrics: Metrics
    limits: Limits
    access: Access
    executor: Executor
    timeout_s: float = 60.0
    draining: bool = False
    log_requests: bool = True
    intake: Intake = field(init=False)
    log: logging.Logger = field(default_factory=lambda: logging.getLogger(LOGGER))

    def __post_init__(self) -> None:
        self.intake = Intake(self.limits.held_bytes)

    def model(self, name: str, version: str | None) -> ServedModel:
        """Raises ``RequestError``: 404 for one that there is not, 503 for one that is not ready."""
        model = self.repository.find(name)
        if version is not None and version != VERSION:
            raise RequestError(f"model '{name}' has version {VERSION} only, not '{version[:40]}'", 404)
        return model

    def not_ready(self) -> str | None:
        """Why the server would not answer now; ``None`` if it would."""
        if self.draining:
            return "the server is stopping"
        return self.repository.not_ready()
