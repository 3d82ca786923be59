"""Tiny ONNX graphs with what a structured pruner must follow, each with seeded weights."""

from __future__ import annotations

import numpy as np
import onnx

from onnx_models import model_from_text


def _model(text: str, shapes: str, constants: str = "") -> onnx.ModelProto:
    """A graph, its weights as `name size size, ...`, and its whole numbers as `name value value, ...`."""
    random = np.random.default_rng(5)
    weights = {name: (random.normal(size=shape) * 0.3).astype(np.float32) for name, shape in _entries(shapes)}
    numbers = {name: np.array(values, dtype=np.int64) for name, values in _entries(constants)}
    return model_from_text(text, {**weights, **numbers})


def _entries(text: str) -> list[tuple[str, list[int]]]:
    found = [entry.split() for entry in text.split(",") if entry]
    return [(name, list(map(int, values))) for name, *values in found]


def chain() -> onnx.ModelProto:
    """Three dense layers, one of them a Gemm with its weights transposed."""
    return _model(
        "chain (float[batch, 6] x) => (float[batch, 3] y) {"
        " a = MatMul(x, w1)  b = Add(a, b1)  c = Relu(b)"
        " d = Gemm <transB: int = 1> (c, w2, b2)  e = Tanh(d)  y = MatMul(e, w3) }",
        "w1 6 16, b1 16, w2 24 16, b2 24, w3 24 3",
    )


def residual() -> onnx.ModelProto:
    """A stem and two blocks that add to it, the second through a projection, with BatchNormalization."""
    return _model(
        "residual (float[batch, 3, 8, 8] x) => (float[batch, 4] y) {"
        " s = Conv <pads = [1, 1, 1, 1]> (x, ws, bs)"
        " a1 = Conv <pads = [1, 1, 1, 1]> (s, w1)"
        " a2 = BatchNormalization (a1, scale, shift, mean, variance)  a3 = Relu(a2)"
        " a4 = Conv (a3, w2)  t = Add(s, a4)  u = Relu(t)"
        " p = Conv <strides = [2, 2]> (u, w3)"
        " c1 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (u, w4)"
        " v = Add(p, c1)  g = GlobalAveragePool(v)  f = Flatten(g)  y = Gemm(f, w5, b5) }",
        "ws 16 3 3 3, bs 16, w1 8 16 3 3, scale 8, shift 8, mean 8, w2 16 8 1 1, w3 24 16 1 1, "
        "w4 24 16 3 3, w5 24 4, b5 4",
    )


def with_variance(model: onnx.ModelProto) -> onnx.ModelProto:
    variance = np.linspace(0.5, 2, 8, dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(variance, "variance"))
    return model


def depthwise() -> onnx.ModelProto:
    """Expand, depthwise with two filters for each channel, squeeze and excite, project."""
    return _model(
        "depthwise (float[batch, 3, 8, 8] x) => (float[batch, 5] y) {"
        " e = Conv (x, w1, b1)  r = Clip(e, low, high)"
        " d = Conv <group: int = 16, pads = [1, 1, 1, 1]> (r, w2, b2)"
        " m = GlobalAveragePool(d)  s1 = Conv(m, ws1)  s2 = Relu(s1)  s3 = Conv(s2, ws2)  s4 = Sigmoid(s3)"
        " q = Mul(d, s4)  p = Conv(q, w3)  g = ReduceMean <keepdims: int = 0> (p, axes)  y = MatMul(g, w4) }",
        "w1 16 3 1 1, b1 16, w2 32 1 3 3, b2 32, ws1 8 32 1 1, ws2 32 8 1 1, w3 24 32 1 1, w4 24 5, "
        "low, high",
        "axes 2 3",
    )


def dense_blocks() -> onnx.ModelProto:
    """Every layer reads all before it, joined by Concat, with a vector over the joined channels."""
    return _model(
        "dense (float[batch, 3, 6, 6] x) => (float[batch, 2] y) {"
        " a = Conv <pads = [1, 1, 1, 1]> (x, w1)  b = Conv <pads = [1, 1, 1, 1]> (a, w2)"
        " ab = Concat <axis: int = 1> (a, b)  n = Mul(ab, scale)  r = Relu(n)"
        " c = Conv (r, w3)  abc = Concat <axis: int = 1> (ab, c)"
        " g = GlobalMaxPool(abc)  f = Reshape(g, flat)  y = MatMul(f, w4) }",
        "w1 8 3 3 3, w2 12 8 3 3, scale 20 1 1, w3 16 20 1 1, w4 36 2",
        "flat 0 36",
    )


def grouped() -> onnx.ModelProto:
    """Two grouped convolutions with a channel shuffle in between."""
    return _model(
        "grouped (float[batch, 8, 6, 6] x) => (float[batch, 3] y) {"
        " i = Conv (x, w0)  a = Conv <group: int = 4> (i, w1, b1)"
        " s1 = Reshape(a, split)  s2 = Transpose <perm = [0, 2, 1, 3, 4]> (s1)  s3 = Reshape(s2, merge)"
        " r = Relu(s3)  b = Conv <group: int = 4, pads = [1, 1, 1, 1]> (r, w2)"
        " g = GlobalAveragePool(b)  f = Flatten(g)  y = MatMul(f, w3) }",
        "w0 16 8 1 1, w1 32 4 1 1, b1 32, w2 16 8 3 3, w3 16 3",
        "split 0 4 8 6 6, merge 0 32 6 6",
    )


