"""Real models, quantised by ONNX Runtime's own tools, and a second opinion on what their layers compute.

``Layer`` reads one quantised layer from the graph, by the names that the quantiser gave, with none of the code under
test; it dequantises with its own arithmetic and computes ``W T(x)`` in numpy.
"""

from __future__ import annotations

import functools
import logging
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from filelock import FileLock

from deployfa.adapter import Adapter
from deployfa.edits import Edit, LowRank
from deployfa.graph.evaluate import _in_memory, evaluate
from deployfa.graph.locate import locate_sites

TEXTS = ("a joy to watch", "a very long and rather boring film that never starts")
CALIBRATION = (*TEXTS, "not my taste", "the actors are good, the plot is not", "I laughed, I cried, I slept")
#: 1.5 blocks of GPT-2's 48 features, 12 and 48 of MiniLM's 384 and 1536
BLOCK = 32


def _minilm_sites():
    found = {}
    for at in range(6):
        layer = f"bert.encoder.layer.{at}"
        found |= {f"{layer}.attention.self.{name}": (384, 384) for name in ("query", "key", "value")}
        found[f"{layer}.attention.output.dense"] = (384, 384)
        found[f"{layer}.intermediate.dense"] = (384, 1536)
        found[f"{layer}.output.dense"] = (1536, 384)
    return found


def _gpt2_sites():
    sizes = {"attn.c_attn": (48, 144), "attn.c_proj": (48, 48), "mlp.c_fc": (48, 192), "mlp.c_proj": (192, 48)}
    return {f"transformer.h.{at}.{name}": size for at in range(2) for name, size in sizes.items()}


@dataclass(frozen=True, eq=False)
class Source:
    """A floating-point base graph, what to feed it, its sites (k, d), and which of them read one tensor."""

    path: Path
    feeds: dict
    calibration: list
    sites: dict
    shared: tuple = ()

    @functools.cached_property
    def truth(self):
        """What the graph answers before it is quantised."""
        return self.answer(ir.load(self.path))

    @functools.cached_property
    def noise(self):
        """What float32 does to the graph, relative: every operation rounds."""
        return error(self.answer(ir.load(self.path), "float32"), self.truth)

    def answer(self, model, dtype="float64"):
        return evaluate(model, [self.feeds], dtype=dtype)[0]["logits"]

    def adapter(self, *kinds):
        """``vefa``, ``shared`` (one edit for sites that read one tensor), ``lorfa``, ``lora``, or ``vefa``/``shared``
        with ``+delta``; of several, each layer of the model takes the next.  Perturbed, none is near the identity."""
        rng = np.random.default_rng(0)
        by_input, edits = {}, {}
        for site, (k, d) in self.sites.items():
            kind = kinds[int(re.search(r"\.(\d+)\.", site)[1]) % len(kinds)]
            reads = next((stem for stem in self.shared if site.startswith(stem)), site)
            edit = self._edit(rng, kind, k, d)
            if kind.startswith("shared"):
                edit = by_input.setdefault(reads, edit)
            edits[site] = edit
        return Adapter("vefa" if "vefa" in kinds[0] or "shared" in kinds[0] else kinds[0], edits)

    @staticmethod
    def _edit(rng, kind, k, d):
        def draw(*shape, by=1.0):
            return (by * rng.standard_normal(shape)).astype(np.float32)

        if kind in {"lorfa", "lora"}:
            low = LowRank(draw(3, k, by=k**-0.5), draw(k if kind == "lorfa" else d, 3, by=0.2), 1.5)
            return Edit(input_low_rank=low) if kind == "lorfa" else Edit(output_low_rank=low)
        return Edit(lam=draw(k, by=0.2), delta=draw(k, by=0.1) if kind.endswith("+delta") else None)


@pytest.fixture(scope="session")
def minilm(trained, minilm_dir):
    """The project's own export of the real MiniLM."""
    from deployfa.base_graphs import base_graph
    from deployfa.preprocess import TextPreprocessor

    base = base_graph(Adapter.load(trained["vefa"]), model=minilm_dir)
    text = TextPreprocessor(base.folder, max_length=128)
    shared = tuple(f"bert.encoder.layer.{at}.attention.self" for at in range(6))
    calibration = [text.encode([each]) for each in CALIBRATION]
    return Source(base.folder / "model.onnx", text.encode(TEXTS), calibration, _minilm_sites(), shared)


