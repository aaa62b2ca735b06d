"""``tritonclient.http``, as it is on PyPI, against the server: every call that it offers."""

from __future__ import annotations

import asyncio
import base64
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.http import InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

import deployfa
from deployfa.adapter import Adapter
from deployfa.bundle import Bundle
from deployfa.edits import Array
from deployfa.predict import Predictor
from deployfa.preprocess import TextPreprocessor

TEXTS = ["A joy from start to finish.", "I want my money back.", "No."]
ADAPTERS = ("vefa", "lorfa", "base")


@pytest.fixture(scope="module")
def client(served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.url.removeprefix("http://"), concurrency=8) as client:
        yield client


@pytest.fixture(scope="module")
def admin(served) -> dict[str, str]:
    return {"Authorization": f"Bearer {served.admin}"}


@pytest.fixture(scope="module")
def own(packs: dict[str, Path], bundles: dict[str, Path]) -> Callable[..., Array]:
    """``own("pack", texts, adapter)`` → the bundle's own logits, (rows, labels)."""
    predictors = {name: Predictor(Bundle.open(path)) for name, path in (packs | bundles).items() if name != "side-op"}

    def logits(model: str, texts: Sequence[str], adapter: str | None = None) -> Array:
        names = None if adapter is None else [adapter] * len(texts)
        found = predictors[model].logits(list(texts), adapters=names)
        return found[:, np.isfinite(found).all(axis=0)]

    return logits


@pytest.fixture(scope="module")
def tokens(packs: dict[str, Path]) -> Mapping[str, Array]:
    """``TEXTS`` as the pack's own inputs, (rows, tokens)."""
    bundle = Bundle.open(packs["pack"])
    return TextPreprocessor(bundle.path, max_length=bundle.manifest.preprocessing.max_length).encode(TEXTS)


def text(texts: Sequence[str], *, binary: bool = True) -> list[InferInput]:
    given = InferInput("text", [len(texts)], "BYTES")
    given.set_data_from_numpy(np.array(list(texts), object), binary_data=binary)
    return [given]


def tensors(feeds: Mapping[str, Array], *, binary: bool = True) -> list[InferInput]:
    found = []
    for name, array in feeds.items():
        found.append(InferInput(name, list(array.shape), "INT64"))
        found[-1].set_data_from_numpy(array, binary_data=binary)
    return found


def same(result: InferResult, wanted: Array, name: str = "logits") -> None:
    got = result.as_numpy(name)
    assert got.dtype == np.float32 and got.shape == wanted.shape
    assert np.allclose(got, wanted, rtol=0, atol=1e-5)


