"""PEFT checkpoints, ours and foreign: the edits do what PEFT's own model does, or the checkpoint is refused by name."""

from __future__ import annotations

import copy
import json

import numpy as np
import peft
import pytest
from peft import LoraConfig, PeftModel

from deployfa.adapter import Adapter
from deployfa.edits import Edit, LowRank
from deployfa.errors import AdapterFormatError

ATTENTION = ["query", "value"]
CONFIGS = {
    "plain": LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION),
    "rslora": LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, use_rslora=True),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[*ATTENTION, "key"],
        rank_pattern={"query": 2, "layer.1.attention.self.key": 3},
        alpha_pattern={r"layer\.0\.attention\.self\.\w+": 5, "value": 1},
    ),
    "rslora patterns": LoraConfig(
        r=4, target_modules=ATTENTION, use_rslora=True, rank_pattern={"^.*layer.1.*query": 2}
    ),
    "head": LoraConfig(r=4, target_modules=ATTENTION, task_type="SEQ_CLS"),
    "modules to save": LoraConfig(r=2, target_modules=ATTENTION, modules_to_save=["pooler", "classifier"]),
    "some layers": LoraConfig(r=2, target_modules=ATTENTION, layers_to_transform=[1], layers_pattern="layer"),
    "regex": LoraConfig(r=2, target_modules=r".*\.0\..*(query|dense)", lora_dropout=0.5),
    "excluded": LoraConfig(r=2, target_modules=["dense", "query"], exclude_modules=["pooler.dense", "output.dense"]),
    "gaussian": LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights="gaussian"),
    "no trained bias": LoraConfig(r=2, target_modules=ATTENTION, bias="none"),
    "all linear": LoraConfig(r=2, target_modules="all-linear", modules_to_save=["LayerNorm"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_foreign_lora_on_bert(tmp_path, bert, name, perturbed, same_effect):
    adapted = perturbed(bert, copy.deepcopy(CONFIGS[name]))
    adapted.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    assert adapter.found == "PEFT LORA directory not written by deployfa" and adapter.method == "lora"
    assert same_effect(bert, adapted, adapter)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter.parameters + adapter.module_parameters == trained


@pytest.mark.parametrize("change", ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"])
def test_a_changed_scale_is_seen(tmp_path, bert, change, perturbed, same_effect):
    adapted = perturbed(bert, copy.deepcopy(CONFIGS["patterns"]))
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config[change] = {"r": 5, "lora_alpha": 7, "use_rslora": True, "rank_pattern": {}, "alpha_pattern": {}}[change]
    file.write_text(json.dumps(config))
    assert not same_effect(bert, adapted, Adapter.load(tmp_path))


def test_foreign_lora_on_gpt2_conv1d(tmp_path, gpt2, perturbed, same_effect):
    config = LoraConfig(r=3, lora_alpha=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    adapted = perturbed(gpt2, config)
    adapted.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    low = adapter.edits["transformer.h.0.attn.c_attn"].output_low_rank
    assert (low.a.shape, low.b.shape) == ((3, 16), (48, 3))
    assert same_effect(gpt2, adapted, adapter)


def test_foreign_lora_on_convolutions(tmp_path, convolutions, perturbed, same_effect, logits):
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["conv", "groups", "line", "linear"])
    adapted = perturbed(convolutions, config)
    adapted.save_pretrained(tmp_path / "theirs")
    adapter = Adapter.load(tmp_path / "theirs")
    assert adapter.edits["conv"].output_low_rank.a.shape == (2, 3, 3, 3)
    assert adapter.edits["line"].output_low_rank.b.shape == (5, 2)
    # PEFT's B of a grouped convolution reads one column for each group; the edit's B says so with zeros
    assert np.array_equal(adapter.edits["groups"].output_low_rank.b != 0, [[1, 0], [1, 0], [0, 1], [0, 1]])
    assert same_effect(convolutions, adapted, adapter)
    again = PeftModel.from_pretrained(copy.deepcopy(convolutions).double(), adapter.save(tmp_path / "ours"))
    assert np.array_equal(logits(again.double().eval()), logits(adapted))


def test_legacy_bin(tmp_path, bert, perturbed, same_effect):
    adapted = perturbed(bert, LoraConfig(r=4, target_modules=ATTENTION))
    adapted.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert same_effect(bert, adapted, Adapter.load(tmp_path))


@pytest.mark.parametrize("form", ["directory", "pt", "safetensors"])
def test_a_foreign_checkpoint_survives_our_formats(tmp_path, bert, form, perturbed, same_effect, logits):
    adapted = perturbed(bert, copy.deepcopy(CONFIGS["patterns"]))
    adapted.save_pretrained(tmp_path / "theirs")
    path = Adapter.load(tmp_path / "theirs").save(tmp_path / ("ours" if form == "directory" else f"ours.{form}"))
    assert same_effect(bert, adapted, Adapter.load(path))
    if form == "directory":
        again = PeftModel.from_pretrained(copy.deepcopy(bert).double(), path).double().eval()
        assert np.array_equal(logits(again), logits(adapted))


@pytest.mark.parametrize("kind", ["vefa", "lorfa", "lora", "vefa-shift", "lorfa-shift", "ia3"])
def test_peft_takes_what_we_write_even_of_an_adapter_made_by_hand(tmp_path, bert, kind, same_effect):
    import deployfa.training.tuners  # noqa: F401  so that PEFT knows the methods

    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape)

    edits = {
        "vefa": lambda: Edit(lam=draw(16)),
        "lorfa": lambda: Edit(input_low_rank=LowRank(draw(4, 16), draw(16, 4), 0.625)),
        "lora": lambda: Edit(output_low_rank=LowRank(draw(4, 16), draw(16, 4), 0.625)),
        "vefa-shift": lambda: Edit(lam=draw(16), delta=draw(16)),
        "lorfa-shift": lambda: Edit(input_low_rank=LowRank(draw(4, 16), draw(16, 4), 0.625), delta=draw(16)),
        "ia3": lambda: Edit(lam=draw(16).astype(np.float32).astype(np.float64) - 1),
    }[kind]
    method = kind.partition("-")[0]
    sites = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
    head = {"classifier": {"weight": draw(3, 16), "bias": draw(3)}}
    adapter = Adapter(method, {site: edits() for site in sites}, head)
    path = adapter.save(tmp_path / "made")
    assert Adapter.load(path).tensors().keys() == adapter.tensors().keys()
    adapted = PeftModel.from_pretrained(copy.deepcopy(bert).double(), path).double().eval()
    assert same_effect(bert, adapted, Adapter.load(path))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            Adapter(
                "lora",
                {"fc": Edit(output_low_rank=LowRank(np.ones((2, 2)), np.ones((2, 2)), 0.5))},
                config={"r": 4, "lora_alpha": 2},
            ),
            r"its rank is 2, but the config says 4; save it as \.safetensors",
        ),
        (
            Adapter(
                "vefa", {"fc": Edit(lam=np.ones(2), input_low_rank=LowRank(np.ones((1, 2)), np.ones((2, 1)), 1.0))}
            ),
            "has no A",
        ),
        (Adapter("lora", {"fc": Edit(delta=np.ones(2))}), "has no delta"),
        (Adapter("head", {}), "no PEFT form"),
        (
            Adapter(
                "lora",
                {"fc": Edit(output_low_rank=LowRank(np.ones((2, 2)), np.ones((2, 2)), 0.5))},
                config={"r": 2, "lora_alpha": 2},
            ),
            r"s is 0\.5, but the config's alpha and r give 1\.0; save it as \.safetensors",
        ),
    ],
)
def test_what_peft_cannot_hold_is_not_half_saved(tmp_path, adapter, message):
    with pytest.raises(AdapterFormatError, match=message):
        adapter.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def checkpoint(tmp_path, make_adapter):
    path = make_adapter("lora").save(tmp_path / "adapter")
    (path / "deployfa.json").unlink()

    def change(**changes):
        file = path / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        return path

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": None},
        {"peft_type": ["LORA"]},
        {"peft_type": "P_TUNING"},
        {"r": 0},
        {"r": "four"},
        {"r": -1, "use_rslora": True},
        {"r": None},
        {"r": 10**400},
        {"lora_alpha": "x"},
        {"lora_alpha": None},
        {"lora_alpha": [1]},
        {"rank_pattern": [1]},
        {"rank_pattern": {"(": 2}},
        {"rank_pattern": {"fc1": "x"}},
        {"alpha_pattern": "fc1"},
        {"modules_to_save": "classifier"},
        {"modules_to_save": 5},
        {"modules_to_save": [3]},
        {"modules_to_save": []},
        {"alora_invocation_tokens": [1]},
        {"use_qalora": True},
        {"use_bdlora": {"x": 1}},
        {"layer_replication": [[0, 1]]},
    ],
    ids=str,
)
def test_broken_configs(checkpoint, changes):
    Adapter.load(checkpoint())
    with pytest.raises(AdapterFormatError) as caught:
        Adapter.load(checkpoint(**changes))
    assert "\n" not in str(caught.value)


