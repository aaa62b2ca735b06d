"""Whole models through PEFT and the Trainer: files, heads, several adapters, sharing, precision."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from deployfa.adapter import Adapter
from deployfa.errors import EditError, InputError
from deployfa.training.tuners import LoRFAConfig, VeFAConfig
from deployfa.training.tuners.layer import FeatureLayer
from deployfa.training.tuners.peft_type import add_member

torch.set_num_threads(1)

CONFIGS = {"vefa": VeFAConfig, "lorfa": LoRFAConfig}
SUFFIXES = {
    ("vefa", "none"): {"vefa_lambda"},
    ("vefa", "shift"): {"vefa_lambda", "vefa_delta"},
    ("lorfa", "none"): {"lorfa_A", "lorfa_B"},
    ("lorfa", "shift"): {"lorfa_A", "lorfa_B", "lorfa_delta"},
}
QKV = ["query", "key", "value"]
both = pytest.mark.parametrize("method", CONFIGS)
with_bias = pytest.mark.parametrize(("method", "bias"), SUFFIXES)


def bert():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(**size, vocab_size=50, max_position_embeddings=16, num_labels=3)
    return BertForSequenceClassification(config).eval()


def inputs():
    torch.manual_seed(1)
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(0, 50, (4, 8)), "attention_mask": mask}


def adapted(method, **config):
    config = {"target_modules": "all-linear", "task_type": "SEQ_CLS", **config}
    return get_peft_model(bert(), CONFIGS[method](**config)).eval()


def perturb(model, name="default", seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def adapter_parameters(model, name="default"):
    return {n: p for n, p in model.named_parameters() if n.endswith(f".{name}") and ("vefa_" in n or "lorfa_" in n)}


def logits(model):
    with torch.no_grad():
        return model(**inputs()).logits


def layers(model):
    return {m.site: m for m in model.modules() if isinstance(m, FeatureLayer)}


def test_peft_knows_both_and_a_second_time_changes_nothing():
    before = list(PeftType)
    assert add_member("VEFA") is PeftType.VEFA is PeftType("VEFA") is PeftType["VEFA"]
    assert list(PeftType) == before
    assert [str(t.value) for t in before[-2:]] == ["VEFA", "LORFA"]


@both
def test_a_fresh_adapter_is_the_base_bit_for_bit(method):
    assert torch.equal(logits(adapted(method, bias="shift")), logits(bert()))


@with_bias
def test_files(method, bias, tmp_path):
    model = perturb(adapted(method, bias=bias))
    with torch.no_grad():
        head = model.base_model.model.classifier.modules_to_save["default"]
        head.weight.normal_()
    model.save_pretrained(tmp_path)
    sites = sorted(layers(model))
    assert len(sites) == 2 * 6 + 1  # two layers of six linears and the pooler; the head is no site
    keys = {f"base_model.model.{site}.{suffix}" for site in sites for suffix in SUFFIXES[method, bias]}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == keys | {f"base_model.model.classifier.{name}" for name in ("weight", "bias")}

    again = PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())
    assert not torch.equal(logits(again), logits(bert()))

    adapter = Adapter.load(tmp_path)
    assert adapter.method == method and sorted(adapter.edits) == sites
    assert np.array_equal(adapter.modules["classifier"]["weight"], head.weight.detach().numpy())
    for site, layer in layers(model).items():
        loaded, ours = adapter.edits[site].tensors(), layer.edit("default").tensors()
        assert set(loaded) == set(ours)
        assert all(np.array_equal(loaded[name], ours[name]) for name in ours)
        adapter.edits[site].check(site, layer.in_features, layer.base_layer.out_features)

    adapter.save(tmp_path / "ours")
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path / "ours").eval()), logits(model))


def float64_noise(model):
    """How far rounding moves the logits of ``model`` in float64: 2^-29 times as far as in float32, which is measured.

    Leaves the model in float64.
    """
    rough = logits(model).double()
    return float((rough - logits(model.double())).abs().max()) * 2.0**-29


@with_bias
def test_merged_model_is_the_same(method, bias):
    model = perturb(adapted(method, bias=bias))
    tolerance = 8 * float64_noise(model)
    before = logits(model)
    assert before.dtype == torch.float64
    model.merge_adapter(safe_merge=True)
    assert float((logits(model) - before).abs().max()) <= tolerance
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    merged = model.merge_and_unload()
    assert type(merged) is BertForSequenceClassification and not layers(merged)
    assert float((logits(merged) - before).abs().max()) <= tolerance
    merged.bert.pooler.dense.weight.data[:, 3] *= 1.001  # one λ of one site, off by a thousandth
    assert float((logits(merged) - before).abs().max()) > tolerance


@both
def test_named_adapters(method):
    model = perturb(adapted(method, bias="shift", target_modules=["query"]), seed=3)
    first = logits(model)
    model.add_adapter("other", CONFIGS[method](target_modules="all-linear", bias="shift", task_type="SEQ_CLS"))
    assert torch.equal(logits(model), first)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "_" in n and n.endswith(".other")} == set()
    perturb(model, "other", seed=4)
    model.set_adapter("other")
    assert not torch.equal(logits(model), first)
    assert all(p.requires_grad for p in adapter_parameters(model, "other").values())
    assert not any(p.requires_grad for p in adapter_parameters(model, "default").values())
    with model.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(logits(model), logits(bert()))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.raises(InputError, match=r"query': adapters 'default' and 'other' would act together;"):
        model.merge_adapter(["default", "other"])
    assert not any(layer.merged for layer in layers(model).values())
    model.merge_adapter(["other"])
    assert layers(model)["bert.pooler.dense"].merged
    model.unmerge_adapter()
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    assert adapter_parameters(model, "other") == {}


@both
def test_adapters_on_different_sites_act_together(method):
    model = perturb(adapted(method, target_modules=["query"], task_type=None), seed=3)
    model.add_adapter("other", CONFIGS[method](target_modules=["value"]))
    perturb(model, "other", seed=4)
    model.base_model.set_adapter(["default", "other"])
    together = logits(model)
    alone = []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(logits(model))
    assert not any(torch.equal(together, one) for one in alone)
    model.add_adapter("third", CONFIGS[method](target_modules=["value"]))
    with pytest.raises(InputError, match=r"value': adapters 'other' and 'third' would act together;"):
        model.base_model.set_adapter(["other", "third"])


@both
def test_targets(method):
    def sites(**config):
        return sorted(layers(adapted(method, **config)))

    encoder = "bert.encoder.layer"
    assert sites(target_modules=["query"]) == [f"{encoder}.{i}.attention.self.query" for i in (0, 1)]
    assert sites(target_modules=["query"], layers_to_transform=[1]) == [f"{encoder}.1.attention.self.query"]
    assert sites(target_modules=r".*layer\.0\.attention\.self\.(query|key)") == [
        f"{encoder}.0.attention.self.key",
        f"{encoder}.0.attention.self.query",
    ]
    assert sites(target_modules=["query", "key"], exclude_modules=["key"]) == sites(target_modules=["query"])
    assert "classifier" not in sites()


def test_the_saved_config_does_not_depend_on_the_order_of_a_set():
    model = adapted("vefa")
    written = model.peft_config["default"].to_dict()["target_modules"]
    assert written == sorted(layers(model)) and isinstance(model.peft_config["default"].target_modules, set)


@both
def test_trainer_changes_the_adapter_and_the_head_only(method, tmp_path):
    model = adapted(method, bias="shift")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{key: value[i] for key, value in inputs().items()} | {"labels": i % 3} for i in range(4)]
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.1, "report_to": []}
    arguments = TrainingArguments(str(tmp_path), **options, use_cpu=True, save_steps=2, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=rows).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    heads = {f"base_model.model.classifier.modules_to_save.default.{name}" for name in ("weight", "bias")}
    # q, k and v each get a δ of their own; the key's shifts all scores of a row alike, which softmax takes out
    untouched = {n for n in adapter_parameters(model) if ".key." in n and n.endswith("_delta.default")}
    assert changed | untouched == set(adapter_parameters(model)) | heads
    reloaded = PeftModel.from_pretrained(bert(), tmp_path / "checkpoint-2").eval()
    assert torch.equal(logits(reloaded), logits(model.eval()))


@both
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(method, reentrant):
    def gradients(model):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(**inputs(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        return {name: p.grad for name, p in adapter_parameters(model).items()}

    plain = gradients(perturb(adapted(method, bias="shift")))
    model = perturb(adapted(method, bias="shift"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = gradients(model)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert all(g is not None for g in plain.values()) and any(bool(g.any()) for g in plain.values())


@both
def test_bfloat16_autocast(method):
    """The site's output has the dtype it has without adapter, T(x) has that of x, gradients that of the parameters."""
    model = perturb(adapted(method, bias="shift"))
    layer = layers(model)["bert.pooler.dense"]
    seen = []
    layer.base_layer.register_forward_hook(lambda _, given, output: seen.append((given[0].dtype, output.dtype)))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 32, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(x)
        assert seen.pop() == (dtype, torch.bfloat16)
        output.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**inputs()).logits
    exact = logits(model)
    base = bert()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rough_base = base(**inputs()).logits
    noise = (rough_base - logits(base)).abs().max() / logits(base).abs().max()
    # the adapted model makes T besides: two more roundings at each site, which had two, input and output
    assert (rough - exact).abs().max() / exact.abs().max() <= 4 * noise


