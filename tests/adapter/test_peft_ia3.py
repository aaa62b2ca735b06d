"""IA3 that PEFT wrote does here what it does in PEFT, in float64; what is written here, PEFT loads; λ survives."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from deployfa.adapter import Adapter
from deployfa.adapter.peft_ia3 import KEPT, edit_from
from deployfa.edits import Edit, LowRank
from deployfa.errors import AdapterFormatError, EditError

BERT = {
    "feed-forward": IA3Config(target_modules=["output.dense"], feedforward_modules=["output.dense"]),
    "output": IA3Config(target_modules=["key", "value"], feedforward_modules=[]),
    "both": IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    "regex": IA3Config(target_modules=r".*(key|value|dense)", feedforward_modules=r".*\.0\..*dense"),
    "regex of a part of the name": IA3Config(target_modules=["key", "dense"], feedforward_modules="dense"),
    "by architecture": IA3Config(task_type="SEQ_CLS"),
    "excluded": IA3Config(target_modules=["dense"], exclude_modules=["pooler.dense"], feedforward_modules=["dense"]),
    "head": IA3Config(target_modules=["key"], feedforward_modules=["key"], modules_to_save=["classifier"]),
}


@pytest.mark.parametrize("name", BERT)
def test_foreign_ia3_on_bert(tmp_path, bert, name, perturbed, same_effect):
    adapted = perturbed(bert, copy.deepcopy(BERT[name]))
    adapted.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    assert adapter.found == "PEFT IA3 directory not written by deployfa" and adapter.method == "ia3"
    assert same_effect(bert, adapted, adapter)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter.parameters + adapter.module_parameters == trained


@pytest.mark.parametrize("feedforward", [["c_proj"], ["c_attn", "c_proj"], []])
def test_foreign_ia3_on_gpt2_conv1d(tmp_path, gpt2, feedforward, perturbed, same_effect):
    """c_proj of the attention is square: the kind must come from the config, not from the shape."""
    config = IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=feedforward, fan_in_fan_out=True)
    adapted = perturbed(gpt2, config)
    adapted.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    assert ("lambda" in adapter.edits["transformer.h.0.attn.c_proj"].tensors()) == bool(feedforward)
    assert same_effect(gpt2, adapted, adapter)


@pytest.mark.parametrize("feedforward", [["conv", "groups", "linear"], ["groups"], []])
def test_foreign_ia3_on_convolutions_and_back(tmp_path, convolutions, feedforward, perturbed, same_effect, logits):
    config = IA3Config(target_modules=["conv", "groups", "linear"], feedforward_modules=feedforward)
    adapted = perturbed(convolutions, config).float()
    adapted.save_pretrained(tmp_path / "theirs")
    adapter = Adapter.load(tmp_path / "theirs")
    assert same_effect(convolutions, adapted.double(), adapter)
    for form in ("ours", "ours.safetensors"):
        path = Adapter.load(adapter.save(tmp_path / form)).save(tmp_path / "again", force=True)
        assert {p.shape for p in load_file(path / "adapter_model.safetensors").values()} == {
            tuple(p.shape) for name, p in adapted.named_parameters() if "ia3_l" in name
        }
        again = PeftModel.from_pretrained(copy.deepcopy(convolutions).double(), path).eval()
        assert np.array_equal(logits(again.double()), logits(adapted))


def test_the_comparison_sees_a_bias_that_is_not_scaled_and_a_wrong_kind(tmp_path, bert, perturbed, same_effect):
    adapted = perturbed(bert, copy.deepcopy(BERT["both"]))
    torch.nn.init.normal_(bert.bert.encoder.layer[0].attention.self.value.bias)
    adapted.get_base_model().bert.encoder.layer[0].attention.self.value.base_layer.bias.data.copy_(
        bert.bert.encoder.layer[0].attention.self.value.bias.data
    )
    adapted.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    assert same_effect(bert, adapted, adapter)
    site = "bert.encoder.layer.0.attention.self.value"
    scale = adapter.edits[site].output_scale
    input_instead = dataclasses.replace(adapter, edits={**adapter.edits, site: Edit(lam=scale)})
    assert not same_effect(bert, adapted, input_instead)
    weight = bert.get_submodule(site).weight.detach().double().numpy()
    low_rank = LowRank(weight, np.diag(scale), 1.0)  # diag(λ) W: all but the bias
    without_bias = dataclasses.replace(adapter, edits={**adapter.edits, site: Edit(output_low_rank=low_rank)})
    assert not same_effect(bert, adapted, without_bias)


def test_one_plus_lambda_is_l_for_every_float32_that_matters():
    rng = np.random.default_rng(0)
    exponents = rng.integers(-29, 60, 4000)
    vector = (np.ldexp(rng.uniform(1, 2, 4000), exponents) * rng.choice([-1, 1], 4000)).astype(np.float32)
    vector[:3] = [0, 1, 2.0**-29]
    for shape, kind in (((1, -1), "lam"), ((-1, 1), "output_scale")):
        edit = edit_from("fc", vector.reshape(shape), {"feedforward_modules": ["fc"] if kind == "lam" else []})
        lam = getattr(edit, kind)
        assert lam.dtype == np.float64 and (1 + lam).astype(np.float32).tobytes() == vector.tobytes()
        assert np.array_equal(1 + lam, vector)
    tiny = edit_from("fc", np.full((1, 1), 2.0**-40 + 2.0**-63, np.float32), {"feedforward_modules": ["fc"]}).lam
    assert 0 < abs(1 + tiny[0] - (2.0**-40 + 2.0**-63)) <= 2.0**-54


@pytest.mark.parametrize(
    ("shape", "config", "message"),
    [
        ((4, 1), {"feedforward_modules": ["fc"]}, "no factor on the input"),
        ((1, 4), {"feedforward_modules": []}, "no factor on the output"),
        ((4, 1, 1, 1), {"feedforward_modules": ["fc"]}, "no factor on the input"),
        ((1, 4, 2, 1), {"feedforward_modules": []}, "no factor on the output"),
        ((4,), {"feedforward_modules": ["fc"]}, "no factor on the input"),
        ((1, 4, 1), {"feedforward_modules": ["fc"]}, "no factor on the input"),
        ((1, 1), {}, "no feedforward_modules"),
        ((1, 4, 1, 1), {"feedforward_modules": None}, "no feedforward_modules"),
        ((1, 4), {"feedforward_modules": 3}, "names no modules"),
        ((1, 4), {"feedforward_modules": [3]}, "names no modules"),
        ((1, 4), {"feedforward_modules": "("}, "names no modules"),
    ],
)
def test_vectors_that_are_no_factor(shape, config, message):
    with pytest.raises(EditError, match=f"site 'a.fc'.*{message}.*again"):
        edit_from("a.fc", np.ones(shape, np.float32), config)


def test_without_feedforward_modules_the_shape_tells():
    assert edit_from("fc", np.ones((1, 4)), {}).lam.shape == (4,)
    assert edit_from("fc", np.ones((4, 1)), {"feedforward_modules": None}).output_scale.shape == (4,)


def ia3(edits, **config):
    return Adapter("ia3", edits, config=config)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_lambda_survives_although_l_rounds(tmp_path, make_adapter, dtype):
    """The λ of training, not what l gives back: they differ, and only the file beside the checkpoint knows."""
    adapter = make_adapter("ia3", dtype)
    path = adapter.save(tmp_path / "a")
    bits = {name: (a.dtype.name, a.tobytes()) for name, a in adapter.tensors().items()}
    assert {name: (a.dtype.name, a.tobytes()) for name, a in Adapter.load(path).tensors().items()} == bits
    (path / KEPT).unlink()
    alone, lam = Adapter.load(path).edits["fc1"].lam, adapter.edits["fc1"].lam.astype(np.float64)
    assert alone.dtype == np.float64 and np.abs(alone - lam).max() <= 2.0**-24 * 4  # |1 + λ| < 4
    # the few bits of a float16 fit into 1 + λ in float32
    assert np.array_equal(alone, lam) == (dtype in {"float16", "bfloat16"})


def test_l_wins_where_it_was_changed_since(tmp_path, make_adapter):
    adapter = make_adapter("ia3")
    path = adapter.save(tmp_path / "a")
    file = path / "adapter_model.safetensors"
    tensors = {name: array.copy() for name, array in load_file(file).items()}
    name = "base_model.model.fc1.ia3_l"
    tensors[name][0, 0] = np.nextafter(tensors[name][0, 0], np.float32(9))
    save_file(tensors, file)
    back = Adapter.load(path)
    assert np.array_equal(back.edits["fc1"].lam, tensors[name][0].astype(np.float64) - 1)
    assert back.edits["layer.0.fc2"].lam.tobytes() == adapter.edits["layer.0.fc2"].lam.tobytes()


@pytest.mark.parametrize("changed", ["shape", "dtype", "names", "bytes"])
def test_a_kept_file_of_something_else_is_not_believed(tmp_path, make_adapter, changed):
    path = make_adapter("ia3").save(tmp_path / "a")
    kept = load_file(path / KEPT)
    assert set(kept) == {"fc1/lambda", "layer.0.fc2/lambda"}
    if changed == "bytes":
        (path / KEPT).write_bytes(b"x")
        with pytest.raises(AdapterFormatError, match="safetensors"):
            Adapter.load(path)
        return
    save_file(
        {
            "shape": {name: lam[:2].copy() for name, lam in kept.items()},
            "dtype": {name: np.zeros(4, np.int64) for name in kept},
            "names": {f"other/{name}": lam for name, lam in kept.items()},
        }[changed],
        path / KEPT,
    )
    assert all(edit.lam.dtype == np.float64 and edit.lam.shape == (4,) for edit in Adapter.load(path).edits.values())


def test_a_foreign_checkpoint_needs_no_kept_file(tmp_path, bert, perturbed, logits):
    adapted = perturbed(bert, copy.deepcopy(BERT["both"])).float()
    adapted.save_pretrained(tmp_path / "theirs")
    path = Adapter.load(tmp_path / "theirs").save(tmp_path / "ours")
    assert not (path / KEPT).exists()
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert {name: a.tobytes() for name, a in theirs.items()} == {name: a.tobytes() for name, a in ours.items()}
    again = PeftModel.from_pretrained(copy.deepcopy(bert), path).eval()
    assert np.array_equal(logits(again, torch.float32), logits(adapted, torch.float32))


def test_peft_takes_names_that_end_alike(tmp_path):
    """PEFT asks whether a name *ends* in one of the feedforward_modules, and ``my_fc`` ends in ``fc``."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.my_fc = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.my_fc(torch.relu(self.fc(x)))

    edits = {"fc": Edit(lam=np.full(4, 0.5)), "my_fc": Edit(output_scale=np.full(4, -2.0))}
    path = ia3(edits).save(tmp_path / "a")
    assert isinstance(json.loads((path / "adapter_config.json").read_text())["feedforward_modules"], str)
    model, x = Two().double(), torch.randn(3, 4, dtype=torch.float64)
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), path).double()
    expected = -model.my_fc(torch.relu(model.fc(1.5 * x)))
    assert torch.allclose(adapted(x), expected, rtol=64 * 2.0**-53, atol=64 * 2.0**-53)
    assert {n: sorted(e.tensors()) for n, e in Adapter.load(path).edits.items()} == {
        "fc": ["lambda"],
        "my_fc": ["out_lambda"],
    }


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (ia3({"fc": Edit(lam=np.ones(2), delta=np.ones(2))}), "IA3 has no delta"),
        (ia3({"fc": Edit(lam=np.ones(2), output_scale=np.ones(2))}), "scales input and output"),
        (ia3({"fc": Edit(output_low_rank=LowRank(np.ones((1, 2)), np.ones((2, 1)), 1.0))}), "IA3 has no out_A"),
        (ia3({"fc": Edit(lam=np.ones(2))}, convolutions={"fc": [1, 1]}), "is a Conv1d"),
        (ia3({"fc": Edit(lam=np.full(2, 1e39))}), "no finite float32"),
        (ia3({"fc": Edit(lam=np.ones(2))}, convolutions=[1]), "broken convolutions"),
        (ia3({"fc": Edit(lam=np.ones(2))}, convolutions={"fc": ["x", 1]}), "broken convolutions"),
    ],
)
def test_what_ia3_cannot_hold_is_not_half_saved(tmp_path, adapter, message):
    with pytest.raises(AdapterFormatError, match=message):
        adapter.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_untrained_ia3_is_the_identity(tmp_path, bert):
    get_peft_model(copy.deepcopy(bert), copy.deepcopy(BERT["both"])).save_pretrained(tmp_path)
    assert {edit.distance() for edit in Adapter.load(tmp_path).edits.values()} == {0.0}
