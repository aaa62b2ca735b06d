"""All bodies together have an end too, and who is answered gives room."""

from __future__ import annotations

import asyncio

import pytest

from deployfa.errors import RequestError
from deployfa.serving.compression import compress
from deployfa.serving.http import Intake, read_body
from deployfa.serving.limits import Limits

LIMITS = Limits(body_bytes=100)


def read(intake: Intake, pieces: list[bytes], *headers: tuple[bytes, bytes]) -> tuple[bytes, dict]:
    told = {"intake": intake}
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = False

    async def receive():
        return messages.pop(0)

    return asyncio.run(read_body({"headers": headers, "deployfa": told}, receive, LIMITS)), told


def test_what_one_holds_another_cannot_have_until_it_is_answered() -> None:
    intake = Intake(150)
    body, told = read(intake, [b"x" * 50, b"y" * 50])
    assert len(body) == 100 and intake.held == 100
    with pytest.raises(RequestError, match="try again") as refused:
        read(intake, [b"x" * 30, b"y" * 30])
    assert refused.value.status == 503 and refused.value.retry_after_s
    intake.let_go(told)
    intake.let_go(told)
    assert intake.held == 30  # of the one that was refused, which its own end gives back


def test_what_comes_out_of_a_small_body_counts() -> None:
    intake = Intake(150)
    body, told = read(intake, [compress(b"x" * 100, "gzip")], (b"content-encoding", b"gzip"))
    assert len(body) == 100 and intake.held >= 100
    intake.let_go(told)
    assert intake.held == 0


def test_a_client_that_goes_in_the_midst() -> None:
    told = {"intake": Intake(150)}
    messages = [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    with pytest.raises(RequestError) as gone:
        asyncio.run(read_body({"headers": [], "deployfa": told}, receive, LIMITS))
    assert gone.value.status == 499
