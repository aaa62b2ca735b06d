"""Rows against the algebra of the edits, and adapters that no row can hold."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Array, Edit, LowRank, apply_input, fold_matrix
from deployfa.errors import BaseMismatchError, DeployfaError, EditError, SiteError
from deployfa.tables import Head, Layout, LowRanks, base_row, row_of
from deployfa.tables.checks import check_base, check_row
from deployfa.tables.words import SLOTS

from .tiny import FINGERPRINT, HEAD, METHODS, SITES, base_head, draw, make_adapter, make_layout

Row = dict[str, Array]


def vector(layout: Layout, row: Row, part: str, site: str) -> Array | None:
    """What the row's vector of ``part`` holds for ``site``."""
    for vectors in layout.vectors:
        for segment in vectors.segments:
            if (vectors.part, segment.site) == (part, site):
                return row[vectors.name][segment.start : segment.stop].astype(np.float64)
    return None


def low_rank(layout: Layout, row: Row, where: str, site: str) -> tuple[Array, Array] | None:
    """Aᵀ (k, r) and s Bᵀ (r, out) of ``site``."""
    for low in layout.low_ranks:
        if low.where == where and site in low.sites:
            number = low.sites.index(site)
            a = row[low.a_name][:, number * low.rank : (number + 1) * low.rank]
            return a.astype(np.float64), row[low.b_name(site)].astype(np.float64)
    return None


def answer(layout: Layout, row: Row, site: str, weight: Array, bias: Array, x: Array) -> Array:
    """The site's output as a graph reads the row: ``(1 + λ') ⊙ (W ((1+λ) x + (x Aᵀ) s Bᵀ + δ) + c + (x A'ᵀ) s' B'ᵀ)``.

    x: (n, k); weight: (d, k).  Written without the functions of ``deployfa.edits``, which are what it is held against.
    """
    lam, delta, out_lam = (vector(layout, row, part, site) for part in ("lambda", "delta", "out_lambda"))
    inner, outer = (low_rank(layout, row, where, site) for where in ("input", "output"))
    t = x * (1.0 + (0.0 if lam is None else lam)) + (0.0 if delta is None else delta)
    t = t if inner is None else t + x @ inner[0] @ inner[1]
    y = t @ weight.T + bias
    y = y if outer is None else y + x @ outer[0] @ outer[1]
    return y * (1.0 + (0.0 if out_lam is None else out_lam))


def expected(edit: Edit | None, weight: Array, bias: Array, x: Array) -> Array:
    if edit is None:
        return x @ weight.T + bias
    y = apply_input(edit, x) @ weight.T + bias
    if edit.output_low_rank is not None:
        y = y + x @ edit.output_low_rank.delta().T
    return y if edit.output_scale is None else y * (1.0 + edit.output_scale.astype(np.float64))


def bound(edit: Edit | None, weight: Array, bias: Array, x: Array) -> Array:
    """How far one rounding to float32 of every number in the row may move the answer.

    A row stores λ, δ, λ' and A as they are and rounds s B once, by at most 2⁻²⁴ of itself: the answer moves by at most
    that share of the sum of the absolute products that it goes through.
    """
    if edit is None:
        return np.zeros(1)
    total = np.zeros((len(x), weight.shape[0]))
    for low, outer in ((edit.input_low_rank, np.abs(weight)), (edit.output_low_rank, np.eye(weight.shape[0]))):
        if low is not None:
            total += (
                np.abs(x) @ np.abs(low.a.astype(np.float64)).T @ np.abs(low.s * low.b.astype(np.float64)).T @ outer.T
            )
    scale = 1.0 if edit.output_scale is None else np.abs(1.0 + edit.output_scale.astype(np.float64))
    # 1e-12: the float64 sums, of at most some twenty terms of size ten
    return 2.0**-24 * total * scale + 1e-12


