"""Which graphs are decoders, and that caches are handed on and not copied."""

from __future__ import annotations

import numpy as np
import pytest

from deployfa.errors import BundleError, RuntimeTargetError
from deployfa.generation.batch import _leave
from deployfa.generation.decoder import Decoder, _empty_shape
from deployfa.generation.generator import Request
from deployfa.runtimes import TensorSpec


@pytest.mark.parametrize(
    ("name", "other", "match"),
    [
        ("logits_to_keep", "kept", "lacks 'logits_to_keep'"),
        ("present.1.value", "present.1.values", r"lacks 'present\.1\.value'"),
        ("past_key_values.0.key", "pixel_values", "takes 'pixel_values'"),
    ],
)
def test_another_graph_is_no_decoder(llama, name, other, match):
    model = llama.graph.clone()
    value = next(each for each in (*model.graph.inputs, *model.graph.outputs) if each.name == name)
    value.name = other
    with pytest.raises(BundleError, match=match):
        Decoder(llama.runner(model))


def test_the_size_of_a_cache_is_the_one_that_is_said() -> None:
    past, present = (TensorSpec(name, "float32", ("b", size, "n", 8)) for name, size in (("past", "3"), ("new", 3)))
    assert _empty_shape(past, present) == (3, 8, np.float32)
    with pytest.raises(BundleError, match="does not say the size of axis 1 of 'past'"):
        _empty_shape(past, past)


def test_caches_are_handed_on_where_they_are(llama):
    decoder = llama.base.decoder
    seen = []

    def feeds(width, past):
        return np.ones((1, width), np.int64), np.ones((1, past + width), np.int64), np.arange(past, past + width)[None]

    with decoder.adapted([None], [None]) as run:

        def watched(values, at):
            seen.append({name: value.data_ptr() for name, value in values.items() if name.startswith("past")})
            return run(values, at)

        _, caches = decoder.step(watched, np.zeros(1, int), *feeds(3, 0), decoder.empty(1))
        logits, _ = decoder.step(watched, np.zeros(1, int), *feeds(1, 3), caches)
    assert seen[1] == {name: value.data_ptr() for name, value in caches.items()}
    assert logits.shape == (1, decoder.vocabulary)


def test_what_the_runtime_says_of_misshapen_caches_is_an_error_of_ours(llama):
    decoder = llama.base.decoder
    with decoder.adapted([None], [None]) as run:
        two, three = np.ones((2, 1), np.int64), np.ones((3, 1), np.int64)
        _, caches = decoder.step(run, np.zeros(2, int), two, two, two - 1, decoder.empty(2))
        with pytest.raises(RuntimeTargetError, match="onnxruntime failed while running"):
            decoder.step(run, np.zeros(3, int), three, np.ones((3, 2), np.int64), three, caches)


def test_a_pack_whose_adapters_change_keeps_them_while_it_generates(llama):
    """The lease is open from the first piece to the last, or until the iterator is closed."""
    import contextlib

    runner = llama.pack.decoder.runner
    state = []

    @contextlib.contextmanager
    def lease():
        state.append("open")
        try:
            yield
        finally:
            state.append("closed")

    original, runner.lease = runner.lease, lease
    try:
        pieces = llama.pack.stream([Request(prompt="x", adapter="a")])
        assert state == []
        next(pieces)
        assert state == ["open"]
        pieces.close()
        assert state == ["open", "closed"]
        state.clear()
        llama.pack.generate([Request(prompt="x", adapter="a")])
        assert state == ["open", "closed"]
    finally:
        runner.lease = original


def test_who_stays_where() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        count = int(random.integers(1, 12))
        rows = [row for row in range(count) if random.random() < 0.4][: count - 1]
        order, moves = _leave(count, rows)
        assert sorted(order) == [row for row in range(count) if row not in rows]
        array = np.arange(count)
        for place, source in moves:
            array[place] = array[source]
        assert list(array[: len(order)]) == order
        assert len(moves) <= len(rows)