def halves() -> onnx.ModelProto:
    """ShuffleNet v2: one half goes on as it is, both are joined and shuffled."""
    return _model(
        "halves (float[batch, 3, 4, 4] x) => (float[batch, 3] y) {"
        " i = Conv (x, w0)  left, right = Split <axis: int = 1> (i, sizes)  c = Conv (right, w1)  d = Relu(c)"
        " j = Concat <axis: int = 1> (left, d)"
        " s1 = Reshape(j, split)  s2 = Transpose <perm = [0, 2, 1, 3, 4]> (s1)  s3 = Reshape(s2, merge)"
        " k = Conv (s3, w2)  part = Slice (k, starts, ends, axes)  rest = Gather <axis: int = 1> (k, picks)"
        " m = Add(part, rest)  f = Flatten(m)  y = MatMul(f, w3) }",
        "w0 16 3 1 1, w1 8 8 1 1, w2 12 16 1 1, w3 96 3",
        "sizes 8 8, split -1 2 8 4 4, merge -1 16 4 4, starts 0, ends 6, axes 1, picks 6 7 8 9 10 11",
    )


def flat_nchw() -> onnx.ModelProto:
    """Channels first, flattened to a dense layer."""
    return _model(
        "nchw (float[batch, 2, 6, 6] x) => (float[batch, 3] y) {"
        " a = Conv (x, w1, b1)  r = Relu(a)  p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)"
        " f = Flatten(p)  h = Gemm(f, w2, b2)  t = Relu(h)  y = MatMul(t, w3) }",
        "w1 8 2 3 3, b1 8, w2 32 16, b2 16, w3 16 3",
    )


def flat_nhwc() -> onnx.ModelProto:
    """The same as Keras flattens: channels last."""
    return _model(
        "nhwc (float[batch, 6, 6, 2] x) => (float[batch, 3] y) {"
        " i = Transpose <perm = [0, 3, 1, 2]> (x)  a = Conv (i, w1, b1)  r = Relu(a)"
        " p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)  o = Transpose <perm = [0, 2, 3, 1]> (p)"
        " f = Reshape(o, flat)  h = MatMul(f, w2)  t = Relu(h)  y = MatMul(t, w3) }",
        "w1 8 2 3 3, b1 8, w2 32 16, w3 16 3",
        "flat -1 32",
    )


def transformer() -> onnx.ModelProto:
    """Embeddings, four heads of eight, a feed-forward part; shapes are computed from the ids."""
    return _model(
        "encoder (int64[batch, length] ids, float[batch, length] mask) => (float[batch, length, 32] states) {"
        " x0 = Gather(table, ids)  x = LayerNormalization <axis: int = -1> (x0, g0, h0)"
        " size = Shape(ids)  four = Concat <axis: int = 0> (size, heads)"
        " three = Concat <axis: int = 0> (size, width)  q1 = MatMul(x, wq)  q2 = Add(q1, bq)"
        " q3 = Reshape(q2, four)  q = Transpose <perm = [0, 2, 1, 3]> (q3)"
        " k1 = MatMul(x, wk)  k3 = Reshape(k1, four)  k = Transpose <perm = [0, 2, 3, 1]> (k3)"
        " v1 = MatMul(x, wv)  v2 = Add(v1, bv)  v3 = Reshape(v2, four)"
        " v = Transpose <perm = [0, 2, 1, 3]> (v3)"
        " s = MatMul(q, k)  m = Unsqueeze(mask, places)  sm = Add(s, m)  a = Softmax <axis: int = -1> (sm)"
        " c1 = MatMul(a, v)  c2 = Transpose <perm = [0, 2, 1, 3]> (c1)  c3 = Reshape(c2, three)"
        " o1 = MatMul(c3, wo)  o2 = Add(o1, bo)  y0 = Add(o2, x)"
        " y = LayerNormalization <axis: int = -1> (y0, g1, h1)"
        " f1 = MatMul(y, wi)  f2 = Add(f1, bi)  e = Erf(f2)  f3 = Mul(f2, e)  f4 = MatMul(f3, wf)"
        " z = Add(f4, y)  states = LayerNormalization <axis: int = -1> (z, g2, h2) }",
        "table 20 32, g0 32, h0 32, g1 32, h1 32, g2 32, h2 32, wq 32 32, bq 32, wk 32 32, wv 32 32, "
        "bv 32, wo 32 32, bo 32, wi 32 64, bi 64, wf 64 32",
        "heads 4 8, width 32, places 1 2",
    )


def shared() -> onnx.ModelProto:
    """One matrix read by two nodes, and one bias by two layers."""
    return _model(
        "shared (float[batch, 6] x) => (float[batch, 3] y) {"
        " a = MatMul(x, w1)  b = Add(a, bias)  c = Relu(b)  d = MatMul(c, w2)  e = Tanh(d)  f = MatMul(e, w2)"
        " h = MatMul(f, w3)  i = Add(h, bias)  y = MatMul(i, w4) }",
        "w1 6 16, bias 16, w2 16 16, w3 16 16, w4 16 3",
    )


MODELS = {
    "chain": chain,
    "dense_blocks": dense_blocks,
    "depthwise": depthwise,
    "flat_nchw": flat_nchw,
    "flat_nhwc": flat_nhwc,
    "grouped": grouped,
    "halves": halves,
    "residual": lambda: with_variance(residual()),
    "shared": shared,
    "transformer": transformer,
}