def problem(site: str) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(7)
    k, d = SITES[site]
    return rng.standard_normal((d, k)), rng.standard_normal(d), rng.standard_normal((3, k))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("method", METHODS)
def test_a_row_answers_as_its_adapter(layout: Layout, base: Row, method: str, site: str) -> None:
    adapter = make_adapter(method)
    row = row_of(adapter, layout, base)
    weight, bias, x = problem(site)
    edit = adapter.edits.get(site)
    error = np.abs(answer(layout, row, site, weight, bias, x) - expected(edit, weight, bias, x))
    assert (error <= bound(edit, weight, bias, x)).all()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "head"])
def test_the_comparison_sees_each_number_of_an_edit(layout: Layout, base: Row, method: str) -> None:
    """Corrupt one number of every tensor that the adapter fills: the answer of some site must leave the bound."""
    adapter = make_adapter(method)
    row = row_of(adapter, layout, base)
    filled = [
        name for name, array in row.items() if name not in {"adapter/classifier/weight", "adapter/classifier/bias"}
    ]
    filled = [name for name in filled if row[name].any()]
    assert filled
    for name in filled:
        damaged = row | {name: row[name].copy()}
        where = tuple(np.argwhere(row[name])[-1])
        damaged[name][where] *= 1.001
        seen = False
        for site in SITES:
            weight, bias, x = problem(site)
            edit = adapter.edits.get(site)
            error = np.abs(answer(layout, damaged, site, weight, bias, x) - expected(edit, weight, bias, x))
            seen |= bool((error > bound(edit, weight, bias, x)).any())
        assert seen, name


@pytest.mark.parametrize("method", METHODS)
def test_what_an_adapter_does_not_bring_is_the_base(layout: Layout, base: Row, method: str) -> None:
    row = row_of(make_adapter(method), layout, base)
    brought = {
        "vefa": {"adapter/lambda"},
        "shift": {"adapter/delta"},
        "ia3": {"adapter/lambda", "adapter/out_lambda"},
        "lorfa": {"adapter/q/A", "adapter/q/B", "adapter/k/B"},
        "lora": {"adapter/up/out_A", "adapter/up/out_B"},
        "mixture": {
            *("adapter/lambda", "adapter/delta", "adapter/out_lambda"),
            *("adapter/q/A", "adapter/k/B", "adapter/up/out_A", "adapter/up/out_B"),
        },
        "head": {"adapter/classifier/weight", "adapter/classifier/bias"},
    }[method]
    assert {name for name in row if not np.array_equal(row[name], base[name])} == brought
    check_row(layout, row)


# a LoRFA that is added to the output


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a LoRA"])
def test_a_lorfa_becomes_a_lora_where_the_layout_adds_to_the_output(base: Row, beside: bool) -> None:
    layout = make_layout(low_ranks=[LowRanks(where="output", sites=["up"], in_features=8, rank=4, widths=[3])])
    rng = np.random.default_rng(5)
    edit = Edit(
        lam=draw(rng, 8),
        input_low_rank=LowRank(draw(rng, 2, 8), draw(rng, 8, 2), 0.75),
        output_low_rank=LowRank(draw(rng, 1, 8), draw(rng, 3, 1), 0.5) if beside else None,
    )
    weight, bias, x = problem("up")
    row = row_of(make_adapter("mixture", edits={"up": edit}), layout, base, weights={"up": lambda: weight})
    assert edit.input_low_rank is not None
    # s W B is rounded where s B was: the same products, so the same bound
    error = np.abs(answer(layout, row, "up", weight, bias, x) - expected(edit, weight, bias, x))
    assert (error <= bound(edit, weight, bias, x)).all()
    assert not row["adapter/up/out_A"][:, 3 if beside else 2 :].any()
    other = row_of(make_adapter("mixture", edits={"up": edit}), layout, base, weights={"up": lambda: weight * 1.001})
    error = np.abs(answer(layout, other, "up", weight, bias, x) - expected(edit, weight, bias, x))
    assert (error > bound(edit, weight, bias, x)).any()


