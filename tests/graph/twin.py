"""One graph, built twice at once: as ONNX, and as the steps in numpy that say what it means.

Every method appends nodes to a graph and, beside it, a function of balls.  ``meaning(edits)`` runs these functions with
T before each layer that ``edits`` names: the side-op reference, which knows no placement and no ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from .ball import Ball, rounded, softmax, standardize, unit


@dataclass(frozen=True, eq=False)
class Operand:
    """Stored numbers as a layer reads them.  ``dtype``: the coarsest that they are rounded to on the way."""

    array: np.ndarray
    value: ir.Value
    dtype: np.dtype


class Twin:
    def __init__(self, builder, dtype=np.float32, *, dims=()):
        self.g, self.dtype = builder(dtype), np.dtype(dtype)
        self.dims = dims  # names for the leading axes of what is fed
        self.feeds, self.steps, self.sample = {}, [], {}
        self.counter = 0

    def name(self, stem):
        self.counter += 1
        return f"{stem}_{self.counter}"

    def means(self, value, function, *sources):
        """``value`` is ``function(edits, *balls of sources)``; found out at once for no edits, to know its shape."""
        self.steps.append((value, function, sources))
        self.sample[value] = function({}, *(self.sample[source] for source in sources))
        return value

    def shape(self, value):
        return self.sample[value].shape

    def meaning(self, edits):
        balls = {}
        for value, function, sources in self.steps:
            balls[value] = function(edits, *(balls[source] for source in sources))
        return balls

    def model(self, *outputs, opset=23):
        """With shapes, as an exporter's file has them; ``outputs`` get names y0, y1, …"""
        for number, value in enumerate(outputs):
            value.name = f"y{number}"
        g = self.g
        graph = ir.Graph(
            g.inputs,
            list(outputs),
            nodes=g.nodes,
            initializers=g.initializers,
            opset_imports={"": opset, "com.microsoft": 1},
            name="twin",
        )
        proto = ir.to_proto(ir.Model(graph, ir_version=10 if opset < 23 else 11))
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto))

    # what is fed and what is stored

    def feed(self, array):
        array = np.asarray(array).astype(self.dtype)
        name = self.name("x")
        dims = [*self.dims[: array.ndim], *array.shape[len(self.dims) :]]
        self.feeds[name] = array
        return self.means(self.g.input(name, *dims), lambda _: Ball.exact(array))

    def typed(self, op_type, *inputs, dtype=None, site=None, **attributes):
        """A node whose output has ``dtype``, the graph's own if none is given."""
        value = self.g.op(op_type, *inputs, site=site, **attributes)
        if dtype is not None:
            value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
        return value

    def store(self, array, dtype=None, *, node=False, fed=False):
        """An initializer, or a Constant node, or a graph input with a default, of ``array`` rounded to ``dtype``.

        What is fed to the input is not its default.
        """
        dtype = np.dtype(dtype or self.dtype)
        stored = np.ascontiguousarray(array).astype(dtype).reshape(np.shape(array))
        tensor = ir.tensor(stored, dtype=ir.DataType.from_numpy(dtype), name=self.name("w"))
        if node:
            value = self.typed("Constant", dtype=dtype, out=tensor.name, value=ir.AttrTensor("value", tensor))
        else:
            kind = ir.TensorType(tensor.dtype)
            value = ir.Value(name=tensor.name, shape=ir.Shape(stored.shape), type=kind, const_value=tensor)
            self.g.initializers.append(value)
            if fed:
                self.g.inputs.append(value)
                stored = (-stored).astype(dtype)
                self.feeds[value.name] = stored
        coarse = dtype if dtype.kind not in "iu" and unit(dtype) > unit(self.dtype) else self.dtype
        return Operand(stored.astype(np.float64), value, coarse)

    def integers(self, array):
        return self.g.const(self.name("shape"), np.asarray(array, dtype=np.int64))

    # what keeps features apart, and what does not

    def moved(self, op_type, value, move, *inputs, **attributes):
        made = self.typed(op_type, value, *inputs, **attributes)
        return self.means(made, lambda _, ball: ball.moved(move), value)

    def transpose(self, value, perm):
        return self.moved("Transpose", value, lambda a: a.transpose(perm), perm=list(perm))

    def reshape(self, value, target):
        """``target`` as the operator takes it, with 0 and -1."""
        dims = [self.shape(value)[at] if dim == 0 else dim for at, dim in enumerate(target)]
        return self.moved("Reshape", value, lambda a: a.reshape(dims), self.integers(target))

    def unsqueeze(self, value, axis):
        return self.moved("Unsqueeze", value, lambda a: np.expand_dims(a, axis), self.integers([axis]))

    def squeeze(self, value, axis):
        return self.moved("Squeeze", value, lambda a: np.squeeze(a, axis), self.integers([axis]))

    def expand(self, value, shape):
        return self.moved("Expand", value, lambda a: a * np.ones(shape), self.integers(shape))

    def cut(self, value, axis, start, end, step=1):
        at = (*[slice(None)] * axis, slice(start, end, step))
        return self.moved("Slice", value, lambda a: a[at], *(self.integers([n]) for n in (start, end, axis, step)))

    def gather(self, value, axis, index):
        """``index``: a number (the axis goes) or a list."""
        return self.moved("Gather", value, lambda a: np.take(a, index, axis=axis), self.integers(index), axis=axis)

    def split(self, value, axis, sizes):
        node = ir.node(
            "Split",
            [value, self.integers(sizes)],
            attributes={"axis": axis},
            num_outputs=len(sizes),
            name=self.name("s"),
        )
        self.g.nodes.append(node)
        ends = np.cumsum(sizes)
        for number, output in enumerate(node.outputs):
            output.name, output.type = self.name("part"), ir.TensorType(self.g.onnx)
            at = (*[slice(None)] * axis, slice(ends[number] - sizes[number], ends[number]))
            self.means(output, lambda _, ball, at=at: ball.moved(lambda a: a[at]), value)
        return list(node.outputs)

    def unary(self, op_type, value, **attributes):
        function, slope = {
            "Relu": (lambda x: np.maximum(x, 0), 1),
            "LeakyRelu": (lambda x: np.where(x > 0, x, 0.25 * x), 1),
            "Tanh": (np.tanh, 1),
            "Sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 0.25),
            "Neg": (np.negative, 1),
            "Identity": (lambda x: x, 1),
        }[op_type]
        if op_type == "LeakyRelu":
            attributes = {"alpha": 0.25}
        made = self.typed(op_type, value, **attributes)
        return self.means(made, lambda _, ball: ball.through(function, slope), value)

    def mean(self, value, axis, *, keepdims=True):
        made = self.typed("ReduceMean", value, self.integers([axis]), keepdims=int(keepdims))
        return self.means(
            made, lambda _, ball: Ball(*(a.mean(axis=axis, keepdims=keepdims) for a in _noisy(ball))), value
        )

    def add(self, one, other):
        return self.means(self.typed("Add", one, other), lambda _, a, b: a + b, one, other)

    def multiply(self, one, other):
        return self.means(self.typed("Mul", one, other), lambda _, a, b: a * b, one, other)

    def matmul(self, one, other):
        return self.means(self.typed("MatMul", one, other), lambda _, a, b: a @ b, one, other)

    def softmax(self, value):
        return self.means(self.typed("Softmax", value, axis=-1), lambda _, ball: softmax(ball), value)

    def masked(self, value, mask, *, zero_first):
        """``Where(mask, 0, v)``, or ``Where(mask, v, 0)``; mask: a stored array."""
        zero, flags = self.store(np.zeros(())).value, self.g.const(self.name("mask"), mask.astype(np.int64))
        flags = self.typed("Cast", flags, dtype=np.bool_, to=int(ir.DataType.BOOL))
        made = self.typed("Where", flags, *((zero, value) if zero_first else (value, zero)))
        keep = ~mask if zero_first else mask
        return self.means(made, lambda _, ball: ball.moved(lambda a: np.where(keep, a, 0.0)), value)

    def max_pool(self, value):
        made = self.typed("MaxPool", value, kernel_shape=[2, 2], strides=[1, 1])
        windows = lambda a: np.lib.stride_tricks.sliding_window_view(a, (2, 2), axis=(2, 3)).max(axis=(-2, -1))  # noqa: E731
        return self.means(made, lambda _, ball: ball.moved(windows), value)

    def average_pool(self, value):
        made = self.typed("GlobalAveragePool", value)
        return self.means(
            made, lambda _, ball: Ball(*(a.mean(axis=(2, 3), keepdims=True) for a in _noisy(ball))), value
        )

    def norm(self, value, kind, gamma, beta=None, *, epsilon=2.0**-10, least=1.0):
        """γ ⊙ z + β in one of the forms of ``NORMS``; γ, β: stored, (k,).

        ``least``: of |1+λ| over everything that may fold into a Gemma norm, whose stored number is ``(1+w)(1+λ) - 1``:
        its rounding counts as u (|1+w| + 1/|1+λ|) before T.
        """
        return NORMS[kind](self, value, gamma, beta, epsilon, least)


