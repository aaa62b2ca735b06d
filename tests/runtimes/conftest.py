"""A graph with slots for the files here."""

from __future__ import annotations

import pytest

from .slot_graph import SlotGraph


@pytest.fixture(scope="module", params=[True, False], ids=["idle branch", "plain"])
def slot_graph(request, tmp_path_factory) -> SlotGraph:
    return SlotGraph(tmp_path_factory.mktemp("slots"), idle_branch=request.param)
