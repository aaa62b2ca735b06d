"""One tiny decoder of each kind a session."""

from __future__ import annotations

import pytest

from .tiny import MODELS, Tiny


@pytest.fixture(scope="session", params=list(MODELS))
def tiny(request, tmp_path_factory) -> Tiny:
    return Tiny(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Tiny:
    return Tiny("Llama", tmp_path_factory.mktemp("llama"))
