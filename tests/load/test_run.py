"""Runs against a real server: what is on the wire, what is counted, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from deployfa.errors import DeployfaError, InputError, LoadError
from deployfa.load import LoadOptions, run_load
from deployfa.load.adapters import AdapterSpec

from .server import Server

Serve = Callable[..., Server]


def test_raw_tensors_are_what_the_model_says_it_takes(serve: Serve, quick: dict[str, Any]) -> None:
    server = serve()
    report = run_load(LoadOptions(server.url, tokens=7, batch=3, **quick))
    assert (server.wrong, report.failed, report.shed) == ([], 0, 0)
    assert server.asked == report.sent + 1  # the first request is tried
    assert (report.model, report.server.name, report.settings.payload) == ("minilm", "toy", "7 tokens, batch 3")
    feed = server.feeds[0]
    assert {name: array.shape for name, array in feed.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), (3, 7)
    )
    assert feed["attention_mask"].all() and not feed["token_type_ids"].any()
    ids = np.concatenate([each["input_ids"].ravel() for each in server.feeds])
    assert ids.min() >= 100 and ids.max() <= 999 and len(np.unique(ids)) > 100


def test_fixed_sizes_stay_and_other_types_are_zeros(serve: Serve, quick: dict[str, Any]) -> None:
    pixels = {"name": "pixels", "datatype": "FP32", "shape": [-1, 3, 8, -1]}
    server = serve(inputs=[pixels])
    run_load(LoadOptions(server.url, tokens=5, batch=2, **quick))
    assert server.wrong == [] and server.feeds[0]["pixels"].shape == (2, 3, 8, 5)


def test_texts_and_adapters_reach_the_server(serve: Serve, quick: dict[str, Any]) -> None:
    server = serve(adapters=["base", "shop", "movies", "news"])
    options = {**quick, "adapters": AdapterSpec.parse("zipf:2:2"), "texts": ["A joy.", 'Łódź "quoted"']}
    report = run_load(LoadOptions(server.url, strength=0.5, **options))
    assert server.wrong == [] and set(server.texts) == set(options["texts"])
    assert set(server.named) == {("shop", 0.5), ("movies", 0.5)} and report.adapters_named == 2
    assert server.named.count(("shop", 0.5)) > server.named.count(("movies", 0.5)) > 0


def test_a_seed_repeats_what_is_sent(serve: Serve, quick: dict[str, Any]) -> None:
    servers = [serve() for _ in range(3)]
    for server, seed in zip(servers, (1, 1, 2), strict=True):
        run_load(LoadOptions(server.url, seed=seed, adapters=AdapterSpec.parse("uniform:9"), **quick))
    # two requests that are close may arrive the other way round, so only what arrived is compared
    first, again, other = (sorted(name or "" for name, _ in server.named) for server in servers)
    assert first == again != other


@pytest.mark.parametrize(
    ("behave", "shed", "errors"),
    [("shed", True, None), ("busy", False, "503"), ("hang", False, "timeout"), ("disconnect", False, "connection")],
)
def test_failures_are_counted_by_kind(
    serve: Serve, quick: dict[str, Any], behave: str, shed: bool, errors: str | None
) -> None:
    server = serve(behave=behave, after=11)
    report = run_load(LoadOptions(server.url, slo_ms=5000, **{**quick, "timeout": 0.7}))
    failed = report.sent - 10
    assert server.asked == report.sent + 1  # nothing is sent twice
    assert (report.ok, report.shed, report.errors) == (10, failed if shed else 0, {errors: failed} if errors else {})
    assert report.objective is not None and report.objective.share == pytest.approx(10 / report.sent)
    # 10 answers do not even make a median
    assert report.latency == {} and "p50 needs 11 samples, there are 10" in report.refused["p50"]


def test_percentiles_are_given_as_far_as_the_samples_go(serve: Serve) -> None:
    report = run_load(LoadOptions(serve().url, rate=400, duration=0.4, warmup=0))
    assert 130 <= report.ok < 662
    assert list(report.latency) == ["p50", "p90", "p95"] and list(report.refused) == ["p99", "p99.9"]
    assert "needs 6636" in report.refused["p99.9"]
    for each in report.latency.values():
        assert each.low_ms is not None and each.low_ms <= each.ms


def test_an_unreachable_server_is_one_line() -> None:
    with pytest.raises(LoadError, match=r"no server at http://127\.0\.0\.1:9 \(.*\); check the address"):
        run_load(LoadOptions("127.0.0.1:9"))


@pytest.mark.parametrize(
    ("server", "options", "parts"),
    [
        ({}, {"model": "bert"}, ["no model 'bert'", "it has: minilm"]),
        ({"models": {"a": "READY", "b": "READY", "c": "LOADING"}}, {}, ["2 models", "--model with one of: a, b"]),
        ({"models": {"a": "LOADING"}}, {}, ["is ready (a (LOADING))"]),
        ({"models": {}}, {}, ["lists none"]),
        ({"token": "secret"}, {}, ["HTTP 401: who are you", "pass --token"]),
        ({"adapters": ["base", "shop"]}, {"adapters": "shpo"}, ["no adapter 'shpo'", "shop"]),
        ({"adapters": ["base", "shop"]}, {"adapters": "uniform:2"}, ["has 1 adapters", "--adapters uniform:1"]),
        ({}, {"adapters": "shop,missing"}, ["adapter 'missing'", "HTTP 400: no adapter 'missing'"]),
        (
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}]},
            {"texts": ["a"]},
            ["takes no texts", "x FP32"],
        ),
        ({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1]}]}, {}, ["pass --text"]),
        ({"inputs": [{"name": "x", "datatype": "BYTES", "shape": [-1]}]}, {}, ["'x'", "BYTES", "pass --text"]),
        ({"inputs": [{"name": "x", "datatype": "FP32"}]}, {}, ["does not answer in the Open Inference Protocol"]),
        ({}, {"tokens": 10**9}, ["lower --batch or --tokens"]),
        ({"delay": 2}, {"timeout": 0.2}, ["did not answer within 0.2 s"]),
    ],
)
def test_refusals(serve: Serve, server: dict[str, Any], options: dict[str, Any], parts: list[str]) -> None:
    if isinstance(options.get("adapters"), str):
        options = {**options, "adapters": AdapterSpec.parse(options["adapters"])}
    with pytest.raises(DeployfaError) as caught:
        run_load(LoadOptions(serve(**server).url, **options))
    for part in (*parts, "; "):
        assert part in str(caught.value)


def test_a_token_is_sent(serve: Serve, quick: dict[str, Any]) -> None:
    options = LoadOptions(serve(token="secret").url, token="secret", **quick)
    assert run_load(options).failed == 0 and "secret" not in repr(options)


def test_a_server_of_something_else(serve: Serve) -> None:
    """The protocol's paths are not there: what to check is said."""
    with pytest.raises(InputError, match="check that it speaks the Open Inference Protocol"):
        run_load(LoadOptions(serve().url + "/elsewhere"))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"rate": 0}, "--rate 0 is not above 0"),
        ({"rate": float("nan")}, "--rate nan"),
        ({"duration": -1}, "--duration -1 is not above 0"),
        ({"timeout": 0}, "--timeout 0"),
        ({"slo_ms": 0}, "--slo-ms 0"),
        ({"tokens": 0}, "--tokens 0"),
        ({"batch": 0}, "--batch 0"),
        ({"max_connections": 0}, "--max-connections 0"),
        ({"warmup": -1}, "--warmup -1"),
        ({"seed": -1}, "--seed -1"),
        ({"rate": 1e9}, "lower --rate or --duration"),
        ({"strength": 0.5}, "pass --adapters too"),
        ({"url": "ftp://x"}, "'ftp://x' is not the address of a server"),
        ({"url": "http://"}, "is not the address"),
        ({"url": "http://x:port"}, "is not the address"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError, match=part) as caught:
        LoadOptions(**{"url": "localhost:8000", **options})
    assert "; " in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "http://localhost:8000/", "http://localhost:8000/v2/"])
def test_addresses_of_one_server(url: str) -> None:
    assert LoadOptions(url).base_url == "http://localhost:8000"