def test_broken_directories(tmp_path, make_adapter):
    with pytest.raises(AdapterFormatError, match=r"has no adapter_config\.json; pass a PEFT checkpoint directory"):
        Adapter.load(tmp_path)
    path = make_adapter("lora").save(tmp_path / "adapter")
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors", "deployfa.json"]
    for name, content in files.items():
        for broken in (None, b"", b"\xff\xfe", b"[" * 100_000, b"[]", content[: len(content) // 2]):
            if broken is None:
                (path / name).unlink()
            else:
                (path / name).write_bytes(broken)
            if broken is None and name == "deployfa.json":
                assert Adapter.load(path).found.endswith("not written by deployfa")
            else:
                with pytest.raises(AdapterFormatError):
                    Adapter.load(path)
            (path / name).write_bytes(content)


def test_peft_is_the_version_whose_rules_these_are():
    from peft.utils.other import get_pattern_key

    from deployfa.adapter.peft_directory import _pattern

    assert peft.__version__.startswith("0.2")
    patterns = {"query": 1, r"layer\.\d+\.key": 2, "^bert.value": 3, "b|c": 4}
    for site in ("bert.query", "myquery", "a.layer.3.key", "bert.value", "x.bert.value", "x.b", "xc", "x.c"):
        key = get_pattern_key(patterns.keys(), site)
        assert _pattern(site, patterns, 0) == patterns.get(key, 0)


def test_modules_to_save_match_by_their_end_as_in_peft():
    """DistilBERT: PEFT saves ``pre_classifier`` along when asked for ``classifier``."""
    from deployfa.adapter.peft_directory import from_state

    tensors = {
        "base_model.model.fc.vefa_lambda": np.ones(3, np.float32),
        "base_model.model.pre_classifier.weight": np.ones((2, 2), np.float32),
        "base_model.model.head.classifier.out.weight": np.ones((2, 2), np.float32),
    }
    edits, modules = from_state(tensors, {"peft_type": "VEFA", "modules_to_save": ["classifier"]}, "here")
    assert set(edits) == {"fc"}
    assert set(modules) == {"pre_classifier", "head.classifier.out"}
    with pytest.raises(AdapterFormatError, match="whole weight that modules_to_save does not name"):
        from_state(
            {"base_model.model.score.weight": np.ones(2)}, {"peft_type": "VEFA", "modules_to_save": ["x"]}, "here"
        )
