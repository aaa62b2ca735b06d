"""Small graphs with the module paths that the exporter leaves, built by hand; and one that PyTorch's exporter made."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings

import numpy as np
import onnx
import onnx.shape_inference
import onnx_ir as ir
import pytest

SCOPES = "pkg.torch.onnx.name_scopes"


class GraphBuilder:
    """Nodes in the order they are asked for; ``site`` is the module path that a node gets."""

    def __init__(self, dtype=np.float32):
        self.dtype = np.dtype(dtype)
        self.onnx = ir.tensor(np.zeros(1, dtype)).dtype
        self.inputs, self.initializers, self.nodes = [], [], []
        self.opsets = {"": 20}

    def input(self, name, *shape, dtype=None, default=None):
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype or self.onnx))
        if default is not None:
            value.const_value = ir.tensor(default.astype(self.dtype), name=name)
            self.initializers.append(value)
        self.inputs.append(value)
        return value

    def const(self, name, array):
        array = array if array.dtype.kind == "i" else array.astype(self.dtype)
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.initializers.append(value)
        return value

    def op(self, op_type, *inputs, site=None, out=None, **attributes):
        node = ir.node(op_type, list(inputs), attributes=attributes, name=f"node_{len(self.nodes)}")
        if site is not None:
            node.metadata_props[SCOPES] = repr(["", site, op_type.lower()])
        node.outputs[0].name = out or f"v{len(self.nodes)}"
        node.outputs[0].type = ir.TensorType(self.onnx)
        self.nodes.append(node)
        return node.outputs[0]

    def model(self, *outputs):
        graph = ir.Graph(
            self.inputs,
            list(outputs),
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports=self.opsets,
            name="made",
        )
        # through the wire format and with shapes: a graph as the exporter's file has it
        return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(ir.Model(graph, ir_version=10))))


@pytest.fixture
def builder():
    return GraphBuilder


@pytest.fixture(scope="session")
def exported():
    """``(torch module in float64, onnx_ir model, feeds)``: every way in which the exporter writes a site.

    A weight tied to the embedding, a module that is called twice, zero biases that become one tensor, norms at their
    start values that become one tensor, convolutions that pad with zeros or around, dense layers on two and on three
    axes, and a module whose input is a graph input.
    """
    import torch
    from torch import nn

    torch.set_num_threads(1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(7, 6)
            self.fc = nn.Linear(6, 6)
            self.free = nn.Linear(6, 6, bias=False)
            self.twice = nn.Linear(6, 6)
            self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
            self.conv = nn.Conv1d(6, 8, 3, padding=1)
            self.around = nn.Conv1d(6, 6, 3, padding=1, padding_mode="circular")
            self.depthwise = nn.Conv1d(8, 8, 3, groups=8, bias=False)
            self.strided = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
            self.zero1, self.zero2 = nn.Linear(6, 5), nn.Linear(6, 5)
            self.flat = nn.Linear(6, 6)
            self.tied = nn.Linear(6, 7, bias=False)
            self.tied.weight = self.emb.weight
            nn.init.zeros_(self.zero1.bias)
            nn.init.zeros_(self.zero2.bias)

        def forward(self, ids, x, image):
            h = self.fc(x) + self.emb(ids)
            h = self.norm1(torch.relu(self.free(h)))
            h = self.norm2(self.twice(torch.tanh(self.twice(h))))
            channels = h.transpose(1, 2)
            c = self.depthwise(torch.relu(self.conv(channels))), self.around(channels)
            return self.tied(h), *c, self.strided(image), self.zero1(h) * self.zero2(h), self.flat(h[:, 0])

    torch.manual_seed(0)
    net = Net().eval()
    ids, x, image = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.randn(2, 3, 6), torch.randn(2, 2, 5, 5)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(net, (ids, x, image), dynamo=True, verbose=False)
    feeds = {"ids": ids.numpy(), "x": x.numpy(), "image": image.numpy()}
    # a copy: the graph's weights are the module's own parameters
    return copy.deepcopy(net).double(), program.model, feeds


class Truth:
    """What a site with an edit computes, in float64 and step by step, and how far a rewritten graph may be from it."""

    PARTS = ("lam", "delta", "lorfa", "lora")
    #: IA3's scale of the output beside them; PyTorch's own modules have no name for all five
    ALL = (*PARTS, "outlam")

    @staticmethod
    def edit(parts, k, d, kernel=(), seed=0, dtype=np.float32):
        """Perturbed in every part: none is near the identity."""
        from deployfa.edits import Edit, LowRank

        rng = np.random.default_rng(seed)

        def draw(*shape):
            return (rng.standard_normal(shape) + 0.3 * np.sign(rng.standard_normal(shape))).astype(dtype)

        return Edit(
            lam=draw(k) if "lam" in parts else None,
            delta=draw(k) if "delta" in parts else None,
            input_low_rank=LowRank(draw(2, k), draw(k, 2), 0.75) if "lorfa" in parts else None,
            output_low_rank=LowRank(draw(2, k, *kernel), draw(d, 2), 1.5) if "lora" in parts else None,
            output_scale=draw(d) if "outlam" in parts else None,
        )

    @staticmethod
    def transformed(edit, x, axis, *, absolute=False):
        f = np.abs if absolute else np.asarray
        x = np.moveaxis(f(x.astype(np.float64)), axis, -1)
        y = x * f(1 + edit.lam.astype(np.float64)) if edit.lam is not None else x
        if edit.input_low_rank is not None:
            low = edit.input_low_rank
            y = y + low.s * ((x @ f(low.a).T.astype(np.float64)) @ f(low.b).T)
        if edit.delta is not None:
            y = y + f(edit.delta)
        return np.moveaxis(y, -1, axis)

    @classmethod
    def dense(cls, edit, w, c, x, alpha=1.0, beta=1.0, *, absolute=False):
        """``α W T(x) + β c + s' B' (A' x)``; with every number made positive, the size of what is added up."""
        f = np.abs if absolute else np.asarray
        y = f(alpha) * (cls.transformed(edit, x, -1, absolute=absolute) @ f(w).T.astype(np.float64))
        if edit.output_low_rank is not None:
            low = edit.output_low_rank
            y = y + low.s * ((f(x).astype(np.float64) @ f(low.a).T) @ f(low.b).T)
        y = y if c is None else y + f(beta * c.astype(np.float64))
        return y if edit.output_scale is None else y * f(1 + edit.output_scale.astype(np.float64))

    @classmethod
    def conv(cls, edit, w, c, x, *, groups=1, pads=0, stride=1, absolute=False):
        f = np.abs if absolute else np.asarray
        y = cls._conv(cls.transformed(edit, x, 1, absolute=absolute), f(w), groups, pads, stride)
        if edit.output_low_rank is not None:
            low = edit.output_low_rank
            inner = cls._conv(f(x), f(low.a), 1, pads, stride)
            y = y + low.s * np.einsum("or,nr...->no...", f(low.b).astype(np.float64), inner)
        over_channels = (-1, *[1] * (w.ndim - 2))
        y = y if c is None else y + f(c).astype(np.float64).reshape(over_channels)
        return (
            y if edit.output_scale is None else y * f(1 + edit.output_scale.astype(np.float64)).reshape(over_channels)
        )

    @staticmethod
    def _conv(x, w, groups, pads, stride):
        rank, (d, per_group) = w.ndim - 2, w.shape[:2]
        x = np.pad(x.astype(np.float64), [(0, 0), (0, 0)] + [(pads, pads)] * rank)
        space = [(n - m) // stride + 1 for n, m in zip(x.shape[2:], w.shape[2:], strict=True)]
        y = np.zeros((x.shape[0], d, *space))
        for o in range(d):
            first = (o // (d // groups)) * per_group
            for at in np.ndindex(*space):
                window = tuple(slice(i * stride, i * stride + m) for i, m in zip(at, w.shape[2:], strict=True))
                patch = x[(slice(None), slice(first, first + per_group), *window)]
                y[(slice(None), o, *at)] = (patch * w[o].astype(np.float64)).reshape(len(x), -1).sum(axis=1)
        return y

    @staticmethod
    def tolerance(magnitude, dtype):
        """What the placements may lose: every stored number (W', c'; or 1+λ, A, s B, δ) is rounded once to the storage
        dtype, two of them multiply in a low-rank path, so at most 2u + u² of the sum of absolute values; then float64
        sums of fewer than 256 terms.  Halves below 2^-14 are rounded to a multiple of 2^-24 instead.
        """
        info = np.finfo(dtype)
        u = float(info.eps) / 2
        return (2 * u + u * u + 256 * 2.0**-53) * magnitude + float(info.smallest_subnormal) * (1 + magnitude)


@pytest.fixture(scope="session")
def truth():
    return Truth


@pytest.fixture(scope="session")
def as_bytes():
    """Model → its bytes as a file would have them."""
    return lambda model: ir.to_proto(model).SerializeToString(deterministic=True)