@pytest.fixture(scope="session")
def gpt2(shared):
    """A small GPT-2 with random weights, large enough that its layers do something."""
    folder, rows = shared / "gpt2", shared / "gpt2.npz"
    with FileLock(folder.with_suffix(".lock")):
        if not rows.is_file():
            feeds = _export_gpt2(folder)
            np.savez(rows, **feeds)
    feeds = dict(np.load(rows))
    return Source(folder / "model.onnx", feeds, [feeds], _gpt2_sites())


def _export_gpt2(folder):
    import torch
    import transformers as tf

    from deployfa.graph.storage import save_graph
    from deployfa.training.base import Base
    from deployfa.training.base_graph import export_base_graph, probe

    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "num_labels": 3, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = tf.GPT2Config(**sizes, **tokens, initializer_range=0.2)
    net = tf.GPT2ForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                # norms at 1 and 0 and biases at 0 hide a fold that forgets them
                parameter.add_(0.3 * torch.randn_like(parameter))
    base = Base(net, "gpt2", "text-classification", ())
    feeds, _, _ = probe(base)
    folder.mkdir(exist_ok=True)
    save_graph(export_base_graph(base), folder)
    return feeds


@pytest.fixture(scope="session")
def cnn(tmp_path_factory):
    """Two convolutions, the second depthwise, and a dense layer; random, with biases."""
    rng = np.random.default_rng(3)
    shapes = {"first": (8, 3, 3, 3), "depthwise": (8, 1, 3, 3), "head": (4, 8)}
    stored = {}
    for name, shape in shapes.items():
        stored[f"{name}.weight"] = (rng.standard_normal(shape) * np.prod(shape[1:]) ** -0.5).astype(np.float32)
        stored[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(np.float32)
    make, tensor = onnx.helper, onnx.numpy_helper.from_array
    padded = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    nodes = [
        make.make_node("Conv", ["image", "first.weight", "first.bias"], ["c1"], name="n1", **padded),
        make.make_node("Conv", ["c1", "depthwise.weight", "depthwise.bias"], ["c2"], name="n2", group=8, **padded),
        make.make_node("Relu", ["c2"], ["r2"], name="n3"),
        make.make_node("GlobalAveragePool", ["r2"], ["p"], name="n4"),
        make.make_node("Flatten", ["p"], ["f"], name="n5"),
        make.make_node("Gemm", ["f", "head.weight", "head.bias"], ["logits"], name="n6", transB=1),
    ]
    values = [
        make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("image", [3, 6, 6]), ("logits", [4]))
    ]
    graph = make.make_graph(
        nodes, "cnn", values[:1], values[1:], [tensor(array, name) for name, array in stored.items()]
    )
    path = tmp_path_factory.mktemp("cnn") / "model.onnx"
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10), path)
    rows = [{"image": rng.standard_normal((2, 3, 6, 6)).astype(np.float32)} for _ in range(4)]
    return Source(path, rows[0], rows, {"first": (3, 8), "depthwise": (8, 8), "head": (8, 4)})


@pytest.fixture(scope="session")
def sources(request):
    """Name → ``Source``, made when first asked for."""
    return request.getfixturevalue


