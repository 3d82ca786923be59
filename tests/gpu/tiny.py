"""Tiny ONNX models with their own answers in numpy, written without the onnx package: a GPU machine has none.

Field numbers are those of onnx.proto3. `tests/test_gpu_tiny.py` opens what is written here with onnx and
compares the answers with ONNX Runtime's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith.artifact import TensorSpec

Array = NDArray[Any]
OPSET, IR_VERSION = 13, 8  # 13: QuantizeLinear with a scale for each channel
CODES = {"float32": 1, "int8": 3, "int64": 7, "float16": 10}  # TensorProto.DataType
RANDOM = np.random.default_rng(7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    kind: str
    inputs: tuple[str, ...]
    output: str
    integers: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """A model of one input `x` and one output `y`."""

    name: str
    precision: str
    x: TensorSpec
    y: TensorSpec
    nodes: tuple[Node, ...]
    weights: Mapping[str, Array]
    answer: Callable[[Array], Array]  # in float64 where it matters
    tolerance: float


def write_tiny(model: Tiny, folder: Path, *, external: bool = False) -> Path:
    """`<name>.onnx`; with `external`, its weights lie in `<name>.data` beside it."""
    path, data = folder / f"{model.name}.onnx", folder / f"{model.name}.data"
    offset, parts = 0, []
    for name, array in model.weights.items():
        place = None
        if external:
            place = {"location": data.name, "offset": str(offset), "length": str(array.nbytes)}
            offset += array.nbytes
        parts.append(_bytes(5, _tensor(name, array, place)))
    if external:
        data.write_bytes(b"".join(array.tobytes() for array in model.weights.values()))
    graph = b"".join(_bytes(1, _node(node)) for node in model.nodes)
    graph += _text(2, model.name) + b"".join(parts)
    graph += _bytes(11, _value(model.x)) + _bytes(12, _value(model.y))
    opset = _bytes(8, _text(1, "") + _number(2, OPSET))
    path.write_bytes(_number(1, IR_VERSION) + _bytes(7, graph) + opset)
    return path


def affine() -> Tiny:
    """y = 2 x + 1, [batch, 3]."""
    return Tiny(
        name="affine",
        precision="fp32",
        x=TensorSpec(name="x", dtype="float32", shape=("batch", 3)),
        y=TensorSpec(name="y", dtype="float32", shape=("batch", 3)),
        nodes=(
            Node(kind="Mul", inputs=("x", "two"), output="double"),
            Node(kind="Add", inputs=("double", "one"), output="y"),
        ),
        weights={"two": np.full(1, 2, np.float32), "one": np.ones(1, np.float32)},
        answer=lambda x: 2 * x + 1,
        tolerance=0,
    )


def doubled_length() -> Tiny:
    """y = x with itself after it, [batch, length] -> [batch, 2 length]: two free axes."""
    return Tiny(
        name="doubled_length",
        precision="fp32",
        x=TensorSpec(name="x", dtype="float32", shape=("batch", "length")),
        y=TensorSpec(name="y", dtype="float32", shape=("batch", "length2")),
        nodes=(Node(kind="Concat", inputs=("x", "x"), output="y", integers={"axis": 1}),),
        weights={},
        answer=lambda x: np.concatenate([x, x], axis=1),
        tolerance=0,
    )


def product(precision: str = "fp32") -> Tiny:
    """y = x w, [batch, 64] -> [batch, 32]; as "fp16", between two casts."""
    w = RANDOM.standard_normal((64, 32)).astype(np.float32) / 8
    if precision == "fp32":
        nodes = (Node(kind="MatMul", inputs=("x", "w"), output="y"),)
        weights = w
    else:
        nodes = (
            Node(kind="Cast", inputs=("x",), output="half", integers={"to": CODES["float16"]}),
            Node(kind="MatMul", inputs=("half", "w"), output="small"),
            Node(kind="Cast", inputs=("small",), output="y", integers={"to": CODES["float32"]}),
        )
        weights = w.astype(np.float16)
    return Tiny(
        name=f"product_{precision}",
        precision=precision,
        x=TensorSpec(name="x", dtype="float32", shape=("batch", 64)),
        y=TensorSpec(name="y", dtype="float32", shape=("batch", 32)),
        nodes=nodes,
        weights={"w": weights},
        answer=lambda x: x.astype(np.float64) @ weights.astype(np.float64),
        tolerance=2e-2,  # FP16, and TF32 products
    )


def sparse_product() -> Tiny:
    """`product` with two zeros in every four weights along K, as 2:4 kernels want them."""
    dense = product()
    w = dense.weights["w"].reshape(16, 4, 32).copy()
    w[:, :2] = 0
    weights = w.reshape(64, 32)
    return Tiny(
        name="sparse_product",
        precision="fp32",
        x=dense.x,
        y=dense.y,
        nodes=dense.nodes,
        weights={"w": weights},
        answer=lambda x: x.astype(np.float64) @ weights.astype(np.float64),
        tolerance=2e-2,
    )


def int8_convolution() -> Tiny:
    """A 1 x 1 convolution of 32 to 32 channels, [batch, 32, 8, 8], input and weights in INT8 by pairs."""
    scale_x = np.float32(1 / 16)
    scales = np.linspace(0.01, 0.05, 32, dtype=np.float32)
    w = RANDOM.integers(-127, 128, (32, 32, 1, 1)).astype(np.int8)
    exact = w.astype(np.float64) * scales[:, None, None, None]

    def answer(x: Array) -> Array:
        rounded = np.clip(np.rint(x / scale_x), -128, 127) * np.float64(scale_x)
        return np.einsum("nchw,oc->nohw", rounded, exact[:, :, 0, 0])

    return Tiny(
        name="int8_convolution",
        precision="int8",
        x=TensorSpec(name="x", dtype="float32", shape=("batch", 32, 8, 8)),
        y=TensorSpec(name="y", dtype="float32", shape=("batch", 32, 8, 8)),
        nodes=(
            Node(kind="QuantizeLinear", inputs=("x", "sx", "zx"), output="xq"),
            Node(kind="DequantizeLinear", inputs=("xq", "sx", "zx"), output="xd"),
            Node(kind="DequantizeLinear", inputs=("w", "sw", "zw"), output="wd", integers={"axis": 0}),
            Node(kind="Conv", inputs=("xd", "wd"), output="y", integers={"kernel_shape": (1, 1)}),
        ),
        weights={
            "sx": np.array(scale_x),
            "zx": np.array(0, np.int8),
            "w": w,
            "sw": scales,
            "zw": np.zeros(32, np.int8),
        },
        answer=answer,
        tolerance=2e-2,
    )


def all_tiny() -> tuple[Tiny, ...]:
    return (
        affine(),
        doubled_length(),
        product("fp32"),
        product("fp16"),
        sparse_product(),
        int8_convolution(),
    )


def draw(model: Tiny, batch: int, *, length: int = 5, seed: int = 0) -> Array:
    """An input that INT8 holds without clipping."""
    shape = [
        batch if axis == "batch" else length if isinstance(axis, str) else axis for axis in model.x.shape
    ]
    return np.random.default_rng(seed).uniform(-4, 4, shape).astype(np.float32)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(place: int, value: int) -> bytes:
    return _varint(place << 3) + _varint(value)


def _bytes(place: int, data: bytes) -> bytes:
    return _varint(place << 3 | 2) + _varint(len(data)) + data


def _text(place: int, text: str) -> bytes:
    return _bytes(place, text.encode())


def _numbers(place: int, values: Iterable[int]) -> bytes:
    return b"".join(_number(place, value) for value in values)


def _tensor(name: str, array: Array, external: Mapping[str, str] | None) -> bytes:
    head = _numbers(1, array.shape) + _number(2, CODES[array.dtype.name]) + _text(8, name)
    if external is None:
        return head + _bytes(9, array.tobytes())
    entries = (_bytes(13, _text(1, key) + _text(2, value)) for key, value in external.items())
    return head + b"".join(entries) + _number(14, 1)


def _node(node: Node) -> bytes:
    inputs = b"".join(_text(1, name) for name in node.inputs)
    attributes = (_bytes(5, _attribute(name, value)) for name, value in node.integers.items())
    name = _text(3, node.output)
    return inputs + _text(2, node.output) + name + _text(4, node.kind) + b"".join(attributes)


def _attribute(name: str, value: int | tuple[int, ...]) -> bytes:
    if isinstance(value, tuple):
        return _text(1, name) + _numbers(8, value) + _number(20, 7)  # INTS
    return _text(1, name) + _number(3, value) + _number(20, 2)  # INT


def _value(spec: TensorSpec) -> bytes:
    axes = (_text(2, axis) if isinstance(axis, str) else _number(1, axis) for axis in spec.shape)
    shape = b"".join(_bytes(1, axis) for axis in axes)
    tensor = _number(1, CODES[spec.dtype]) + _bytes(2, shape)
    return _text(1, spec.name) + _bytes(2, _bytes(1, tensor))