def test_two_low_ranks_of_one_site_share_its_room(base: Row) -> None:
    layout = make_layout(low_ranks=[LowRanks(where="output", sites=["up"], in_features=8, rank=2, widths=[3])])
    edit = Edit(
        input_low_rank=LowRank(np.ones((2, 8)), np.ones((8, 2)), 1.0),
        output_low_rank=LowRank(np.ones((1, 8)), np.ones((3, 1)), 1.0),
    )
    with pytest.raises(EditError, match=r"site 'up': the adapter has rank 3, the table has room for 2; .*--max-rank 3"):
        row_of(make_adapter("mixture", edits={"up": edit}), layout, base, weights={"up": lambda: np.ones((3, 8))})


@pytest.mark.parametrize(("shape", "says"), [((3, 7), "layer of 7 inputs; "), ((4, 8), "do not fit 8 → 3 features; ")])
def test_weights_that_do_not_fit(base: Row, shape: tuple[int, int], says: str) -> None:
    layout = make_layout(low_ranks=[LowRanks(where="output", sites=["up"], in_features=8, rank=2, widths=[3])])
    edit = Edit(input_low_rank=LowRank(np.ones((2, 8)), np.ones((8, 2)), 1.0))
    with pytest.raises(EditError, match=f"site 'up': .*{says}"):
        row_of(make_adapter("lorfa", edits={"up": edit}), layout, base, weights={"up": lambda: np.ones(shape)})


def test_a_kernel_of_one_point_is_none(layout: Layout, base: Row) -> None:
    rng = np.random.default_rng(0)
    a, b = draw(rng, 2, 8), draw(rng, 3, 2)
    flat = row_of(make_adapter("lora", edits={"up": Edit(output_low_rank=LowRank(a, b, 1.0))}), layout, base)
    conv = LowRank(a.reshape(2, 8, 1, 1), b, 1.0)
    row = row_of(make_adapter("lora", edits={"up": Edit(output_low_rank=conv)}), layout, base)
    assert all(np.array_equal(row[name], flat[name]) for name in flat)


def test_segments_go_to_their_own_sites(layout: Layout, base: Row) -> None:
    adapter = make_adapter("vefa")
    lam = row_of(adapter, layout, base)["adapter/lambda"]
    np.testing.assert_array_equal(lam[:5], adapter.edits["q"].lam)
    np.testing.assert_array_equal(lam[5:], adapter.edits["up"].lam)


def test_a_smaller_rank_leaves_the_rest_of_its_room_zero(layout: Layout, base: Row) -> None:
    row = row_of(make_adapter("lorfa"), layout, base)
    a, b = row["adapter/q/A"], row["adapter/k/B"]
    assert a[:, :5].all() and not a[:, 5:].any()
    assert b[:2].all() and not b[2:].any()


def test_the_scale_is_in_b_alone_and_rounded_once(layout: Layout, base: Row) -> None:
    low = LowRank(draw(np.random.default_rng(0), 3, 5), draw(np.random.default_rng(1), 5, 3), 0.1)
    row = row_of(make_adapter("lorfa", edits={"q": Edit(input_low_rank=low)}), layout, base)
    np.testing.assert_array_equal(row["adapter/q/A"][:, :3], low.a.T)
    np.testing.assert_array_equal(row["adapter/q/B"], (0.1 * low.b.T.astype(np.float64)).astype(np.float32))
    # 0.1 is no float32: rounded before the product as well as after it, it gives other numbers
    assert (row["adapter/q/B"] != np.float32(0.1) * low.b.T).any()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_any_float_becomes_float32(layout: Layout, base: Row, dtype: Any) -> None:
    lam = np.linspace(-1, 1, 5).astype(dtype)
    row = row_of(make_adapter("vefa", edits={"q": Edit(lam=lam)}), layout, base)
    assert all(array.dtype == np.float32 for array in row.values())
    np.testing.assert_array_equal(row["adapter/lambda"][:5], lam.astype(np.float64).astype(np.float32))