def _noisy(ball):
    return ball.center, ball.radius + np.abs(ball.center) * 2.0**-46


def _z(twin, x, axes, epsilon, *, center=True):
    """z as exporters decompose it."""
    op, number = twin.typed, lambda v: twin.store(np.array(v)).value
    over = twin.integers(list(axes))
    moved = op("Sub", x, op("ReduceMean", x, over)) if center else x
    square = op("Pow", moved, number(2.0))
    return op("Div", moved, op("Sqrt", op("Add", op("ReduceMean", square, over), number(epsilon))))


def _scaled(twin, made, x, gamma, beta, axes, epsilon, *, center=True, axis=-1, offset=0.0, extra=0.0):
    rank = len(twin.shape(x))
    shape = [1] * rank
    shape[axis] = -1
    g = gamma.array.reshape(shape) + offset
    b = 0.0 if beta is None else beta.array.reshape(shape)

    def function(_, ball):
        z = standardize(ball, axes, epsilon, center=center)
        size = np.abs(g) * z.largest + np.abs(b) + extra * z.largest
        return Ball(g * z.center + b, np.abs(g) * z.radius + rounded(size, gamma.dtype))

    return twin.means(made, function, x)


def _layer_norm(twin, x, gamma, beta, epsilon, least):
    shift = [] if beta is None else [beta.value]
    made = twin.typed("LayerNormalization", x, gamma.value, *shift, axis=-1, epsilon=epsilon)
    return _scaled(twin, made, x, gamma, beta, (-1,), epsilon)