def refused(call: Callable[[], Any], status: str, *parts: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        call()
    assert caught.value.status() == status
    for part in parts:
        assert part in caught.value.message()


def counts(client: triton.InferenceServerClient, model: str) -> dict[str, int]:
    """Every count of one model's statistics."""
    (stats,) = client.get_inference_statistics(model)["model_stats"]
    assert stats["name"] == model and stats["version"] == "1"
    found = {name: each["count"] for name, each in stats["inference_stats"].items()}
    found |= {f"batches of {each['batch_size']}": each["compute_infer"]["count"] for each in stats["batch_stats"]}
    return found | {name: stats[name] for name in ("inference_count", "execution_count", "last_inference")}


class TestHealthAndMetadata:
    def test_live_and_ready(self, client) -> None:
        assert client.is_server_live() and client.is_server_ready()

    def test_a_model_is_ready_in_its_one_version(self, client) -> None:
        assert client.is_model_ready("pack") and client.is_model_ready("pack", "1")
        assert not client.is_model_ready("pack", "2") and not client.is_model_ready("nothing")

    def test_the_server(self, client) -> None:
        told = client.get_server_metadata()
        assert told["name"] == "deployfa" and told["version"] == deployfa.__version__
        assert {"binary_tensor_data", "classification", "model_repository", "statistics"} <= set(told["extensions"])

    @pytest.mark.parametrize("version", ["", "1"])
    def test_a_models_metadata(self, client, version: str) -> None:
        told = client.get_model_metadata("pack", version)
        assert told["name"] == "pack" and told["versions"] == ["1"] and told["platform"] == "onnxruntime_onnx"
        inputs = {each["name"]: (each["datatype"], each["shape"]) for each in told["inputs"]}
        assert inputs["input_ids"] == inputs["attention_mask"] == ("INT64", [-1, -1])
        assert inputs["text"] == ("BYTES", [-1])
        outputs = {each["name"]: (each["datatype"], each["shape"][0]) for each in told["outputs"]}
        assert outputs == {"logits": ("FP32", -1), "label": ("BYTES", -1), "score": ("FP32", -1)}

    @pytest.mark.parametrize("version", ["", "1"])
    def test_a_models_configuration(self, client, version: str) -> None:
        config = client.get_model_config("pack", version)
        assert config["name"] == "pack" and config["max_batch_size"] == 32
        inputs = {each["name"]: each for each in config["input"]}
        assert inputs["input_ids"] == {"name": "input_ids", "data_type": "TYPE_INT64", "dims": [-1], "optional": True}
        assert inputs["text"]["data_type"] == "TYPE_STRING"
        outputs = {each["name"]: each["data_type"] for each in config["output"]}
        assert outputs == {"logits": "TYPE_FP32", "label": "TYPE_STRING", "score": "TYPE_FP32"}
        assert config["dynamic_batching"]["preferred_batch_size"] == [32]

    def test_what_there_is_not_is_refused(self, client) -> None:
        for call in (client.get_model_metadata, client.get_model_config, client.get_inference_statistics):
            refused(lambda call=call: call("pakc"), "404", "no model 'pakc'", "pack")
            refused(lambda call=call: call("pack", "7"), "404", "version 1 only, not '7'")


class TestRepository:
    def test_the_index_names_every_model(self, client) -> None:
        index = {each["name"]: (each["version"], each["state"]) for each in client.get_model_repository_index()}
        assert index == dict.fromkeys(("pack", "baked", "folded", "slots"), ("1", "READY"))

    def test_unloaded_it_does_not_answer_and_loaded_it_does_again(self, client, admin, own) -> None:
        client.unload_model("folded", headers=admin)
        try:
            assert not client.is_model_ready("folded") and client.is_server_ready()
            refused(lambda: client.infer("folded", text(TEXTS)), "404", "'folded' is not loaded", "load it first")
            refused(lambda: client.get_model_metadata("folded"), "404")
            state = {each["name"]: (each["state"], each["reason"]) for each in client.get_model_repository_index()}
            assert state["folded"] == ("UNAVAILABLE", "unloaded") and state["pack"] == ("READY", "")
            told = client.get_inference_statistics()["model_stats"]
            assert {each["name"] for each in told} == {"pack", "baked", "slots"}
            same(client.infer("pack", text(TEXTS), parameters={"adapter": "vefa"}), own("pack", TEXTS, "vefa"))
            client.unload_model("folded", headers=admin, unload_dependents=True)
        finally:
            client.load_model("folded", headers=admin)
        assert client.is_model_ready("folded")
        same(client.infer("folded", text(TEXTS)), own("folded", TEXTS))

    def test_loading_again_what_is_loaded_changes_no_answer(self, client, admin, own) -> None:
        client.load_model("pack", headers=admin)
        same(client.infer("pack", text(TEXTS), parameters={"adapter": "lorfa"}), own("pack", TEXTS, "lorfa"))

    def test_nobody_changes_it_without_the_token(self, client) -> None:
        for headers in (None, {"Authorization": "Bearer of bad news"}):
            refused(lambda headers=headers: client.unload_model("pack", headers=headers), "401", "admin token")
            refused(lambda headers=headers: client.load_model("pack", headers=headers), "401", "admin token")
        assert client.is_model_ready("pack")

    def test_a_plugin_can_bring_the_token(self, served, admin) -> None:
        class Bearer(triton.InferenceServerClientPlugin):
            def __call__(self, request) -> None:
                request.headers |= admin

        with triton.InferenceServerClient(served.url.removeprefix("http://")) as client:
            plugin = Bearer()
            client.register_plugin(plugin)
            assert client.plugin() is plugin
            client.load_model("folded")
            client.unregister_plugin()
            refused(lambda: client.load_model("folded"), "401")

    def test_an_unknown_model_is_not_loaded(self, client, admin) -> None:
        refused(lambda: client.load_model("nothing", headers=admin), "404", "no model 'nothing'")
        refused(lambda: client.unload_model("nothing", headers=admin), "404", "no model 'nothing'")

    @pytest.mark.parametrize("model", ["pack", "slots"])
    def test_files_add_an_adapter(self, client, admin, own, trained, tmp_path: Path, model: str) -> None:
        Adapter.load(trained["vefa"]).save(tmp_path / "again.safetensors")
        files = {"file:adapters/again.safetensors": (tmp_path / "again.safetensors").read_bytes()}
        refused(lambda: client.infer(model, text(TEXTS), parameters={"adapter": "again"}), "404", "no adapter 'again'")
        client.load_model(model, headers=admin, config="{}", files=files)
        wanted = own("folded", TEXTS)
        same(client.infer(model, text(TEXTS), parameters={"adapter": "again"}), wanted)
        # and it is still there when the model is loaded again: it was kept in --state
        client.load_model(model, headers=admin)
        same(client.infer(model, text(TEXTS), parameters={"adapter": "again"}), wanted)

    def test_a_pt_file_adds_an_adapter_too(self, client, admin, own, trained) -> None:
        files = {"file:adapters/torch.pt": trained["vefa"].read_bytes()}
        client.load_model("pack", headers=admin, config="{}", files=files)
        same(client.infer("pack", text(TEXTS), parameters={"adapter": "torch"}), own("pack", TEXTS, "vefa"))

    def test_files_that_are_no_adapters_are_refused(self, client, admin, trained, own) -> None:
        def load(model: str, path: str, content: bytes = b"no adapter at all", config: str = "{}") -> None:
            client.load_model(model, headers=admin, config=config, files={path: content})

        refused(
            lambda: load("pack", "file:1/model.onnx"), "400", "'file:1/model.onnx'", "file:adapters/NAME.safetensors"
        )
        refused(lambda: load("pack", "file:adapters/x.safetensors"), "400", "x")
        refused(lambda: load("folded", "file:adapters/x.safetensors"), "400", "is one adapter")
        refused(lambda: load("pack", "file:adapters/base.pt", trained["vefa"].read_bytes()), "400", "base")
        refused(lambda: load("pack", "file:adapters/vefa.pt", trained["lorfa"].read_bytes()), "400", "vefa")
        same(client.infer("pack", text(TEXTS), parameters={"adapter": "vefa"}), own("pack", TEXTS, "vefa"))

    def test_of_several_files_all_are_read_first(self, client, admin, trained, served) -> None:
        good = base64.b64encode(trained["vefa"].read_bytes()).decode()
        body = {"parameters": {"file:adapters/first.pt": good, "file:adapters/second.pt": "no base64"}}
        status, told, _ = served.ask("/v2/repository/models/pack/load", body, headers=admin)
        assert status == 400 and "'file:adapters/second.pt' is not base64" in told["error"]
        refused(lambda: client.infer("pack", text(TEXTS), parameters={"adapter": "first"}), "404", "'first'")

    def test_a_configuration_of_ones_own_is_refused(self, client, admin) -> None:
        """Or the client believes that its ``max_batch_size`` holds."""
        for config in ('{"max_batch_size": 4}', "no JSON"):
            refused(lambda config=config: client.load_model("pack", headers=admin, config=config), "400", "config")
        client.load_model("folded", headers=admin, config="{}")


class TestSettings:
    def test_there_are_no_traces(self, client, admin) -> None:
        off = {"trace_level": ["OFF"]}
        assert client.get_trace_settings()["trace_level"] == ["OFF"]
        assert client.get_trace_settings("pack")["trace_level"] == ["OFF"]
        for settings in ({"trace_level": None}, off, {"trace_level": "OFF"}, {}):
            assert client.update_trace_settings(settings=settings, headers=admin)["trace_level"] == ["OFF"]
            assert client.update_trace_settings("pack", settings, headers=admin)["trace_level"] == ["OFF"]
        wanted = {"trace_level": ["TIMESTAMPS"]}
        refused(lambda: client.update_trace_settings(settings=wanted, headers=admin), "400", "takes no traces")
        refused(lambda: client.update_trace_settings(settings=off), "401")
        refused(lambda: client.get_trace_settings("nothing"), "404", "no model 'nothing'")

    def test_the_log_can_be_made_quiet_and_loud(self, client, admin) -> None:
        before = client.get_log_settings()
        assert before["log_info"] is True and before["log_verbose_level"] == 0
        quiet = client.update_log_settings({"log_info": False, "log_verbose_level": 1}, headers=admin)
        try:
            assert quiet == client.get_log_settings() == {**before, "log_info": False, "log_verbose_level": 1}
        finally:
            after = client.update_log_settings({"log_info": True, "log_verbose_level": 0}, headers=admin)
        assert after == before
        assert client.update_log_settings(before, headers=admin) == before

    @pytest.mark.parametrize(
        "settings",
        [
            {"log_nothing": True},
            {"log_file": "elsewhere.log"},
            {"log_warning": False},
            {"log_format": "ISO8601"},
            {"log_info": "false"},
            {"log_verbose_level": "much"},
        ],
    )
    def test_what_cannot_be_set_is_not_taken_silently(self, client, admin, settings: dict[str, Any]) -> None:
        before = client.get_log_settings()
        refused(lambda: client.update_log_settings(settings, headers=admin), "400", next(iter(settings)))
        assert client.get_log_settings() == before

    def test_not_everybody_sets_the_log(self, client) -> None:
        refused(lambda: client.update_log_settings({"log_info": False}), "401", "admin token")

    def test_there_is_no_shared_memory(self, client) -> None:
        assert client.get_system_shared_memory_status() == client.get_cuda_shared_memory_status() == []
        client.unregister_system_shared_memory()
        client.unregister_cuda_shared_memory()
        client.unregister_system_shared_memory("mine")
        client.unregister_cuda_shared_memory("mine")
        refused(lambda: client.get_system_shared_memory_status("mine"), "404", "no region 'mine'")
        refused(lambda: client.get_cuda_shared_memory_status("mine"), "404", "no region 'mine'")
        told = "takes no shared memory; send tensors in the request"
        refused(lambda: client.register_system_shared_memory("mine", "/mine", 64), "400", told)
        refused(lambda: client.register_cuda_shared_memory("mine", b"handle", 0, 64), "400", told)
        given = InferInput("text", [1], "BYTES")
        given.set_shared_memory("mine", 64)
        refused(lambda: client.infer("pack", [given]), "400", "input 'text'", "takes no shared memory")
        output = InferRequestedOutput("logits")
        output.set_shared_memory("mine", 64)
        refused(lambda: client.infer("pack", text(TEXTS), outputs=[output]), "400", "output 'logits'")


class TestInfer:
    @pytest.mark.parametrize("binary", [True, False])
    @pytest.mark.parametrize("kind", ["text", "tokens"])
    @pytest.mark.parametrize("adapter", ADAPTERS)
    def test_in_every_form(self, client, own, tokens, binary: bool, kind: str, adapter: str) -> None:
        inputs = text(TEXTS, binary=binary) if kind == "text" else tensors(tokens, binary=binary)
        for answered in (True, False):
            outputs = [InferRequestedOutput("logits", binary_data=answered)]
            result = client.infer("pack", inputs, outputs=outputs, parameters={"adapter": adapter})
            same(result, own("pack", TEXTS, adapter))
            assert ("data" in result.get_output("logits")) is not answered

    def test_the_answer_says_whose_it_is(self, client) -> None:
        told = client.infer("pack", text(TEXTS), parameters={"adapter": "vefa"}, request_id="mine 17").get_response()
        assert (told["model_name"], told["model_version"], told["id"]) == ("pack", "1", "mine 17")
        assert told["parameters"] == {"adapter": "vefa"}
        assert "id" not in client.infer("pack", text(TEXTS), parameters={"adapter": "vefa"}).get_response()

    def test_two_shapes_of_text(self, client, own) -> None:
        given = InferInput("text", [len(TEXTS), 1], "BYTES")
        given.set_data_from_numpy(np.array(TEXTS, object).reshape(-1, 1))
        same(client.infer("folded", [given]), own("folded", TEXTS))

    def test_text_beyond_ascii(self, client, own) -> None:
        texts = ["Très drôle — und schön!", "最高の映画 🎬"]
        for binary in (True, False):
            same(client.infer("folded", text(texts, binary=binary)), own("folded", texts))

    def test_all_outputs_without_asking(self, client, own) -> None:
        result = client.infer("pack", text(TEXTS), parameters={"adapter": "lorfa"})
        names = [each["name"] for each in result.get_response()["outputs"]]
        assert names == ["logits", "label", "score"]
        same(result, own("pack", TEXTS, "lorfa"))

    def test_only_what_is_asked_for_in_that_order(self, client, own, packs) -> None:
        logits = own("pack", TEXTS, "vefa")
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        labels = Bundle.open(packs["pack"]).labels
        for binary in (True, False):
            outputs = [InferRequestedOutput(name, binary_data=binary) for name in ("score", "label")]
            result = client.infer("pack", text(TEXTS), outputs=outputs, parameters={"adapter": "vefa"})
            assert [each["name"] for each in result.get_response()["outputs"]] == ["score", "label"]
            assert result.as_numpy("logits") is None
            assert np.allclose(result.as_numpy("score"), share.max(axis=1) / share.sum(axis=1), rtol=0, atol=1e-5)
            told = [each.decode() if binary else each for each in result.as_numpy("label")]
            assert told == [labels[index] for index in logits.argmax(axis=1)]

    @pytest.mark.parametrize("count", [1, 2, 9])
    def test_the_best_classes(self, client, own, packs, count: int) -> None:
        logits = own("pack", TEXTS, "vefa")
        labels = Bundle.open(packs["pack"]).labels
        best = np.argsort(-logits, axis=1)[:, :count]
        for binary in (True, False):
            outputs = [InferRequestedOutput("logits", binary_data=binary, class_count=count)]
            result = client.infer("pack", text(TEXTS), outputs=outputs, parameters={"adapter": "vefa"})
            found = result.as_numpy("logits")
            assert found.shape == (len(TEXTS), min(count, logits.shape[1]))
            for row in range(len(TEXTS)):
                for place, index in enumerate(best[row]):
                    told = found[row, place].decode() if binary else found[row, place]
                    value, number, label = told.split(":")
                    assert (int(number), label) == (index, labels[index])
                    assert float(value) == pytest.approx(logits[row, index], abs=1e-5)

    @pytest.mark.parametrize("sent", [None, "gzip", "deflate"])
    @pytest.mark.parametrize("back", [None, "gzip", "deflate"])
    def test_compressed(self, client, own, sent: str | None, back: str | None) -> None:
        for binary in (True, False):
            result = client.infer(
                "folded",
                text(TEXTS, binary=binary),
                outputs=[InferRequestedOutput("logits", binary_data=binary)],
                request_compression_algorithm=sent,
                response_compression_algorithm=back,
            )
            same(result, own("folded", TEXTS))

    def test_a_compressed_answer_is_one(self, served) -> None:
        """The client would take an answer that is not, too."""
        body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": TEXTS[:1]}]}
        for encoding, start in (("gzip", b"\x1f\x8b"), ("deflate", b"\x78")):
            headers = {"Accept-Encoding": encoding}
            _, answer, told = served.ask("/v2/models/folded/infer", body, headers=headers)
            assert told["content-encoding"] == encoding and answer.startswith(start)

    def test_strength(self, client, own) -> None:
        def logits(**parameters: Any) -> Array:
            return client.infer("pack", text(TEXTS), parameters=parameters).as_numpy("logits")

        assert np.allclose(logits(adapter="vefa", strength=1.0), own("pack", TEXTS, "vefa"), rtol=0, atol=1e-5)
        assert np.array_equal(logits(adapter="vefa", strength=1), logits(adapter="vefa"))
        half = logits(adapter="vefa", strength=0.5)
        assert all(np.abs(half - logits(adapter="vefa", strength=s)).max() > 1e-3 for s in (0.0, 1.0))
        for wrong in (1.5, -1, "much", True):
            refused(lambda wrong=wrong: logits(adapter="vefa", strength=wrong), "400", "'strength'")

    def test_a_version_and_what_a_stateless_model_needs_not(self, client, own) -> None:
        result = client.infer(
            "folded", text(TEXTS), model_version="1", sequence_id=5, sequence_start=True, priority=1, timeout=30_000_000
        )
        same(result, own("folded", TEXTS))
        refused(lambda: client.infer("folded", text(TEXTS), model_version="3"), "404", "version 1 only")

    def test_no_time_is_too_little(self, client) -> None:
        refused(lambda: client.infer("folded", text(TEXTS), timeout=1), "503", "deadline")

    def test_several_at_once(self, client, own) -> None:
        asked = [(adapter, TEXTS[: 1 + n % 3]) for n in range(8) for adapter in ADAPTERS]
        waiting = [
            client.async_infer("pack", text(texts), parameters={"adapter": adapter}, request_id=str(number))
            for number, (adapter, texts) in enumerate(asked)
        ]
        for number, ((adapter, texts), each) in enumerate(zip(asked, waiting, strict=True)):
            result = each.get_result(timeout=30)
            assert result.get_response()["id"] == str(number)
            same(result, own("pack", texts, adapter))
        refused(lambda: client.async_infer("nothing", text(TEXTS)).get_result(timeout=30), "404", "no model 'nothing'")

    def test_a_body_made_and_read_by_hand(self, client, served, own) -> None:
        body, length = client.generate_request_body(text(TEXTS), request_id="by hand", parameters={"adapter": "lorfa"})
        headers = {"Inference-Header-Content-Length": str(length)}
        status, answer, told = served.ask("/v2/models/pack/infer", body, headers=headers)
        assert status == 200 and told["content-type"] == "application/octet-stream"
        length = int(told["inference-header-content-length"])
        result = client.parse_response_body(answer, header_length=length)
        assert result.get_response()["id"] == "by hand"
        same(result, own("pack", TEXTS, "lorfa"))

    def test_what_is_wrong_is_said(self, client, tokens) -> None:
        def ask(model: str = "pack", inputs: Any = None, outputs: Any = None, **parameters: Any) -> None:
            client.infer(model, inputs or text(TEXTS), outputs=outputs, parameters=parameters)

        def wrong(name: str, array: Array, datatype: str) -> list[InferInput]:
            given = InferInput(name, list(array.shape), datatype)
            given.set_data_from_numpy(array)
            return [given, *(each for each in tensors(tokens) if each.name() != name)]

        refused(lambda: ask("pakc", adapter="vefa"), "404", "no model 'pakc'", "pack")
        refused(lambda: ask(adapter="vefo"), "404", "no adapter 'vefo'", "vefa")
        refused(lambda: ask(), "400", "several adapters", "vefa", "lorfa")
        refused(lambda: ask("folded", adapter="vefa"), "400", "is one adapter")
        refused(lambda: ask(adapter=7), "400", "'adapter'")
        refused(lambda: ask(outputs=[InferRequestedOutput("logit")], adapter="vefa"), "400", "'logit'", "logits, label")
        ids = tokens["input_ids"]
        refused(
            lambda: ask(inputs=wrong("input_ids", ids.astype(np.int32), "INT32"), adapter="vefa"),
            "400",
            "'input_ids' is INT32; send INT64",
        )
        refused(lambda: ask(inputs=wrong("input_ids", ids[:1], "INT64"), adapter="vefa"), "400", "make them the same")
        refused(lambda: ask(inputs=wrong("words", ids, "INT64"), adapter="vefa"), "400", "'words' is no input")
        refused(lambda: ask(inputs=tensors(tokens)[:1], adapter="vefa"), "400", "is missing")
        outputs = [InferRequestedOutput("score", class_count=2)]
        refused(lambda: ask(outputs=outputs, adapter="vefa"), "400", "'score' has no classes")


class TestStatistics:
    def test_every_answer_is_counted_once(self, client) -> None:
        before = counts(client, "baked")
        for texts in (TEXTS, TEXTS[:1]):
            client.infer("baked", text(texts), parameters={"adapter": "vefa"})
        refused(lambda: client.infer("baked", text(TEXTS), parameters={"adapter": "nobody"}), "404")
        after = counts(client, "baked")
        more = {name: count - before.get(name, 0) for name, count in after.items() if name != "last_inference"}
        requests = ("success", "queue", "compute_input", "compute_infer", "compute_output")
        assert more == dict.fromkeys(requests, 2) | {
            "fail": 1,
            "cache_hit": 0,
            "cache_miss": 0,
            "inference_count": len(TEXTS) + 1,
            "execution_count": 2,
            f"batches of {len(TEXTS)}": 1,
            "batches of 1": 1,
        }
        assert after["last_inference"] > before["last_inference"]

    def test_requests_of_one_batch_are_counted_each(self, client) -> None:
        before = counts(client, "baked")
        many = [client.async_infer("baked", text(TEXTS), parameters={"adapter": ADAPTERS[n % 3]}) for n in range(24)]
        for each in many:
            each.get_result(timeout=30)
        after = counts(client, "baked")
        for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
            assert after[name] - before[name] == len(many), name
        assert after["inference_count"] - before["inference_count"] == len(many) * len(TEXTS)
        batches = {name: count for name, count in after.items() if name.startswith("batches of")}
        assert sum(batches.values()) == after["execution_count"]
        rows = sum(int(name.split()[-1]) * count for name, count in batches.items())
        assert rows == after["inference_count"]

    def test_of_all_models(self, client) -> None:
        told = client.get_inference_statistics()["model_stats"]
        assert sorted(each["name"] for each in told) == ["baked", "folded", "pack", "slots"]
        assert client.get_inference_statistics("pack", "1")["model_stats"][0]["name"] == "pack"


def test_the_asynchronous_client(served, admin, own) -> None:
    async def ask() -> None:
        async with triton_aio.InferenceServerClient(served.url.removeprefix("http://")) as client:
            assert await client.is_server_live() and await client.is_server_ready()
            assert await client.is_model_ready("pack", "1")
            assert (await client.get_server_metadata())["name"] == "deployfa"
            assert (await client.get_model_metadata("pack"))["name"] == "pack"
            assert (await client.get_model_config("pack"))["name"] == "pack"
            assert len(await client.get_model_repository_index()) == 4
            await client.unload_model("folded", headers=admin)
            assert not await client.is_model_ready("folded")
            await client.load_model("folded", headers=admin)
            assert (await client.get_inference_statistics("folded"))["model_stats"][0]["inference_count"] == 0
            assert (await client.get_trace_settings())["trace_level"] == ["OFF"]
            await client.update_trace_settings(settings={"trace_level": ["OFF"]}, headers=admin)
            settings = await client.get_log_settings()
            assert await client.update_log_settings({"log_info": True}, headers=admin) == settings
            assert await client.get_system_shared_memory_status() == await client.get_cuda_shared_memory_status() == []
            await client.unregister_system_shared_memory()
            await client.unregister_cuda_shared_memory()
            for register in (
                client.register_system_shared_memory("mine", "/mine", 64),
                client.register_cuda_shared_memory("mine", b"handle", 0, 64),
            ):
                with pytest.raises(InferenceServerException, match="takes no shared memory"):
                    await register
            asked = [(adapter, texts) for adapter in ADAPTERS for texts in (TEXTS, TEXTS[:1])]
            answers = await asyncio.gather(
                *(
                    client.infer(
                        "pack",
                        text(texts),
                        parameters={"adapter": adapter},
                        request_id=adapter,
                        request_compression_algorithm="gzip",
                        response_compression_algorithm="deflate",
                    )
                    for adapter, texts in asked
                )
            )
            for (adapter, texts), answer in zip(asked, answers, strict=True):
                assert answer.get_response()["id"] == adapter
                same(answer, own("pack", texts, adapter))
            with pytest.raises(InferenceServerException, match="no adapter 'nobody'") as caught:
                await client.infer("pack", text(TEXTS), parameters={"adapter": "nobody"})
            assert caught.value.status() == "404"

    asyncio.run(ask())


def test_every_call_of_the_client_is_made_here() -> None:
    """A client that learns another call fails here, not at a user's."""
    source = Path(__file__).read_text(encoding="utf-8")
    calls = [name for name, _ in inspect.getmembers(triton.InferenceServerClient, callable) if name[0] != "_"]
    assert len(calls) > 25
    assert [name for name in calls if f"client.{name}" not in source and name != "close"] == []
