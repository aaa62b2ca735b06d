"""One layer, whatever its operator and whoever shares its numbers: every placement is T(x) and then the layer."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from . import layer_draws as draws
from .ball import Ball
from .strategies import agree, make_edit, numbers, search, seeds, some_parts
from .twin import Twin
from .twin_layers import Layers


@st.composite
def layer_cases(draw, builder):
    """(twin, outputs, edits): site ``a``, and others that read the same numbers."""
    rng = draw(seeds())
    twin = Twin(builder, draw(st.sampled_from(draws.DTYPES)), dims=draw(st.sampled_from([(), ("batch",)])))
    layers = Layers(twin)
    kind = draw(st.sampled_from(["dense", "dense", "experts", "conv"]))
    outputs = []
    if kind == "experts":
        twin.dims = ()
        y, weight, c = draws.experts(draw, layers, rng, "a")
    elif kind == "conv":
        y, weight, c = draws.convolution(draw, layers, rng, "a")
    else:
        k, d = draw(draws.SIZES), draw(draws.SIZES)
        d = k if draw(st.booleans()) else d
        x = twin.feed(numbers(rng, *draw(st.sampled_from([(3, k), (2, 3, k), (k, k)]))))
        y, weight, c, how = draws.dense(draw, layers, rng, x, k, d, "a")
        if draw(st.integers(0, 3)) == 0:
            # the module is called again, perhaps on what it has made
            again = x if k != d or draw(st.booleans()) else twin.unary("Tanh", y)
            outputs.append(draws.dense(draw, layers, rng, again, k, d, "a", weight=weight, bias=c, how=how)[0])
        for name in draw(st.lists(st.sampled_from("bcd"), unique=True, max_size=2)):
            outputs.append(_other(draw, layers, rng, name, x, weight, c, k, d))
    outputs.append(y)
    stored = weight[0]
    extra = draw(st.sampled_from(["", "", "embeds", "stored", "view", "view itself"]))
    if extra == "embeds" and stored.array.ndim == 2:
        outputs.append(draws.looked_up(draw, twin, rng, stored))
    elif extra in {"stored", "view"}:
        outputs.append(draws.answered(twin, stored if extra == "stored" else weight[1]))
    elif extra == "view itself" and weight[1].value is not stored.value:
        outputs.append(twin.means(weight[1].value, lambda _: Ball.exact(weight[1].array)))
    edits = {}
    for name, site in layers.sites.items():
        if name == "a" or draw(st.booleans()):
            edits[name] = make_edit(rng, site, draw(some_parts()), rank=draw(st.integers(1, 3)))
    return twin, outputs, edits


def _other(draw, layers, rng, name, x, weight, c, k, d):
    """Another site on the same input, with the same weight, the same bias, or the same view of the weight."""
    share = draw(st.sets(st.sampled_from(["weight", "bias"]), min_size=1))
    fits = weight[1].array.shape == (k, d) or (weight[1].array.shape == (d, k) and len(layers.twin.shape(x)) == 2)
    same = weight if "weight" in share and fits else None
    return draws.dense(draw, layers, rng, x, k, d, name, weight=same, bias=c if "bias" in share else "draw")[0]


def test_every_placement_of_a_layer_is_the_edit_and_then_the_layer(builder):
    seen = Counter()

    @search(400)
    @given(layer_cases(builder))
    def holds(case):
        agree(*case, seen=seen)

    holds()
    # the search proves nothing of what it never reached
    assert min(seen["auto: own weight"], seen["auto: side op"], seen["untied: own weight"]) > 50, seen
