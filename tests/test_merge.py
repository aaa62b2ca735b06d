"""Merging: the sum of what each adapter adds, in float64, or a refusal with the reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployfa.adapter import Adapter, BaseReference
from deployfa.edits import Edit, LowRank, apply_input, fold_conv, fold_matrix
from deployfa.errors import AdapterFormatError, BaseMismatchError, EditError, InputError
from deployfa.merge import merge_adapters, merge_edits
from deployfa.pipeline import export
from deployfa.training.base import load_base
from deployfa.training.reference import attach, load_adapted

EPS = 2.0**-53
K, D = 4, 3
INPUT = ("lam", "input_low_rank", "delta")
Rng = np.random.Generator


def make_edit(rng: Rng, parts: set[str], dtype: type = np.float64, rank: int = 2) -> Edit:
    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    made = {
        "lam": lambda: draw(K),
        "delta": lambda: draw(K),
        "input_low_rank": lambda: LowRank(draw(rank, K), draw(K, rank), float(rng.uniform(0.2, 2))),
        "output_low_rank": lambda: LowRank(draw(rank, K), draw(D, rank), float(rng.uniform(0.2, 2))),
        "output_scale": lambda: draw(D),
    }
    return Edit(**{part: made[part]() for part in parts})


def added(edit: Edit, x: np.ndarray) -> np.ndarray:
    return apply_input(edit, x) - x


@settings(max_examples=80)
@given(
    st.lists(st.sets(st.sampled_from((*INPUT, "output_low_rank"))), min_size=1, max_size=4),
    st.integers(0, 10**6),
)
def test_the_merged_edit_adds_the_weighted_sum(parts: list[set[str]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    edits = [make_edit(rng, each, rank=number + 1) for number, each in enumerate(parts)]
    weights = rng.uniform(-2, 2, len(edits))
    merged = merge_edits("fc", list(zip(weights.tolist(), edits, strict=True)))
    x, weight = rng.standard_normal((5, K)), rng.standard_normal((D, K))
    # T: x + Σ w (T_i(x) - x); and what comes out: y + Σ w (y_i - y), where the bias cancels
    expected = x + sum(w * added(edit, x) for w, edit in zip(weights, edits, strict=True))
    size = np.abs(x).max() + sum(abs(w) * np.abs(added(e, x)).max() for w, e in zip(weights, edits, strict=True))
    assert np.abs(apply_input(merged, x) - expected).max() <= 256 * EPS * size
    deltas = [fold_matrix(edit, weight, np.zeros(D)) for edit in edits]
    folded, bias = fold_matrix(merged, weight, np.zeros(D))
    assert bias is not None
    wanted = weight + sum(w * (each - weight) for w, (each, _) in zip(weights, deltas, strict=True))
    size = np.abs(weight).max() + sum(abs(w) * np.abs(each).max() for w, (each, _) in zip(weights, deltas, strict=True))
    assert np.abs(folded - wanted).max() <= 256 * EPS * size
    passed = sum(w * c for w, (_, c) in zip(weights, deltas, strict=True))
    assert np.abs(bias - passed).max() <= 256 * EPS * (1 + np.abs(passed).max())


@pytest.mark.parametrize("wrong", ["weights swapped", "s forgotten", "one left out"])
def test_the_comparison_sees_a_mistake(wrong: str) -> None:
    rng = np.random.default_rng(0)
    edits = [make_edit(rng, set(INPUT)) for _ in range(2)]
    weights = [0.3, 0.9]
    x = rng.standard_normal((5, K))
    expected = x + sum(w * added(edit, x) for w, edit in zip(weights, edits, strict=True))
    assert np.allclose(apply_input(merge_edits("fc", list(zip(weights, edits, strict=True))), x), expected)
    if wrong == "weights swapped":
        parts = list(zip(weights[::-1], edits, strict=True))
    elif wrong == "s forgotten":
        lows = [dataclasses.replace(e.input_low_rank, s=1.0) for e in edits]  # type: ignore[type-var]
        unscaled = [dataclasses.replace(e, input_low_rank=low) for e, low in zip(edits, lows, strict=True)]
        parts = list(zip(weights, unscaled, strict=True))
    else:
        parts = [(weights[0], edits[0])]
    assert not np.allclose(apply_input(merge_edits("fc", parts), x), expected)


def test_output_scales_add_up_with_output_scales_only() -> None:
    rng = np.random.default_rng(1)
    one, two = (make_edit(rng, {"output_scale"}) for _ in range(2))
    merged = merge_edits("fc", [(0.25, one), (2.0, two)])
    weight, bias = rng.standard_normal((D, K)), rng.standard_normal(D)
    for got, start, each in zip(
        fold_matrix(merged, weight, bias),
        (weight, bias),
        zip(fold_matrix(one, weight, bias), fold_matrix(two, weight, bias), strict=True),
        strict=True,
    ):
        assert got is not None and each[0] is not None and each[1] is not None
        wanted = start + 0.25 * (each[0] - start) + 2.0 * (each[1] - start)
        assert np.allclose(got, wanted, rtol=0, atol=64 * EPS * np.abs(start).max() * 8)
    for parts in ({"lam"}, {"output_low_rank"}, {"lam", "output_scale"}):
        with pytest.raises(EditError, match=r"site 'fc': an adapter scales the output.*a product is no sum"):
            merge_edits("fc", [(0.5, one), (0.5, make_edit(rng, parts))])
    both = make_edit(rng, {"lam", "output_scale"})
    assert merge_edits("fc", [(1.0, both), (0.5, Edit())]) is both, "alone and whole it is what it was"
    with pytest.raises(EditError, match="a product is no sum"):
        merge_edits("fc", [(0.5, both)])


def test_lora_of_convolutions() -> None:
    rng = np.random.default_rng(2)
    shapes = [(2, K, 1, 1), (3, K)]  # LoRA without a kernel fits a pointwise convolution
    lows = [LowRank(rng.standard_normal(shape), rng.standard_normal((D, shape[0])), 0.5) for shape in shapes]
    merged = merge_edits("conv", [(w, Edit(output_low_rank=low)) for w, low in zip((0.5, 2.0), lows, strict=True)])
    weight = rng.standard_normal((D, K, 1, 1))
    folded, _ = fold_conv(merged, weight, None)
    wanted = weight + 0.5 * lows[0].delta() + 2.0 * lows[1].delta()[:, :, None, None]
    assert np.allclose(folded, wanted, rtol=0, atol=64 * EPS * np.abs(wanted).max())
    with pytest.raises(EditError, match=r"site 'conv': A is .* merge adapters of one base"):
        kernel = LowRank(rng.standard_normal((2, K, 3, 3)), lows[0].b, 1.0)
        merge_edits("conv", [(0.5, Edit(output_low_rank=kernel)), (0.5, Edit(output_low_rank=lows[0]))])


def test_dtypes() -> None:
    rng = np.random.default_rng(3)
    halves = [make_edit(rng, {"lam", "input_low_rank"}, ml_dtypes.bfloat16) for _ in range(2)]
    low = merge_edits("fc", [(0.5, edit) for edit in halves]).input_low_rank
    assert low is not None and low.a.dtype == ml_dtypes.bfloat16 and low.b.dtype == np.float64 and low.s == 1.0
    single = make_edit(rng, {"lam", "input_low_rank"}, np.float32)
    mixed = merge_edits("fc", [(0.5, halves[0]), (0.5, single)])
    assert mixed.input_low_rank is not None and mixed.input_low_rank.a.dtype == np.float64
    assert mixed.lam is not None and mixed.lam.dtype == np.float64


def test_other_widths_are_named() -> None:
    with pytest.raises(EditError, match=r"site 'fc': λ is \(4,\) in one adapter and \(5,\) in another"):
        merge_edits("fc", [(0.5, Edit(np.ones(4))), (0.5, Edit(np.ones(5)))])


HEAD = {"classifier": {"weight": np.ones((2, 4), np.float32), "bias": np.zeros(2, np.float32)}}
OTHER = {"classifier": {"weight": np.full((2, 4), 2, np.float32), "bias": np.zeros(2, np.float32)}}
BASE = BaseReference(name="base", fingerprint="sha256:" + "ab" * 32)


def vefa(value: float, **more) -> Adapter:
    given = {"modules": HEAD, "base": BASE, "labels": ("neg", "pos"), "method": "vefa", **more}
    edits = given.pop("edits", {"fc": Edit(np.full(4, value))})
    return Adapter(edits=edits, **given)


def test_sites_of_some_adapters_only_and_default_weights() -> None:
    one = vefa(1.0, edits={"a": Edit(np.ones(4)), "b": Edit(np.ones(4))})
    two = vefa(1.0, edits={"b": Edit(np.full(4, 3.0)), "c": Edit(np.ones(4))})
    merged = merge_adapters({"one": one, "two": two}).adapter
    assert {site: edit.lam.tolist()[0] for site, edit in merged.edits.items()} == {"a": 0.5, "b": 2.0, "c": 0.5}
    assert (merged.method, merged.base, merged.labels) == ("vefa", BASE, ("neg", "pos"))
    assert merged.modules is HEAD
    assert [(m["name"], m["weight"]) for m in merged.training["merged"]] == [("one", 0.5), ("two", 0.5)]
    assert one.edits["a"].lam.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5], "1 weights for 2 adapters"),
        ([0.5, 0.25, 0.25], "3 weights for 2 adapters"),
        ([0.5, float("nan")], "not all finite"),
        ([float("inf"), 0.5], "not all finite"),
    ],
)
def test_weights_that_fit_no_adapter(weights: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        merge_adapters({"a": vefa(1), "b": vefa(2)}, weights=weights)


def test_one_adapter_is_not_merged() -> None:
    with pytest.raises(InputError, match=r"two adapters or more.*--strength"):
        merge_adapters({"a": vefa(1)})


class TestHeads:
    def test_different_heads_need_a_choice(self) -> None:
        pair = {"a.pt": vefa(1), "b.pt": vefa(2, modules=OTHER)}
        with pytest.raises(InputError, match=r"different heads.*--head with one of: 1 \(a\.pt\), 2 \(b\.pt\)"):
            merge_adapters(pair)
        for choice, head in (("a.pt", HEAD), ("1", HEAD), ("b.pt", OTHER), ("2", OTHER)):
            assert merge_adapters(pair, head=choice).adapter.modules is head
        for choice in ("c.pt", "0", "3", "-1", ""):
            with pytest.raises(InputError, match=r"no adapter '.*' to take the head from.*1 \(a\.pt\)"):
                merge_adapters(pair, head=choice)

    @pytest.mark.parametrize("change", ["value", "dtype", "name", "sign of a zero"])
    def test_heads_are_equal_bit_for_bit(self, change: str) -> None:
        weight, bias = HEAD["classifier"]["weight"].copy(), HEAD["classifier"]["bias"].copy()
        if change == "value":
            weight[1, 1] = np.nextafter(weight[1, 1], np.float32(2))
        modules = {
            "value": {"classifier": {"weight": weight, "bias": bias}},
            "dtype": {"classifier": {"weight": weight.astype(np.float64), "bias": bias}},
            "name": {"score": {"weight": weight, "bias": bias}},
            "sign of a zero": {"classifier": {"weight": weight, "bias": -bias}},
        }[change]
        with pytest.raises(InputError, match="different heads"):
            merge_adapters({"a": vefa(1), "b": vefa(2, modules=modules)}, allow_base_mismatch=True)

    def test_labels_go_with_the_head(self) -> None:
        pair = {"a": vefa(1), "b": vefa(2, modules=OTHER, labels=("pos", "neg"))}
        merged = merge_adapters(pair, head="b")
        assert merged.adapter.labels == ("pos", "neg")
        assert merged.warnings == ("'a' was trained for labels neg, pos; the head that is kept has pos, neg",)
        with pytest.raises(InputError, match="different labels for one head"):
            merge_adapters({"a": vefa(1), "b": vefa(2, labels=("pos", "neg"))})
        assert merge_adapters({"a": vefa(1, labels=()), "b": vefa(2)}).adapter.labels == ("neg", "pos")

    def test_an_adapter_without_a_head_takes_the_others(self) -> None:
        bare = vefa(1, modules={}, labels=(), base=BaseReference(name="base"))
        merged = merge_adapters({"bare": bare, "b": vefa(2)})
        assert merged.adapter.modules is HEAD and merged.adapter.base == BASE
        assert merged.warnings == ("'bare' names no base fingerprint, so its base could not be compared",)

    def test_a_head_alone_can_be_one_of_them(self) -> None:
        alone = vefa(0, method="head", edits={}, modules=OTHER)
        merged = merge_adapters({"a": vefa(1), "head": alone}, weights=[1, 0], head="head").adapter
        assert merged.method == "vefa" and merged.modules is OTHER
        assert merge_adapters({"a": alone, "b": alone}).adapter.method == "head"


class TestBases:
    other = BaseReference(name="other", fingerprint="sha256:" + "cd" * 32)

    def test_another_base_is_refused(self) -> None:
        pair = {"a": vefa(1), "b": vefa(2, base=self.other)}
        with pytest.raises(BaseMismatchError, match=r"'a' and 'b' were trained on different bases.*--allow-base"):
            merge_adapters(pair)
        merged = merge_adapters(pair, allow_base_mismatch=True, head="2")
        assert merged.adapter.base == self.other
        assert "going on because of --allow-base-mismatch" in merged.warnings[0]

    def test_other_modules_make_another_fingerprint(self) -> None:
        pair = {"a": vefa(1), "b": vefa(2, base=self.other, modules={})}
        with pytest.raises(BaseMismatchError, match="replace different modules, so their bases cannot be compared"):
            merge_adapters(pair)


class TestMethods:
    def lora(self, rank: int, sites: tuple[str, ...]) -> Adapter:
        rng = np.random.default_rng(rank)
        low = {s: LowRank(rng.standard_normal((rank, 4)), rng.standard_normal((4, rank)), 0.5) for s in sites}
        return vefa(0, method="lora", edits={s: Edit(output_low_rank=low[s]) for s in sites})

    def test_loras_of_other_ranks_make_a_peft_directory(self, tmp_path: Path) -> None:
        import peft

        class Two(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc, self.my_fc, self.classifier = (torch.nn.Linear(4, n) for n in (4, 4, 2))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.classifier(torch.relu(self.my_fc(torch.relu(self.fc(x)))))

        pair = {"a": self.lora(2, ("fc", "my_fc")), "b": self.lora(3, ("my_fc",))}
        merged = merge_adapters(pair, weights=[0.5, 1.5]).adapter
        path = merged.save(tmp_path / "merged")
        assert {s: e.output_low_rank.rank for s, e in Adapter.load(path).edits.items()} == {"fc": 2, "my_fc": 5}
        model = Two().double()
        x = torch.randn(5, 4, dtype=torch.float64)
        with torch.inference_mode():
            found = attach(Two().double(), merged)  # another start: only the state below counts
            found.load_state_dict({**model.state_dict(), **{f"classifier.{n}": v for n, v in _head().items()}})
            theirs = peft.PeftModel.from_pretrained(model, path).double()(x)
            # PEFT keeps A and B in float32
            assert (found(x) - theirs).norm() <= 64 * 2.0**-24 * theirs.norm()

    def test_lorfas_of_other_ranks_do_not(self, tmp_path: Path) -> None:
        low = LowRank(np.ones((2, 4)), np.ones((4, 2)), 1.0)
        wide = LowRank(np.ones((3, 4)), np.ones((4, 3)), 1.0)
        one = vefa(0, method="lorfa", edits={s: Edit(input_low_rank=low) for s in ("a", "b", "c")})
        two = vefa(0, method="lorfa", edits={"c": Edit(input_low_rank=wide)})
        merged = merge_adapters({"one": one, "two": two}).adapter
        with pytest.raises(AdapterFormatError, match=r"site 'c': its rank is 5, but the config says 2"):
            merged.save(tmp_path / "merged")
        back = Adapter.load(merged.save(tmp_path / "merged.safetensors"))
        assert back.edits["c"].input_low_rank is not None and back.edits["c"].input_low_rank.rank == 5

    def test_mixed_methods_have_files_but_no_peft_form(self, tmp_path: Path) -> None:
        pair = {"a": vefa(1), "b": self.lora(2, ("fc",)), "c": vefa(3)}
        merged = merge_adapters(pair).adapter
        assert merged.method == "vefa+lora"
        for name in ("m.pt", "m.safetensors"):
            back = Adapter.load(merged.save(tmp_path / name))
            assert back.method == "vefa+lora" and back.meta == merged.meta
            assert {n: a.tobytes() for n, a in back.tensors().items()} == {
                n: a.tobytes() for n, a in merged.tensors().items()
            }
        with pytest.raises(AdapterFormatError, match=r"method 'vefa\+lora' has no PEFT form; save it as \.safetensors"):
            merged.save(tmp_path / "m")
        assert merge_adapters({"ab": merged, "a": vefa(1)}).adapter.method == "vefa+lora"


def _head() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array).double() for name, array in HEAD["classifier"].items()}


FEEDS = {
    "input_ids": torch.tensor([[101, 2023, 2003, 2307, 102], [101, 6659, 102, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}


def test_trained_adapters_at_every_site(trained: dict[str, Path], minilm_dir: Path) -> None:
    """On MiniLM in float64: what a merged site gives is the base's output and the weighted sum of the changes."""
    weights = {"vefa": 0.6, "lorfa": 0.3, "lora": 0.25}
    adapters = {name: Adapter.load(trained[name]) for name in weights}
    merged = merge_adapters(adapters, weights=list(weights.values()), head="vefa").adapter
    base = load_base(minilm_dir, "text-classification", labels=["negative", "positive"])
    rng = np.random.default_rng(0)
    models = {name: load_adapted(base, adapter, dtype=torch.float64) for name, adapter in adapters.items()}
    models["merged"] = load_adapted(base, merged, dtype=torch.float64)
    plain = base.model.double().eval()
    for site, edit in merged.edits.items():
        x = torch.from_numpy(rng.standard_normal((3, edit.in_features or 0)))
        with torch.inference_mode():
            y = plain.get_submodule(site)(x)
            out = {name: model.get_submodule(site)(x) for name, model in models.items()}
        expected = y + sum(w * (out[name] - y) for name, w in weights.items())
        assert (out["merged"] - expected).norm() <= 256 * EPS * expected.norm()
        assert (expected - y).norm() > 1e-4 * y.norm()


