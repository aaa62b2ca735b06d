"""Inputs that pick rows of a table may name those that there are; branches and casts hide nothing."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from deployfa.graph.index_ranges import index_ranges


def ranges(text: str) -> dict[str, int]:
    return index_ranges(
        ir.from_proto(onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>' + text))
    )


def test_a_lookup_behind_a_cast_and_the_smaller_of_two_tables() -> None:
    text = """g (int64[b, s] ids, int64[b, s] free) => (float[b, s, 2] y)
    <float[5, 2] wide = {0,0,0,0,0,0,0,0,0,0}, float[3, 2] narrow = {0,0,0,0,0,0}> {
        small = Cast<to=6>(ids)
        a = Gather<axis=0>(wide, small)
        b = Gather(narrow, ids)
        y = Add(a, b)
    }"""
    assert ranges(text) == {"ids": 3}


def test_the_axis_counts() -> None:
    text = """g (int64[b] ids) => (float[2, b] y) <float[2, 7] table = {0,0,0,0,0,0,0,0,0,0,0,0,0,0}> {
        y = Gather<axis=-1>(table, ids)
    }"""
    assert ranges(text) == {"ids": 7}


def test_what_is_computed_from_an_input_is_not_the_input() -> None:
    text = """g (int64[b] ids) => (float[b, 2] y)
    <float[3, 2] table = {0,0,0,0,0,0}, int64[1] one = {1}> {
        shifted = Add(ids, one)
        y = Gather(table, shifted)
    }"""
    assert ranges(text) == {}


def test_a_fused_embedding() -> None:
    text = """g (int32[b, s] ids, int32[b, s] kinds) => (float[b, s, 2] y)
    <float[9, 2] words = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}, float[4, 2] places = {0,0,0,0,0,0,0,0},
     float[2, 2] segments = {0,0,0,0}, float[2] gamma = {1,1}, float[2] beta = {0,0}> {
        y, mask = com.microsoft.EmbedLayerNormalization(ids, kinds, words, places, segments, gamma, beta)
    }"""
    assert ranges(text) == {"ids": 9, "kinds": 2}