@pytest.fixture(scope="session")
def quantised(sources):
    """``quantised(model, kind)`` → ``Quantised``, its sites located; the last ones are kept."""

    @functools.lru_cache(maxsize=2)
    def make(model, kind):
        source = sources(model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "quantised.onnx"
            _quantise(source, kind, path)
            graph = ir.from_proto(onnx.load(path))
        located, _ = locate_sites(graph, source.sites)
        answer = source.answer(located)
        # a quantiser that left the graph as it was would make every test here an easy one
        assert error(answer, source.truth) > 1e-3
        return Quantised(located, _in_memory(located.clone(), widen=True), answer)

    return make


@dataclass(frozen=True, eq=False)
class Quantised:
    """A quantised graph, the same with float64 for float32 (scales included), and what it answers."""

    model: ir.Model
    wide: ir.Model
    answer: np.ndarray


def _quantise(source, kind, path):
    from onnxruntime import quantization as q
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    class Rows(q.CalibrationDataReader):
        def __init__(self):
            self.rows = iter(source.calibration)

        def get_next(self):
            return next(self.rows, None)

    # as a proto: of a path the quantiser makes files beside it
    floats = onnx.load(source.path)
    logging.disable(logging.WARNING)
    try:
        if kind.startswith("int4"):
            model = ONNXModel(floats)
            model.replace_gemm_with_matmul()  # what onnxruntime's int4 quantiser has no kernel for
            model.topological_sort()
            form = q.QuantFormat.QDQ if "qdq" in kind else q.QuantFormat.QOperator
            quantiser = MatMulNBitsQuantizer(
                model.model, block_size=BLOCK, is_symmetric=not kind.endswith("asymmetric"), quant_format=form
            )
            quantiser.process()
            quantiser.model.save_model_to_file(str(path))
            return
        weights = {"per_channel": kind.endswith("channel"), "weight_type": q.QuantType.QInt8}
        if kind.startswith("dynamic"):
            q.quantize_dynamic(floats, str(path), **weights)
            return
        # products of two computed values stay in floats: onnxruntime 1.32 writes an invalid QOperator graph of them
        stored = {tensor.name for tensor in floats.graph.initializer}
        computed = [n.name for n in floats.graph.node if n.op_type == "MatMul" and n.input[1] not in stored]
        form = q.QuantFormat.QDQ if kind.startswith("qdq") else q.QuantFormat.QOperator
        q.quantize_static(
            floats,
            str(path),
            Rows(),
            quant_format=form,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            nodes_to_exclude=computed,
            **weights,
        )
    finally:
        logging.disable(logging.NOTSET)


@dataclass(frozen=True, eq=False)
class Layer:
    """One quantised layer, read by the names and the operators' definitions alone.

    ``x``: name of the value that T changes.  ``w``: (d, k) in float64.  ``reads``: (node name, index) of something that
    reads the layer's product, whatever the product is called after a rewrite.
    """

    op: str
    x: str
    w: np.ndarray
    reads: tuple
    activation: tuple | None = None
    bias: np.ndarray | None = None
    answer: tuple | None = None

    @classmethod
    def read(cls, graph, site):
        """The layer whose integers are called after ``site``."""
        stored = [value for name, value in graph.initializers.items() if name.startswith(f"{site}.weight")]
        (integers,) = (v for v in stored if not v.dtype.is_floating_point() and "zero_point" not in v.name)
        ((node, _),) = integers.uses()
        q = integers.const_value.numpy()
        if node.op_type == "DequantizeLinear":
            return cls._of_qdq(graph, node, q)
        if node.op_type == "MatMulInteger":
            return cls._of_dynamic(node, q)
        if node.op_type == "MatMulNBits":
            return cls._of_blocks(node, q)
        return cls._of_integers(node, q)

    @classmethod
    def _of_qdq(cls, graph, node, q):
        s, z = _array(node.inputs[1]), _array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(())
        axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
        if block:
            rows = np.arange(q.shape[axis]) // block
            s, z = (each.take(rows, axis=axis) if each.ndim else each for each in (s, z))
        elif s.ndim and s.size > 1:
            shape = [1] * q.ndim
            shape[axis] = -1
            s, z = s.reshape(shape), z.reshape(shape)
        w = s * (q.astype(np.float64) - z)
        (use,) = node.outputs[0].uses()
        layer = use.node
        assert use.idx == 1 and layer.op_type in {"MatMul", "Gemm"}
        bias = None
        if layer.op_type == "Gemm" and len(layer.inputs) > 2:
            # int32, in units of x's scale times W's
            source = layer.inputs[2].producer()
            bias = _array(source.inputs[0]) * _array(source.inputs[1])
        transposed = layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0)
        return cls(layer.op_type, layer.inputs[0].name, w if transposed else w.T, _reader(layer.outputs[0]), bias=bias)

    @classmethod
    def _of_dynamic(cls, node, q):
        """MatMulInteger → Cast → Mul by (scale of x · scale of W)."""
        quantizer = node.inputs[0].producer()
        cast = next(iter(node.outputs[0].uses())).node
        product = next(iter(cast.outputs[0].uses())).node
        scales = next(value for value in product.inputs if value is not cast.outputs[0]).producer()
        s = next(_array(value) for value in scales.inputs if value.is_initializer())
        w = (q.astype(np.float64) - _array(node.inputs[3])) * s
        return cls("MatMulInteger", quantizer.inputs[0].name, w.T, _reader(product.outputs[0]))

    @classmethod
    def _of_blocks(cls, node, q):
        """uint8 (d, blocks, block/2): the low half of a byte comes first; zero points packed the same way, else 8."""
        k, d, block = (node.attributes[name].as_int() for name in ("K", "N", "block_size"))
        numbers = np.empty((d, q.shape[1], block))
        numbers[..., 0::2], numbers[..., 1::2] = q & 15, q >> 4
        zero = np.full((d, q.shape[1]), 8.0)
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            packed = node.inputs[3].const_value.numpy().reshape(d, -1)
            both = np.empty((d, 2 * packed.shape[1]))
            both[:, 0::2], both[:, 1::2] = packed & 15, packed >> 4
            zero = both[:, : q.shape[1]]
        w = (numbers - zero[..., None]) * _array(node.inputs[2]).reshape(d, -1, 1)
        return cls("MatMulNBits", node.inputs[0].name, w.reshape(d, -1)[:, :k], _reader(node.outputs[0]))

    @classmethod
    def _of_integers(cls, node, q):
        x_scale, x_zero, _, s, z = (_array(value) for value in node.inputs[1:6])
        w = q.astype(np.float64)
        gemm = node.op_type == "QGemm"
        transposed = gemm and node.attributes.get_int("transB", 0)
        out = 0 if transposed else 1
        shape = [1] * w.ndim
        shape[out] = -1
        w = (w - z.reshape(shape)) * s.reshape(shape)
        y_scale, y_zero = node.inputs[7:9] if gemm else node.inputs[6:8]
        stored = node.inputs[6] if gemm else None
        bias = None if stored is None else _array(stored) * x_scale * s.reshape(-1)
        return cls(
            node.op_type,
            node.inputs[0].name,
            w if out == 0 else w.T,
            _reader(node.outputs[0]),
            activation=(x_scale, x_zero),
            bias=bias,
            answer=(_array(y_scale), _array(y_zero), y_zero.const_value.numpy().dtype),
        )

    def __call__(self, x, edit, *, absolute=False):
        """``W T(x)``, and what LoRA adds, of x as the graph has it; integers if the layer answers integers.

        With every number made positive, the size of what is added up.
        """
        f = np.abs if absolute else np.asarray
        if self.activation is not None:
            scale, zero = self.activation
            x = (x.astype(np.float64) - zero) * scale
        changed = self._transformed(x, edit, f)
        if self.op == "MatMulInteger" and not absolute:
            changed = self._through_uint8(changed)
        y = changed @ f(self.w).T
        if edit.output_low_rank is not None:
            low = edit.output_low_rank
            y = y + low.s * (f(x) @ f(low.a).T.astype(np.float64)) @ f(low.b).T
        if self.bias is not None:
            y = y + f(self.bias)
        if self.answer is not None and not absolute:
            scale, zero, dtype = self.answer
            y = np.clip(np.rint(y / scale) + zero, np.iinfo(dtype).min, np.iinfo(dtype).max)
        return y

    def doubt(self, x, edit, *, nearness):
        """By how much the answer may differ where numbers of T(x) lie within ``nearness`` of the half of a step."""
        changed = self._transformed(x, edit, np.asarray)
        scale = (max(changed.max(), 0) - min(changed.min(), 0)) / 255
        near = np.abs(np.abs(changed / scale) % 1 - 0.5) < nearness
        return near.astype(np.float64) * scale @ np.abs(self.w).T

    @staticmethod
    def _transformed(x, edit, f):
        x = f(x.astype(np.float64))
        changed = x if edit.lam is None else x * f(1 + edit.lam.astype(np.float64))
        if edit.input_low_rank is not None:
            low = edit.input_low_rank
            changed = changed + low.s * (x @ f(low.a).T.astype(np.float64)) @ f(low.b).T
        return changed if edit.delta is None else changed + f(edit.delta)

    @staticmethod
    def _through_uint8(x):
        """DynamicQuantizeLinear and back."""
        low, high = min(x.min(), 0), max(x.max(), 0)
        scale = (high - low) / 255
        zero = np.rint(np.clip(-low / scale, 0, 255))
        return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def error(found, truth):
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def _array(value):
    return value.const_value.numpy().astype(np.float64)


def _reader(value):
    use = next(iter(value.uses()))
    return use.node.name, use.idx


@pytest.fixture(scope="session")
def layer_of():
    return Layer.read


def integers_of(model):
    """Name → bytes of every stored integer tensor, four-bit ones too."""
    return {
        name: (value.dtype, tuple(value.const_value.shape), value.const_value.tobytes())
        for name, value in model.graph.initializers.items()
        if not value.dtype.is_floating_point()
    }


@pytest.fixture(scope="session")
def integers():
    return integers_of