@pytest.mark.slow
def test_the_command_and_a_bundle_that_passes(cli, trained: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "both.safetensors"
    refused = cli("merge", trained["vefa"], trained["lorfa"], "-o", out)
    assert refused.returncode == 2 and "different heads" in refused.stderr and not out.exists()
    command = ["merge", trained["vefa"], trained["lorfa"], "--weights", "0.7,0.3", "--head", "1", "-o", out]
    done = cli(*command)
    assert done.returncode == 0 and "deployfa export" in done.stderr, done.stderr
    again = cli(*command)
    assert again.returncode == 2 and "--force" in again.stderr
    merged = Adapter.load(out)
    assert merged.method == "vefa+lorfa" and merged.base.fingerprint == Adapter.load(trained["vefa"]).base.fingerprint
    assert cli("inspect", out).returncode == 0
    export(merged, tmp_path / "bundle", optimize="none")
    verified = cli("verify", tmp_path / "bundle")
    assert verified.returncode == 0 and "PASS" in verified.stdout, verified.stdout + verified.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "a,b"], "is no list of numbers; write --weights 0.5,0.5"),
        (["--weights", "0.5;0.5"], "is no list of numbers"),
        (["--weights", "1"], "1 weights for 2 adapters"),
        (["--weights", "-1,nan"], "not all finite"),
        (["--head", "x.pt"], "no adapter 'x.pt' to take the head from"),
    ],
)
def test_bad_arguments(cli, trained: dict[str, Path], tmp_path: Path, arguments: list[str], message: str) -> None:
    result = cli("merge", trained["vefa"], trained["lorfa"], *arguments, "-o", tmp_path / "out.pt")
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_pair(cli, trained: dict[str, Path], tmp_path: Path) -> None:
    twice = cli("merge", trained["vefa"], trained["vefa"], "-o", tmp_path / "out.pt")
    assert twice.returncode == 2 and "is given twice" in twice.stderr
    alone = cli("merge", trained["vefa"], "-o", tmp_path / "out.pt")
    assert alone.returncode == 2 and "two adapters or more" in alone.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept").write_text("kept")
    command = ["merge", trained["vefa"], trained["lorfa"], "--head", "1", "-o", tmp_path / "mine", "--force"]
    refused = cli(*command)
    assert refused.returncode == 2 and (tmp_path / "mine" / "kept").read_text() == "kept"