def test_an_adapter_without_edits_is_the_base(layout: Layout, base: Row) -> None:
    row = row_of(make_adapter("vefa", edits={}), layout, base)
    for name in base:
        np.testing.assert_array_equal(row[name], base[name])


# the base


def test_the_base_is_zeros_and_its_head(layout: Layout) -> None:
    weight, bias = base_head()
    row = base_row(layout, {HEAD: (weight, bias)})
    check_base(layout, row)
    assert row["adapter/classifier/bias"].tolist() == [*bias.tolist(), -np.inf, -np.inf]
    np.testing.assert_array_equal(row["adapter/classifier/weight"], np.pad(weight.T, ((0, 0), (0, 2))))
    assert base_row(layout, {HEAD: (weight, None)})["adapter/classifier/bias"].tolist() == [0, 0, -np.inf, -np.inf]


# heads


def head_answer(row: Row, x: Array) -> Array:
    weight, bias = row["adapter/classifier/weight"], row["adapter/classifier/bias"]
    return x @ weight.astype(np.float64) + bias.astype(np.float64)


@pytest.mark.parametrize("labels", [1, 2, 3, 4])
def test_a_head_with_any_number_of_labels(layout: Layout, base: Row, labels: int) -> None:
    adapter = make_adapter("head", seed=labels - 1)
    module = adapter.modules[HEAD]
    assert module["bias"].shape == (labels,)
    row = row_of(adapter, layout, base)
    x = np.random.default_rng(1).standard_normal((2, 3))
    logits = head_answer(row, x)
    # equal up to the order in which float64 adds: no rounding happened, the head is float32 already
    np.testing.assert_allclose(
        logits[:, :labels], x @ module["weight"].T.astype(np.float64) + module["bias"], rtol=1e-14
    )
    assert np.isneginf(logits[:, labels:]).all()
    softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert not softmax[:, labels:].any() and np.isfinite(softmax).all()


def test_a_head_without_a_bias(layout: Layout, base: Row) -> None:
    weight = draw(np.random.default_rng(0), 3, 3)
    row = row_of(make_adapter("vefa", modules={HEAD: {"weight": weight}}), layout, base)
    assert row["adapter/classifier/bias"].tolist() == [0, 0, 0, -np.inf]


def test_a_module_of_several_layers(base: Row) -> None:
    rng = np.random.default_rng(0)
    heads = [
        Head(site="head.dense", in_features=3, out_features=3),
        Head(site="head.out", in_features=3, out_features=2),
    ]
    layout = make_layout(heads=heads)
    dense, out = (draw(rng, 3, 3), draw(rng, 3)), (draw(rng, 2, 3), draw(rng, 2))
    base = base_row(layout, {"head.dense": (draw(rng, 3, 3), None), "head.out": (draw(rng, 2, 3), None)})
    module = {"dense.weight": dense[0], "dense.bias": dense[1], "out.weight": out[0], "out.bias": out[1]}
    row = row_of(make_adapter("vefa", modules={"head": module}), layout, base)
    np.testing.assert_array_equal(row["adapter/head.dense/weight"], dense[0].T)
    np.testing.assert_array_equal(row["adapter/head.out/weight"], out[0].T)
    np.testing.assert_array_equal(row["adapter/head.out/bias"], out[1])


def head_edit(outputs: int) -> Edit:
    rng = np.random.default_rng(3)
    return Edit(
        lam=draw(rng, 3),
        delta=draw(rng, 3),
        input_low_rank=LowRank(draw(rng, 2, 3), draw(rng, 3, 2), 0.5),
        output_scale=draw(rng, outputs),
    )


