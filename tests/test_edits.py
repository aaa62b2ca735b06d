"""The folds against ``T(x)`` followed by the layer, both in float64, and the mistakes that the comparison must see."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from deployfa.edits import Edit, LowRank, apply_input, fold_conv, fold_matrix
from deployfa.errors import EditError

PARTS = ("lam", "input_low_rank", "delta", "output_low_rank", "output_scale")
EPS = 2.0**-53
FAST = settings(max_examples=60)


def make_edit(rng, parts, k, d, kernel=(), dtype=np.float64):
    """A perturbed edit: no part is near the identity."""

    def draw(*shape):
        return (rng.standard_normal(shape) + np.sign(rng.standard_normal(shape)) * 0.2).astype(dtype)

    made = {}
    if "lam" in parts:
        made["lam"] = draw(k)
    if "delta" in parts:
        made["delta"] = draw(k)
    if "input_low_rank" in parts:
        made["input_low_rank"] = LowRank(draw(2, k), draw(k, 2), 0.75)
    if "output_low_rank" in parts:
        made["output_low_rank"] = LowRank(draw(2, k, *kernel), draw(d, 2), 1.5)
    if "output_scale" in parts:
        made["output_scale"] = draw(d)
    return Edit(**made)


def absolute(edit):
    """The edit with every number made positive: what it yields bounds the size of every intermediate."""

    def low(pair):
        return None if pair is None else LowRank(abs(pair.a), abs(pair.b), abs(pair.s))

    def factor(lam):
        return None if lam is None else abs(1 + lam) - 1

    delta = None if edit.delta is None else abs(edit.delta)
    low_ranks = low(edit.input_low_rank), low(edit.output_low_rank)
    return Edit(factor(edit.lam), low_ranks[0], delta, low_ranks[1], factor(edit.output_scale))


def dense(edit, w, c, x):
    """``(1 + λ') (W T(x) + c + s' B' (A' x))``, step by step."""
    y = apply_input(edit, x) @ w.T
    if edit.output_low_rank is not None:
        low = edit.output_low_rank
        y = y + low.s * ((x @ low.a.T) @ low.b.T)
    y = y if c is None else y + c
    return y if edit.output_scale is None else y * (1 + edit.output_scale)


def conv(x, w, c, groups=1, stride=1):
    """A convolution without padding.  x: (n, k, *space), w: (d, k/groups, *kernel)."""
    rank = w.ndim - 2
    windows = sliding_window_view(x, w.shape[2:], axis=tuple(range(2, x.ndim)))
    windows = windows[(slice(None), slice(None), *[slice(None, None, stride)] * rank)]
    n, k = windows.shape[:2]
    grouped = windows.reshape(n, groups, k // groups, *windows.shape[2:])
    filters = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
    axes = "abc"[:rank]
    kernel = "xyz"[:rank]
    y = np.einsum(f"ngi{axes}{kernel},goi{kernel}->ngo{axes}", grouped, filters)
    y = y.reshape(n, w.shape[0], *y.shape[3:])
    return y if c is None else y + c.reshape(-1, *[1] * rank)


def conv_truth(edit, w, c, x, groups=1):
    y = conv(apply_input(edit, x, axis=1), w, c, groups)
    low = edit.output_low_rank
    if low is not None:
        inner = conv(x, low.a, None)
        y = y + low.s * np.einsum("or,nr...->no...", low.b, inner)
    return y if edit.output_scale is None else y * (1 + edit.output_scale).reshape(-1, *[1] * (w.ndim - 2))


def close(actual, expected, magnitude, terms):
    """Two float64 results of ``terms`` roundings each on numbers whose absolute values add up to ``magnitude``."""
    return bool(np.all(np.abs(actual - expected) <= 2 * terms * EPS * magnitude))


dims = st.tuples(st.integers(1, 6), st.integers(1, 6)) | st.integers(1, 6).map(lambda n: (n, n))
part_sets = st.sets(st.sampled_from(PARTS))


@FAST
@given(part_sets, dims, st.booleans(), st.integers(0, 10**6))
def test_fold_matrix(parts, shape, biased, seed):
    (k, d), rng = shape, np.random.default_rng(seed)
    edit = make_edit(rng, parts, k, d)
    w, x = rng.standard_normal((d, k)), rng.standard_normal((3, k))
    c = rng.standard_normal(d) if biased else None
    folded, bias = fold_matrix(edit, w, c)
    assert folded.dtype == np.float64 and folded.shape == w.shape
    assert (bias is None) == (c is None and "delta" not in parts)
    y = x @ folded.T + (0 if bias is None else bias)
    magnitude = dense(absolute(edit), abs(w), None if c is None else abs(c), abs(x))
    assert close(y, dense(edit, w, c, x), magnitude, terms=2 * k + 16)


@FAST
@given(part_sets, st.integers(1, 2), st.sampled_from([1, 2, 3]), dims, st.booleans(), st.integers(0, 10**6))
def test_fold_conv(parts, rank, groups, shape, biased, seed):
    (k, d), rng = (shape[0] * groups, shape[1] * groups), np.random.default_rng(seed)
    kernel = (2, 3)[:rank]
    if groups > 1:
        parts = parts - {"input_low_rank", "output_low_rank"}
    edit = make_edit(rng, parts, k, d, kernel)
    w, x = rng.standard_normal((d, k // groups, *kernel)), rng.standard_normal((2, k, 4, 5)[: 2 + rank])
    c = rng.standard_normal(d) if biased else None
    folded, bias = fold_conv(edit, w, c, groups=groups)
    assert folded.shape == w.shape and (bias is None) == (c is None and "delta" not in parts)
    magnitude = conv_truth(absolute(edit), abs(w), None if c is None else abs(c), abs(x), groups)
    actual = conv(x, folded, bias, groups)
    assert close(actual, conv_truth(edit, w, c, x, groups), magnitude, terms=2 * w[0].size + 2 * k + 16)


@pytest.mark.parametrize("parts", [("input_low_rank",), ("output_low_rank",)])
def test_low_rank_before_a_grouped_convolution_is_refused(parts):
    rng = np.random.default_rng(0)
    with pytest.raises(EditError, match="grouped convolution"):
        fold_conv(make_edit(rng, parts, 4, 4, (3,)), rng.standard_normal((4, 2, 3)), None, groups=2)


def swap_rows(array):
    return array[[1, 0, *range(2, len(array))]]


MISTAKES = {
    "wrong axis": lambda edit, w, c: (w * (1 + edit.lam)[:, None], c + w @ edit.delta),
    "shift dropped": lambda edit, w, c: (fold_matrix(edit, w, c)[0], c),
    "bias dropped": lambda edit, w, c: (fold_matrix(edit, w, c)[0], w @ edit.delta),
    "bias scaled": lambda edit, w, c: (fold_matrix(edit, w, c)[0], c * (1 + edit.lam) + w @ edit.delta),
    "rows swapped": lambda edit, w, c: (swap_rows(fold_matrix(edit, w, c)[0]), c + w @ edit.delta),
    "bias rows swapped": lambda edit, w, c: (fold_matrix(edit, w, c)[0], swap_rows(c + w @ edit.delta)),
    "transposed": lambda edit, w, c: (fold_matrix(edit, w, c)[0].T, c + w @ edit.delta),
    "transposed shift": lambda edit, w, c: (fold_matrix(edit, w, c)[0], c + w.T @ edit.delta),
    "folded twice": lambda edit, w, c: (fold_matrix(edit, fold_matrix(edit, w, c)[0], None)[0], c + w @ edit.delta),
    "one float32 rounding": lambda edit, w, c: (
        fold_matrix(edit, w, c)[0].astype(np.float32).astype(np.float64),
        c + w @ edit.delta,
    ),
    "s forgotten": lambda edit, w, c: (
        fold_matrix(Edit(edit.lam, LowRank(edit.input_low_rank.a, edit.input_low_rank.b, 1.0)), w, c)[0],
        c + w @ edit.delta,
    ),
    "A and B swapped": lambda edit, w, c: (
        fold_matrix(Edit(edit.lam, LowRank(edit.input_low_rank.b.T, edit.input_low_rank.a.T, 0.75)), w, c)[0],
        c + w @ edit.delta,
    ),
}


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_the_comparison_sees_a_mistake_on_a_square_weight(mistake):
    rng = np.random.default_rng(7)
    n = 5
    edit = make_edit(rng, PARTS[:3], n, n)
    w, c, x = rng.standard_normal((n, n)), rng.standard_normal(n), rng.standard_normal((3, n))
    folded, bias = MISTAKES[mistake](edit, w, c) if mistake else fold_matrix(edit, w, c)
    magnitude = dense(absolute(edit), abs(w), abs(c), abs(x))
    assert close(x @ folded.T + bias, dense(edit, w, c, x), magnitude, terms=2 * n + 12) == (mistake is None)


def test_the_comparison_sees_channels_scaled_in_the_wrong_group():
    rng = np.random.default_rng(8)
    edit = make_edit(rng, ("lam", "delta"), 4, 4)
    w, c, x = rng.standard_normal((4, 2, 3)), rng.standard_normal(4), rng.standard_normal((2, 4, 6))
    magnitude = conv_truth(absolute(edit), abs(w), abs(c), abs(x), 2)
    truth = conv_truth(edit, w, c, x, 2)
    swapped = Edit(lam=np.roll(edit.lam, 2), delta=edit.delta)
    for given_edit, right in ((edit, True), (swapped, False)):
        folded, bias = fold_conv(given_edit, w, c, groups=2)
        assert close(conv(x, folded, bias, 2), truth, magnitude, terms=2 * 6 + 8 + 12) == right


OUTPUT_MISTAKES = {
    "bias not scaled": lambda edit, w, c: (fold_matrix(edit, w, None)[0], c + fold_matrix(edit, w, None)[1]),
    "shift not scaled": lambda edit, w, c: (fold_matrix(edit, w, c)[0], (1 + edit.output_scale) * c + w @ edit.delta),
    "wrong axis": lambda edit, w, c: (
        fold_matrix(Edit(edit.lam, delta=edit.delta), w, None)[0] * (1 + edit.output_scale),
        fold_matrix(edit, w, c)[1],
    ),
    "λ for 1 + λ": lambda edit, w, c: fold_matrix(Edit(edit.lam, None, edit.delta, None, edit.output_scale - 1), w, c),
    "scaled twice": lambda edit, w, c: fold_matrix(Edit(output_scale=edit.output_scale), *fold_matrix(edit, w, c)),
}


@pytest.mark.parametrize("mistake", [None, *OUTPUT_MISTAKES])
def test_the_comparison_sees_a_mistake_in_an_output_scale(mistake):
    rng = np.random.default_rng(9)
    n = 5
    edit = make_edit(rng, ("lam", "delta", "output_scale"), n, n)
    w, c, x = rng.standard_normal((n, n)), rng.standard_normal(n), rng.standard_normal((3, n))
    folded, bias = OUTPUT_MISTAKES[mistake](edit, w, c) if mistake else fold_matrix(edit, w, c)
    magnitude = dense(absolute(edit), abs(w), abs(c), abs(x))
    assert close(x @ folded.T + bias, dense(edit, w, c, x), magnitude, terms=2 * n + 16) == (mistake is None)


def test_a_bias_kept_elsewhere_is_scaled_by_the_caller():
    rng = np.random.default_rng(10)
    edit = make_edit(rng, ("delta", "output_scale"), 4, 3)
    w, c = rng.standard_normal((3, 4)), rng.standard_normal(3)
    folded, bias = fold_matrix(edit, w, c)
    alone, passed = fold_matrix(edit, w, None)
    assert np.array_equal(folded, alone)
    assert np.allclose(bias, (1 + edit.output_scale) * c + passed, rtol=0, atol=8 * EPS * abs(bias).max())
    assert fold_matrix(Edit(output_scale=edit.output_scale), w, None)[1] is None


def test_folds_and_checks_leave_the_callers_arrays_alone():
    rng = np.random.default_rng(1)
    edit = make_edit(rng, PARTS, 4, 4)
    w, c, x = rng.standard_normal((4, 4)), rng.standard_normal(4), rng.standard_normal((2, 4))
    given_arrays = [w, c, x, *edit.tensors().values()]
    before = [array.tobytes() for array in given_arrays]
    for array in given_arrays:
        array.flags.writeable = False
    folded, bias = fold_matrix(edit, w, c)
    assert not np.shares_memory(folded, w) and not np.shares_memory(bias, c)
    apply_input(edit, x)
    edit.check("fc", 4, 4)
    edit.distance()
    identity, same = fold_matrix(Edit(), w, c)
    assert not np.shares_memory(identity, w) and not np.shares_memory(same, c)
    assert [array.tobytes() for array in given_arrays] == before


def test_a_fresh_adapter_is_the_identity_bit_for_bit():
    rng = np.random.default_rng(2)
    w, c, x = rng.standard_normal((4, 4)), rng.standard_normal(4), rng.standard_normal((2, 4))
    fresh = Edit(np.zeros(4), LowRank(rng.standard_normal((2, 4)), np.zeros((4, 2)), 1.0), np.zeros(4))
    assert apply_input(fresh, x).tobytes() == x.tobytes()
    assert [a.tobytes() for a in fold_matrix(fresh, w, c)] == [w.tobytes(), c.tobytes()]
    assert fresh.distance() == 0.0


@FAST
@given(part_sets, st.integers(2, 5), st.integers(0, 10**6))
def test_distance_is_the_mean_square_of_what_t_adds(parts, k, seed):
    edit = make_edit(np.random.default_rng(seed), parts - {"output_low_rank", "output_scale"}, k, k)
    columns = apply_input(edit, np.eye(k)) - np.eye(k)
    shift = edit.delta if edit.delta is not None else np.zeros(k)
    square = np.sum((columns - shift) ** 2) + np.sum(shift**2)
    assert edit.distance() == pytest.approx(np.sqrt(square / k), rel=64 * k * k * EPS)


def test_distance_of_an_output_scale():
    scale = np.array([3.0, -4.0])
    assert Edit(output_scale=scale).distance() == pytest.approx(np.sqrt(12.5))
    assert Edit(np.array([2.0, 0.0, 1.0]), output_scale=scale).distance() == pytest.approx(np.sqrt(5 / 3 + 12.5))
    assert Edit(output_scale=np.zeros(2)).distance() == 0.0
    assert Edit(output_scale=scale).in_features is None and Edit(output_scale=scale).parameters == 2


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("parts", [(), ("lam",), ("input_low_rank", "delta"), PARTS])
def test_tensors_and_back(parts, dtype):
    edit = make_edit(np.random.default_rng(3), parts, 4, 3, dtype=dtype)
    back = Edit.from_tensors("fc", edit.tensors())
    assert {n: (a.dtype, a.tobytes()) for n, a in edit.tensors().items()} == {
        n: (a.dtype, a.tobytes()) for n, a in back.tensors().items()
    }
    assert edit.parameters == sum(a.size for n, a in edit.tensors().items() if n not in {"s", "out_s"})
    assert edit.in_features == (4 if parts else None)
    edit.check("fc", 4, 3)


def tensors(**arrays):
    good = {"A": np.ones((2, 4)), "B": np.ones((4, 2)), "s": np.array(1.0)}
    return {**good, **arrays}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"A": np.ones((2, 4)), "s": np.array(1.0)}, "low rank without B"),
        ({"out_s": np.array(1.0)}, "low rank without out_A, out_B"),
        (tensors(mystery=np.ones(4)), "unknown tensor 'mystery'"),
        (tensors(s=np.ones(3)), "s has shape"),
        (tensors(**{"lambda": np.array(1.0)}), "lambda has shape"),
        (tensors(delta=np.ones((4, 1))), "delta has shape"),
        (tensors(A=np.ones(4)), "A has shape"),
        (tensors(B=np.ones((4, 2, 1))), "B has shape"),
        ({"out_lambda": np.ones((4, 1))}, "out_lambda has shape"),
    ],
)
def test_tensors_that_make_no_edit(broken, message):
    with pytest.raises(EditError, match=f"site 'fc': {message}"):
        Edit.from_tensors("fc", broken)


@pytest.mark.parametrize(
    ("edit", "kernel", "message"),
    [
        (Edit(lam=np.ones(3)), (), "lambda has shape"),
        (Edit(delta=np.ones(5)), (), "delta has shape"),
        (Edit(output_scale=np.ones(4)), (), "out_lambda has shape"),
        (Edit(output_scale=np.full(6, np.nan)), (), "NaN or infinity"),
        (Edit(lam=np.ones(4, np.int64)), (), "floating point"),
        (Edit(lam=np.array([0, np.nan, 0, 0])), (), "NaN or infinity"),
        (Edit(lam=np.array([0, np.inf, 0, 0], ml_dtypes.bfloat16)), (), "NaN or infinity"),
        (Edit(input_low_rank=LowRank(np.ones((2, 4)), np.ones((4, 2)), float("nan"))), (), "NaN or infinity"),
        (Edit(input_low_rank=LowRank(np.ones((2, 4)), np.ones((6, 2)), 1.0)), (), "B has shape"),
        (Edit(input_low_rank=LowRank(np.ones((2, 4)), np.ones((4, 3)), 1.0)), (), "different ranks"),
        (Edit(output_low_rank=LowRank(np.ones((2, 4)), np.ones((4, 2)), 1.0)), (), "out_B has shape"),
        (Edit(output_low_rank=LowRank(np.ones((2, 6)), np.ones((6, 2)), 1.0)), (), "in_features 4"),
        (Edit(output_low_rank=LowRank(np.ones((2, 4, 3)), np.ones((6, 2)), 1.0)), (), "kernel is"),
        (Edit(output_low_rank=LowRank(np.ones((2, 4, 2)), np.ones((6, 2)), 1.0)), (3,), "kernel is"),
        (Edit(output_low_rank=LowRank(np.ones((2, 4)), np.ones((6, 2)), 1.0)), (3,), "kernel is"),
    ],
)
def test_edits_that_do_not_fit_their_site(edit, kernel, message):
    with pytest.raises(EditError, match=f"site 'fc'.*{message}"):
        edit.check("fc", 4, 6, kernel)


def test_lora_without_a_kernel_fits_a_pointwise_convolution():
    edit = Edit(output_low_rank=LowRank(np.ones((2, 4)), np.ones((6, 2)), 1.0))
    edit.check("conv", 4, 6, (1, 1))
    folded, _ = fold_conv(edit, np.zeros((6, 4, 1, 1)), None)
    assert np.array_equal(folded, np.full((6, 4, 1, 1), 2.0))