def _decomposed(twin, x, gamma, beta, epsilon, least):
    made = twin.typed("Mul", _z(twin, x, (-1,), epsilon), gamma.value)
    made = made if beta is None else twin.typed("Add", beta.value, made)
    return _scaled(twin, made, x, gamma, beta, (-1,), epsilon)


def _rms(twin, x, gamma, beta, epsilon, least):
    made = twin.typed("Mul", gamma.value, _z(twin, x, (-1,), epsilon, center=False))
    return _scaled(twin, made, x, gamma, None, (-1,), epsilon, center=False)


def _rms_operator(twin, x, gamma, beta, epsilon, least):
    made = twin.typed("RMSNormalization", x, gamma.value, axis=-1, epsilon=epsilon)
    return _scaled(twin, made, x, gamma, None, (-1,), epsilon, center=False)


def _gemma(twin, x, gamma, beta, epsilon, least):
    offset = twin.typed("Add", gamma.value, twin.store(np.ones(())).value)
    made = twin.typed("Mul", _z(twin, x, (-1,), epsilon, center=False), offset)
    return _scaled(twin, made, x, gamma, None, (-1,), epsilon, center=False, offset=1.0, extra=1 / least)


def _instance_norm(twin, x, gamma, beta, epsilon, least):
    made = twin.typed("InstanceNormalization", x, gamma.value, beta.value, epsilon=epsilon)
    axes = tuple(range(2, len(twin.shape(x))))
    return _scaled(twin, made, x, gamma, beta, axes, epsilon, axis=1)


def _batch_norm(twin, x, gamma, beta, epsilon, least):
    """Fixed statistics: mean 1/4, variance 1 - ε, so that z is x - 1/4."""
    k, rank = len(gamma.array), len(twin.shape(x))
    mean, var = twin.store(np.full(k, 0.25), np.float32).value, twin.store(np.full(k, 1 - epsilon), np.float32).value
    made = twin.typed("BatchNormalization", x, gamma.value, beta.value, mean, var, epsilon=epsilon)
    shape = [1, -1] + [1] * (rank - 2)
    g, b = gamma.array.reshape(shape), beta.array.reshape(shape)

    def function(_, ball):
        center = g * (ball.center - 0.25) + b
        size = np.abs(g) * (ball.largest + 0.25) + np.abs(b)
        # 1 - ε and ε are whole multiples of 2^-24, but their sum has a root of float64's own precision
        return Ball(center, np.abs(g) * ball.radius + rounded(size, gamma.dtype))

    return twin.means(made, function, x)


#: The forms over the last axis, then those over channels.
NORMS = {
    "layer norm": _layer_norm,
    "decomposed": _decomposed,
    "rms": _rms,
    "rms operator": _rms_operator,
    "gemma": _gemma,
    "instance norm": _instance_norm,
    "batch norm": _batch_norm,
}
SHIFTLESS = {"rms", "rms operator", "gemma"}
OVER_CHANNELS = {"instance norm", "batch norm"}
