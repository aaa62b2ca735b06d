"""Conversions: exact, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from deployfa.adapter import Adapter
from deployfa.adapter.peft_ia3 import KEPT
from deployfa.convert import to_ia3, to_lora, to_vefa, with_strength
from deployfa.edits import Edit, LowRank, apply_input, fold_matrix
from deployfa.errors import EditError, InputError
from deployfa.training.base import load_base
from deployfa.training.reference import load_adapted

FEEDS = {
    "input_ids": torch.tensor([[101, 2023, 2003, 2307, 102], [101, 6659, 102, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}


@pytest.fixture(scope="module")
def base(minilm_dir: Path):
    return load_base(minilm_dir, "text-classification", labels=["negative", "positive"])


def logits(base, adapter: Adapter) -> np.ndarray:
    with torch.inference_mode():
        return load_adapted(base, adapter, dtype=torch.float64)(**FEEDS).logits.numpy()


def test_lorfa_becomes_the_lora_that_equals_it(base, trained: dict[str, Path]) -> None:
    lorfa = Adapter.load(trained["lorfa"])
    lora = to_lora(lorfa)
    expected, found = logits(base, lorfa), logits(base, lora)
    plain = logits(base, Adapter("head", {}, lorfa.modules, lorfa.base, lorfa.labels))
    # B' = W B is rounded once to float32; everything else is float64
    assert np.linalg.norm(found - expected) <= 16 * 2.0**-24 * np.linalg.norm(expected)
    assert np.linalg.norm(plain - expected) > 1e-3 * np.linalg.norm(expected)
    assert all(edit.input_low_rank is None for edit in lora.edits.values())


def test_peft_loads_the_lora(base, trained: dict[str, Path], minilm_dir: Path, tmp_path: Path) -> None:
    lora = to_lora(Adapter.load(trained["lorfa"]))
    lora.save(tmp_path / "lora")
    fresh = load_base(minilm_dir, "text-classification", labels=["negative", "positive"])
    model = peft.PeftModel.from_pretrained(fresh.model, str(tmp_path / "lora")).eval().double()
    with torch.inference_mode():
        found = model(**FEEDS).logits.numpy()
    expected = logits(base, lora)
    assert np.linalg.norm(found - expected) <= 64 * 2.0**-53 * np.linalg.norm(expected)


def test_a_wrong_product_is_seen(base, trained: dict[str, Path]) -> None:
    """The same with W transposed at the square sites: the comparison above must fail."""
    lorfa = Adapter.load(trained["lorfa"])
    lora = to_lora(lorfa)
    state = base.model.state_dict()
    edits = dict(lora.edits)
    for site, edit in lorfa.edits.items():
        weight = state[f"{site}.weight"].double().numpy()
        if weight.shape[0] == weight.shape[1] and edit.input_low_rank is not None:
            low = edit.input_low_rank
            edits[site] = Edit(output_low_rank=LowRank(low.a, (weight.T @ low.b).astype(np.float32), low.s))
    wrong = Adapter("lora", edits, lora.modules, lora.base, lora.labels)
    expected = logits(base, lorfa)
    assert np.linalg.norm(logits(base, wrong) - expected) > 16 * 2.0**-24 * np.linalg.norm(expected)


def test_vefa_has_no_lora(trained: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="full rank"):
        to_lora(Adapter.load(trained["vefa"]))


def test_an_output_scale_has_no_lora() -> None:
    with pytest.raises(InputError, match=r"scales its output.*full rank"):
        to_lora(Adapter("ia3", {"fc": Edit(output_scale=np.ones(2))}))


def test_a_shift_has_no_lora() -> None:
    low = LowRank(np.ones((1, 2)), np.ones((2, 1)), 1.0)
    with pytest.raises(InputError, match="shift"):
        to_lora(Adapter("lorfa", {"fc": Edit(input_low_rank=low, delta=np.ones(2))}))


@pytest.mark.parametrize("t", [0.0, 0.5, 2.0, -1.0])
def test_strength_of_an_output_scale(t: float) -> None:
    """Every part times t, by the definition; alone it is linear, the bias included, beside λ a product."""
    rng = np.random.default_rng(1)
    lam, scale = rng.standard_normal(3), rng.standard_normal(4)
    weight, bias = rng.standard_normal((4, 3)), rng.standard_normal(4)
    edits = {"alone": Edit(output_scale=scale), "both": Edit(lam, output_scale=scale)}
    scaled = with_strength(Adapter("ia3", edits), t).edits
    for site, factor in (("alone", np.ones(3)), ("both", 1 + t * lam)):
        w, c = fold_matrix(scaled[site], weight, bias)
        assert np.allclose(w, (1 + t * scale)[:, None] * weight * factor, rtol=8 * 2.0**-53, atol=0)
        assert np.allclose(c, (1 + t * scale) * bias, rtol=8 * 2.0**-53, atol=0)


@pytest.mark.parametrize("t", [0.0, 0.5, 2.0, -1.0])
def test_strength_is_linear(t: float) -> None:
    rng = np.random.default_rng(0)
    low = LowRank(rng.standard_normal((2, 3)), rng.standard_normal((3, 2)), 0.7)
    out = LowRank(rng.standard_normal((2, 3)), rng.standard_normal((4, 2)), 1.3)
    edit = Edit(rng.standard_normal(3), low, rng.standard_normal(3), out)
    scaled = with_strength(Adapter("vefa", {"fc": edit}), t)
    x = rng.standard_normal((5, 3))
    whole, part = (apply_input(e, x) for e in (edit, scaled.edits["fc"]))
    assert np.allclose(part - x, t * (whole - x), rtol=0, atol=64 * 2.0**-53 * np.abs(whole).max())
    weight = rng.standard_normal((4, 3))
    whole_w, part_w = (fold_matrix(e, weight, None)[0] for e in (edit, scaled.edits["fc"]))
    assert np.allclose(part_w - weight, t * (whole_w - weight), rtol=0, atol=64 * 2.0**-53 * np.abs(whole_w).max())
    assert scaled.training["strength"] == t


def test_strength_changes_no_array_of_the_caller_and_one_changes_nothing(trained: dict[str, Path]) -> None:
    adapter = Adapter.load(trained["vefa"])
    before = {name: array.copy() for name, array in adapter.tensors().items()}
    half = with_strength(adapter, 0.5)
    assert with_strength(adapter, 1.0) is adapter
    assert all(np.array_equal(array, before[name]) for name, array in adapter.tensors().items())
    assert half.modules is adapter.modules, "a head has no in-between"
    assert with_strength(half, 0.5).training["strength"] == 0.25


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number(strength: float, trained: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="strength"):
        with_strength(Adapter.load(trained["vefa"]), strength)


def test_both_sides_do_not_convert(trained: dict[str, Path]) -> None:
    import dataclasses

    lorfa = Adapter.load(trained["lorfa"])
    site, edit = next(iter(lorfa.edits.items()))
    both = dataclasses.replace(edit, output_low_rank=edit.input_low_rank)
    with pytest.raises(EditError, match="both sides"):
        to_lora(dataclasses.replace(lorfa, edits={site: both}))


def bits(adapter: Adapter) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in adapter.tensors().items()}


def test_vefa_to_ia3_and_back_is_bit_exact(cli, trained: dict[str, Path], tmp_path: Path) -> None:
    vefa = Adapter.load(trained["vefa"])
    for command in (
        ("convert", trained["vefa"], "--to", "ia3", "-o", tmp_path / "ia3"),
        ("convert", tmp_path / "ia3", "--to", "vefa", "-o", tmp_path / "back.pt"),
        ("convert", tmp_path / "ia3", "--to", "vefa", "-o", tmp_path / "back"),
        ("convert", tmp_path / "ia3", "--to", "safetensors", "-o", tmp_path / "ia3.safetensors"),
        ("convert", tmp_path / "ia3.safetensors", "--to", "vefa", "-o", tmp_path / "back.safetensors"),
    ):
        result = cli(*command)
        assert result.returncode == 0, result.stderr
    for name in ("back.pt", "back", "back.safetensors"):
        back = Adapter.load(tmp_path / name)
        assert bits(back) == bits(vefa)
        assert (back.method, back.base, back.labels, back.training) == ("vefa", vefa.base, vefa.labels, vefa.training)
    # without the λ beside it, only the bits that l has kept come back
    (tmp_path / "ia3" / KEPT).unlink()
    assert bits(to_vefa(Adapter.load(tmp_path / "ia3"))) != bits(vefa)


def test_peft_loads_the_ia3(base, trained: dict[str, Path], minilm_dir: Path, tmp_path: Path) -> None:
    import json

    vefa = Adapter.load(trained["vefa"])
    path = to_ia3(vefa).save(tmp_path / "ia3")
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["feedforward_modules"] == config["target_modules"] == sorted(vefa.edits)
    fresh = load_base(minilm_dir, "text-classification", labels=["negative", "positive"])
    model = peft.PeftModel.from_pretrained(fresh.model, str(path)).eval().double()
    with torch.inference_mode():
        found = model(**FEEDS).logits.numpy()
    expected = logits(base, vefa)
    # l = 1 + λ is rounded once to float32
    assert np.linalg.norm(found - expected) <= 16 * 2.0**-24 * np.linalg.norm(expected)
    plain = logits(base, Adapter("head", {}, vefa.modules, vefa.base, vefa.labels))
    assert np.linalg.norm(plain - expected) > 1e-3 * np.linalg.norm(expected)


def test_a_foreign_ia3_becomes_a_vefa_and_is_written_again_bit_for_bit(base, tmp_path: Path) -> None:
    import copy

    from safetensors.numpy import load_file

    config = peft.IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["query", "output.dense"])
    adapted = peft.get_peft_model(copy.deepcopy(base.model), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "theirs")
    vefa = to_vefa(Adapter.load(tmp_path / "theirs"))
    again = to_ia3(Adapter.load(vefa.save(tmp_path / "vefa"))).save(tmp_path / "again")
    theirs, ours = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "theirs", again))
    assert {name: a.tobytes() for name, a in theirs.items()} == {name: a.tobytes() for name, a in ours.items()}
    with torch.inference_mode():
        expected = adapted.double()(**FEEDS).logits.numpy()
    assert np.linalg.norm(logits(base, vefa) - expected) <= 64 * 2.0**-53 * np.linalg.norm(expected)


def test_convolutions_of_a_captured_vefa_are_ia3_that_peft_loads(tmp_path: Path) -> None:
    import copy

    from deployfa import VeFAConfig
    from deployfa.training.capture import capture

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2), torch.nn.Flatten(), torch.nn.Linear(24, 2)).double()
    adapted = peft.get_peft_model(copy.deepcopy(model), VeFAConfig(target_modules=["0", "2"])).double()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "vefa" in name:
                parameter.copy_(torch.randn_like(parameter).float())
    path = to_ia3(capture(adapted)).save(tmp_path / "ia3")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), path).double()
    x = torch.randn(3, 4, 4, 4, dtype=torch.float64)
    with torch.inference_mode():
        expected, found = adapted(x), again(x)
    assert (found - expected).norm() <= 16 * 2.0**-24 * expected.norm()
    assert bits(to_vefa(Adapter.load(path))) == bits(capture(adapted))


@pytest.mark.parametrize(
    ("convert", "edit", "message"),
    [
        (to_ia3, Edit(np.ones(2), delta=np.ones(2)), r"site 'fc' has a shift δ, which IA3 cannot hold"),
        (to_ia3, Edit(input_low_rank=LowRank(np.ones((1, 2)), np.ones((2, 1)), 1.0)), "no factor on the input alone"),
        (to_ia3, Edit(), "no factor on the input alone"),
        (to_vefa, Edit(output_scale=np.ones(2)), "scales its output, bias included, and VeFA scales the input"),
        (to_vefa, Edit(np.ones(2), output_scale=np.ones(2)), "scales its output"),
        (to_vefa, Edit(output_low_rank=LowRank(np.ones((1, 2)), np.ones((2, 1)), 1.0)), "no factor on the input"),
    ],
)
def test_what_has_no_such_form(convert, edit: Edit, message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert(Adapter("other", {"fc": edit}))
    with pytest.raises(InputError, match="edits no layer"):
        convert(Adapter("head", {}))


def test_the_command(cli, trained: dict[str, Path], tmp_path: Path) -> None:
    for to, name in (("safetensors", "a.safetensors"), ("pt", "a.pt"), ("peft", "a"), ("lora", "b")):
        result = cli("convert", trained["lorfa"], "--to", to, "-o", tmp_path / name)
        assert result.returncode == 0, result.stderr
        assert Adapter.load(tmp_path / name).method == ("lora" if to == "lora" else "lorfa")
    wrong = cli("convert", trained["lorfa"], "--to", "lora", "-o", tmp_path / "c.pt")
    assert wrong.returncode == 2
    assert "a name without a suffix" in wrong.stderr
    refused = cli("convert", trained["vefa"], "--to", "lora", "-o", tmp_path / "d")
    assert refused.returncode == 2
    assert "full rank" in refused.stderr
    assert not (tmp_path / "d").exists()
    for to, out in (("ia3", "e.pt"), ("vefa", "e.bin")):
        wrong = cli("convert", trained["vefa"], "--to", to, "-o", tmp_path / out)
        assert wrong.returncode == 2 and f"--to {to} writes" in wrong.stderr and "a directory" in wrong.stderr
    for to in ("ia3", "vefa"):
        refused = cli("convert", trained["lora"], "--to", to, "-o", tmp_path / "f")
        assert refused.returncode == 2 and "no factor on the input" in refused.stderr
        assert not (tmp_path / "f").exists()