@pytest.mark.parametrize("own", [True, False], ids=["its own head", "the base's head"])
def test_an_edit_of_the_head_is_folded_into_it(layout: Layout, base: Row, own: bool) -> None:
    adapter = make_adapter("head", seed=2) if own else make_adapter("vefa")
    weight, bias = (adapter.modules[HEAD]["weight"], adapter.modules[HEAD]["bias"]) if own else base_head()
    edit = head_edit(len(bias))
    adapter = make_adapter("mixture", edits={HEAD: edit}, modules=adapter.modules)
    row = row_of(adapter, layout, base)
    labels = len(bias)
    x = np.random.default_rng(1).standard_normal((2, 3))
    folded = fold_matrix(edit, weight, bias)
    np.testing.assert_array_equal(row["adapter/classifier/weight"][:, :labels], folded[0].T.astype(np.float32))
    assert folded[1] is not None
    np.testing.assert_array_equal(row["adapter/classifier/bias"][:labels], folded[1].astype(np.float32))
    assert np.isneginf(head_answer(row, x)[:, labels:]).all()
    # every weight and the bias are rounded once
    slack = 2.0**-24 * (np.abs(x) @ np.abs(folded[0]).T + np.abs(folded[1])) + 1e-13
    assert (np.abs(head_answer(row, x)[:, :labels] - expected(edit, weight, bias, x)) <= slack).all()


# refusals: (fields of the adapter, error, what the line must say)

NAN = np.array([1, np.nan, 1, 1, 1], np.float32)
ONE = np.ones


def low(a: Array, b: Array, s: float = 1.0) -> LowRank:
    return LowRank(a, b, s)