@both
def test_half_precision_base_keeps_a_float32_adapter(method):
    base = bert().bfloat16()
    model = get_peft_model(base, CONFIGS[method](target_modules=QKV, share_input=True))
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert len(adapter_parameters(model)) == 2 * (1 if method == "vefa" else 2)  # still shared after the cast
    assert logits(model).dtype == torch.bfloat16


def test_a_small_scale_is_not_rounded_away_in_bfloat16():
    """λ = 0.003 is below half the step of bfloat16 at 1, so that 1 + λ would be 1.  T(x) is rounded once, as a sum."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(1, 1, bias=False)).bfloat16()
    layer[0].weight.data.fill_(1.0)
    model = get_peft_model(layer, VeFAConfig(target_modules=["0"]))
    lam = model.get_base_model()[0].vefa_lambda["default"]
    lam.data.fill_(0.003)
    x = (1 + torch.rand(1000, 1)).bfloat16()
    output = model(x).detach()
    assert torch.equal(output, (x.double() * (1 + lam.detach().bfloat16().double())).bfloat16())
    assert torch.equal(1 + lam.detach().bfloat16(), torch.ones(1)) and not torch.equal(output, x)


@with_bias
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_share_input(method, bias, low_cpu_mem_usage, tmp_path):
    def attention(model):
        return [layers(model)[f"bert.encoder.layer.1.attention.self.{name}"] for name in QKV]

    def shared(model):
        query, key, value = attention(model)
        return all(
            getattr(query, suffix)["default"] is getattr(other, suffix)["default"]
            for suffix in SUFFIXES[method, bias]
            for other in (key, value)
        )

    model = adapted(method, bias=bias, share_input=True)
    assert shared(model)
    assert len(adapter_parameters(model)) == len(SUFFIXES[method, bias]) * (2 * 4 + 1)
    assert not shared(adapted(method, bias=bias))
    perturb(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimiser.step()
    assert shared(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(layers(model)) == 2 * 6 + 1
    assert len(tensors) == len(SUFFIXES[method, bias]) * (2 * 6 + 1) + 2
    assert set(get_peft_model_state_dict(model)) == set(tensors)

    again = PeftModel.from_pretrained(bert(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True).eval()
    assert shared(again)
    assert all(p.requires_grad for p in adapter_parameters(again).values())
    assert torch.equal(logits(again), logits(model))
    merged = again.double().merge_and_unload()
    before = logits(model.double())
    assert float((logits(merged) - before).abs().max()) <= 1e-12 * float(before.abs().max())

    name = f"base_model.model.bert.encoder.layer.1.attention.self.key.{min(SUFFIXES[method, bias])}"
    tensors[name] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(EditError, match="differ in the file but share one parameter"):
        PeftModel.from_pretrained(bert(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@both
def test_sites_share_only_with_the_same_parent_and_width(method):
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(6, 4), nn.Linear(6, 4)
            self.gate, self.up = nn.Linear(4, 4), nn.Linear(4, 4)

    model = nn.ModuleList([Cross(), Cross()])
    config = CONFIGS[method](target_modules=[*QKV, "gate", "up"], share_input=True, share_groups=[QKV, ["up", "gate"]])
    found = layers(get_peft_model(model, config))
    suffix = min(SUFFIXES[method, "none"])
    owners = {}
    for site, layer in found.items():
        owners.setdefault(id(getattr(layer, suffix)["default"]), []).append(site)
    assert sorted(map(sorted, owners.values())) == [
        sites for i in "01" for sites in ([f"{i}.gate", f"{i}.up"], [f"{i}.key", f"{i}.value"], [f"{i}.query"])
    ]