REFUSED: dict[str, tuple[dict[str, Any], type[DeployfaError], str]] = {
    "unknown site": ({"edits": {"q2": Edit(lam=ONE(5))}}, SiteError, "site 'q2' not found; sites in this graph: "),
    "no place for the part": (
        {"edits": {"q": Edit(delta=ONE(5))}},
        SiteError,
        "site 'q' has no place for 'delta' here, only for: A, lambda; pack again with this adapter",
    ),
    "LoRFA where LoRA goes": (
        {"edits": {"up": Edit(input_low_rank=low(ONE((1, 8)), ONE((8, 1))))}},
        EditError,
        "site 'up' takes a LoRFA as the LoRA that equals it, which needs the base's weights; make it with: deployfa",
    ),
    "a flat A": ({"edits": {"q": Edit(input_low_rank=low(ONE(5), ONE((5, 1))))}}, EditError, "site 'q': A (5,) and B"),
    "a flat B": (
        {"edits": {"q": Edit(input_low_rank=low(ONE((1, 5)), ONE(5)))}},
        EditError,
        "site 'q': A (1, 5) and B (5,) do not fit 5 → 5 features",
    ),
    "LoRA where LoRFA goes": (
        {"edits": {"q": Edit(output_low_rank=low(ONE((1, 5)), ONE((7, 1))))}},
        SiteError,
        "site 'q' has no place for a LoRA here, only for a LoRFA; pack again with this adapter",
    ),
    "NaN": ({"edits": {"q": Edit(lam=NAN)}}, EditError, "site 'q': lambda holds NaN, infinity"),
    "infinity": ({"edits": {"k": Edit(output_scale=ONE(6) * np.inf)}}, EditError, "site 'k': out_lambda holds NaN"),
    "beyond float32": ({"edits": {"up": Edit(delta=ONE(8) * 1e39)}}, EditError, "delta holds NaN, infinity or a value"),
    "a product beyond float32": (
        {"edits": {"q": Edit(input_low_rank=low(ONE((1, 5)), ONE((5, 1)) * 1e30, 1e30))}},
        EditError,
        "site 'q': B holds NaN, infinity or a value beyond float32",
    ),
    "NaN in A": (
        {"edits": {"q": Edit(input_low_rank=low(NAN[None], ONE((5, 1))))}},
        EditError,
        "site 'q': A holds NaN",
    ),
    "NaN as s": (
        {"edits": {"q": Edit(input_low_rank=low(ONE((1, 5)), ONE((5, 1)), float("nan")))}},
        EditError,
        "site 'q': B holds NaN",
    ),
    "a vector too long": (
        {"edits": {"q": Edit(lam=ONE(6))}},
        EditError,
        "lambda has shape (6,), the layer has 5 features",
    ),
    "a vector of one": (
        {"edits": {"q": Edit(lam=ONE(1))}},
        EditError,
        "lambda has shape (1,), the layer has 5 features",
    ),
    "A of another width": (
        {"edits": {"q": Edit(input_low_rank=low(ONE((1, 4)), ONE((5, 1))))}},
        EditError,
        "site 'q': A (1, 4) and B (5, 1) do not fit 5 → 5 features",
    ),
    "B of another width": (
        {"edits": {"up": Edit(output_low_rank=low(ONE((1, 8)), ONE((4, 1))))}},
        EditError,
        "site 'up': A (1, 8) and B (4, 1) do not fit 8 → 3 features",
    ),
    "B of one output": (
        {"edits": {"up": Edit(output_low_rank=low(ONE((1, 8)), ONE((1, 1))))}},
        EditError,
        "do not fit 8 → 3 features",
    ),
    "two ranks": (
        {"edits": {"q": Edit(input_low_rank=low(ONE((2, 5)), ONE((5, 1))))}},
        EditError,
        "site 'q': A (2, 5) and B (5, 1) do not fit",
    ),
    "a kernel": (
        {"edits": {"up": Edit(output_low_rank=low(ONE((1, 8, 3, 3)), ONE((3, 1))))}},
        EditError,
        "A (1, 8, 3, 3) and B (3, 1) do not fit",
    ),
    "a rank beyond the room": (
        {"edits": {"q": Edit(input_low_rank=low(ONE((4, 5)), ONE((5, 4))))}},
        EditError,
        "site 'q': the adapter has rank 4, the table has room for 3; pack again with --max-rank 4",
    ),
    "another module": (
        {"modules": {"pooler": {"weight": ONE((3, 3))}}},
        SiteError,
        "module 'pooler': 'weight' has no place here; heads with a place: classifier",
    ),
    "another parameter": (
        {"modules": {HEAD: {"weight": ONE((2, 3)), "scale": ONE(2)}}},
        SiteError,
        "module 'classifier': 'scale' has no place here",
    ),
    "a bias alone": (
        {"modules": {HEAD: {"bias": ONE(2)}}},
        EditError,
        "module 'classifier' brings a bias and no weight; the adapter file is incomplete",
    ),
    "a head of another width": (
        {"modules": {HEAD: {"weight": ONE((2, 4))}}},
        EditError,
        "module 'classifier': weight has shape (2, 4), the layer has 3 inputs",
    ),
    "a head's bias of another width": (
        {"modules": {HEAD: {"weight": ONE((2, 3)), "bias": ONE(1)}}},
        EditError,
        "module 'classifier': weight has shape (2, 3) and bias (1,); the adapter file is damaged",
    ),
    "a flat head": ({"modules": {HEAD: {"weight": ONE(3)}}}, EditError, "module 'classifier': weight has shape (3,)"),
    "too many labels": (
        {"modules": {HEAD: {"weight": ONE((5, 3))}}},
        EditError,
        "module 'classifier': the adapter has 5 labels, the table has room for 4; pack again with --max-labels 5",
    ),
    "no labels": (
        {"modules": {HEAD: {"weight": ONE((0, 3))}}},
        EditError,
        "module 'classifier': weight has shape (0, 3)",
    ),
    "NaN in a head": (
        {"modules": {HEAD: {"weight": ONE((2, 3)) * np.nan}}},
        EditError,
        "site 'classifier': weight holds NaN",
    ),
    # minus infinity is how the table masks; an adapter may not bring it
    "a masked label of its own": (
        {"modules": {HEAD: {"weight": ONE((2, 3)), "bias": np.array([1, -np.inf])}}},
        EditError,
        "site 'classifier': bias holds NaN, infinity",
    ),
    "an edit of the head of another width": ({"edits": {HEAD: Edit(lam=ONE(4))}}, EditError, "has in_features 3"),
    "an edit of the head that is NaN": (
        {"edits": {HEAD: Edit(lam=ONE(3) * np.nan)}},
        EditError,
        "site 'classifier': lambda holds NaN or infinity",
    ),
    "an edit on a head of another width": (
        {"edits": {HEAD: Edit(lam=ONE(3))}, "modules": {HEAD: {"weight": ONE((2, 4))}}},
        EditError,
        "module 'classifier': weight has shape (2, 4), the layer has 3 inputs",
    ),
    "an edit on a flat head": (
        {"edits": {HEAD: Edit(lam=ONE(3))}, "modules": {HEAD: {"weight": ONE(3)}}},
        EditError,
        "module 'classifier': weight has shape (3,)",
    ),
    "an edit on a head with another bias": (
        {"edits": {HEAD: Edit(delta=ONE(3))}, "modules": {HEAD: {"weight": ONE((2, 3)), "bias": ONE(3)}}},
        EditError,
        "module 'classifier': weight has shape (2, 3) and bias (3,)",
    ),
    "an edit that makes a head overflow": (
        {"edits": {HEAD: Edit(lam=ONE(3) * 1e30)}, "modules": {HEAD: {"weight": ONE((2, 3)) * 1e30}}},
        EditError,
        "site 'classifier': weight holds NaN, infinity or a value beyond float32",
    ),
    "a head that is one number": ({"modules": {HEAD: {"weight": ONE(())}}}, EditError, "weight has shape ()"),
    "no fingerprint": ({"base": BaseReference(name="tiny")}, BaseMismatchError, "--allow-base-mismatch"),
    "another base": (
        {"base": BaseReference(name="other", fingerprint="sha256:feedfeedfeedfeed")},
        BaseMismatchError,
        "the adapter was trained on base feedfeedfeed (other), the table is for base 0123456789ab, another; pack it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_row_can_hold_is_refused(layout: Layout, base: Row, case: str) -> None:
    changes, kind, says = REFUSED[case]
    with pytest.raises(kind) as caught:
        row_of(make_adapter("vefa", **({"edits": {}} | changes)), layout, base)
    text = str(caught.value)
    assert says in text and "; " in text and "\n" not in text


@pytest.mark.parametrize("case", REFUSED)
def test_slots_refuse_the_same_in_their_own_words(layout: Layout, base: Row, case: str) -> None:
    """Neither word of a table where the row is a slot's; whatever names the adapter brings stay as they are."""
    changes, kind, _ = REFUSED[case]
    with pytest.raises(kind) as caught:
        row_of(make_adapter("vefa", **({"edits": {}} | changes)), layout, base, words=SLOTS)
    text = str(caught.value)
    assert "; " in text and "table" not in text and "pack" not in text


def test_a_name_that_says_table_is_not_reworded(layout: Layout, base: Row) -> None:
    named = BaseReference(name="the table is here", fingerprint="sha256:feedfeedfeedfeed")
    with pytest.raises(BaseMismatchError, match=r"feedfeedfeed \(the table is here\), the bundle is for base"):
        row_of(make_adapter("vefa", edits={}, base=named), layout, base, words=SLOTS)


@pytest.mark.parametrize("base_name", ["no fingerprint", "another base"])
def test_another_base_on_request(layout: Layout, base: Row, base_name: str) -> None:
    adapter = make_adapter("vefa", **REFUSED[base_name][0])
    ours = row_of(make_adapter("vefa"), layout, base)
    row = row_of(adapter, layout, base, allow_mismatch=True)
    assert all(np.array_equal(row[name], ours[name]) for name in ours)


def test_a_refusal_without_a_place_for_any_low_rank(base: Row) -> None:
    with pytest.raises(SiteError, match="site 'q' has no place for 'A' here, only for: lambda; pack again"):
        row_of(make_adapter("lorfa"), make_layout(low_ranks=[]), base)


def test_any_of_the_layouts_bases_will_do(layout: Layout, base: Row) -> None:
    assert layout.fingerprints == [FINGERPRINT, "sha256:another"]
    row_of(make_adapter("vefa", base=BaseReference(fingerprint="sha256:another")), layout, base)


def test_a_refusal_of_heads_says_that_there_are_none(base: Row) -> None:
    adapter = make_adapter("head")
    with pytest.raises(SiteError, match="heads with a place: none"):
        row_of(adapter, make_layout(heads=[]), base)


def test_the_adapter_and_the_base_stay_as_they_were(layout: Layout, base: Row) -> None:
    adapter: Adapter = make_adapter("mixture", modules=make_adapter("head", seed=1).modules)
    before = {name: array.copy() for name, array in (adapter.tensors() | base).items()}
    row = row_of(adapter, layout, base)
    for array in row.values():
        array[:] = 0
    for name, array in (adapter.tensors() | base).items():
        np.testing.assert_array_equal(array, before[name])


# the checks on rows


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("adapter/lambda", np.zeros(12, np.float32), "'adapter/lambda' is float32 (12,) in a row, float32 (13,)"),
        ("adapter/lambda", np.zeros(13), "'adapter/lambda' is float64 (13,) in a row"),
        ("adapter/delta", np.full(13, np.nan, np.float32), "'adapter/delta' holds NaN or infinity"),
        ("adapter/delta", np.full(13, -np.inf, np.float32), "'adapter/delta' holds NaN or infinity"),
        ("adapter/classifier/bias", np.array([1, np.nan, -np.inf, -np.inf], np.float32), "bias' holds NaN"),
        ("adapter/classifier/bias", np.array([1, np.inf, -np.inf, -np.inf], np.float32), "bias' holds NaN"),
        ("adapter/classifier/bias", np.array([1, -np.inf, 1, -np.inf], np.float32), "bias' holds NaN"),
        ("adapter/classifier/bias", np.full(4, -np.inf, np.float32), "bias' holds NaN"),
        ("adapter/other", np.zeros(1, np.float32), "a row has 'adapter/other'"),
        ("adapter/q/B", None, "a row lacks 'adapter/q/B'"),
    ],
)
def test_a_row_that_is_none_is_refused(layout: Layout, base: Row, name: str, value: Array | None, says: str) -> None:
    row = base | {name: value}
    if value is None:
        del row[name]
    with pytest.raises(EditError) as caught:
        check_row(layout, row)
    assert says in str(caught.value) and "; " in str(caught.value)


@pytest.mark.parametrize("name", ["adapter/lambda", "adapter/q/A", "adapter/up/out_B"])
def test_a_base_that_changes_something_is_refused(layout: Layout, base: Row, name: str) -> None:
    base[name] = base[name].copy()
    base[name].flat[-1] = 1e-30
    check_row(layout, base)
    with pytest.raises(EditError, match=f"'{name}' of the base's row is not zero; make it with base_row"):
        check_base(layout, base)


def test_room_for_low_ranks_is_checked_site_by_site(base: Row) -> None:
    """Two sites that read one input have room for the same rank, and each its own."""
    layout = make_layout(low_ranks=[LowRanks(where="input", sites=["q", "k"], in_features=5, rank=1, widths=[5, 5])])
    with pytest.raises(EditError, match="site 'q': the adapter has rank 3, the table has room for 1"):
        row_of(make_adapter("lorfa"), layout, base)
