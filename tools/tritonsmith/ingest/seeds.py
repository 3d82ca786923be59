"""Seeded inputs for a signature: of every data type, in a range that the graph can take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tritonsmith import dtypes
from tritonsmith.artifact import TensorSpec

Range = tuple[float, float]

WORDS = (b"triton", b"a", b"", b"seven words", b"42", "na\u00efve".encode())
SMALL_INTEGERS = (0.0, 9.0)
FLOATS = (-1.0, 1.0)
FULL_RANGE = {"uint8": (0.0, 255.0), "int8": (-128.0, 127.0)}  # pixels and quantized values

# Operators whose first output holds nothing but values of their first input (Concat: of any input).
CARRIERS = frozenset(
    (
        *("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose"),
        *("Slice", "Concat", "Split", "Expand", "Tile", "Gather"),
    )
)


def draw_inputs(
    specs: tuple[TensorSpec, ...],
    axes: Mapping[str, int],
    ranges: Mapping[str, Range],
    whole: frozenset[str],
    seed: int,
) -> dict[str, NDArray[Any]]:
    """One array for each input, of the lengths in `axes` where an axis is free.

    `ranges` bounds values, ends included; inputs in `whole` get whole numbers though they are floats.
    """
    random = np.random.default_rng(seed)
    arrays = {}
    for spec in specs:
        shape = tuple(axes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        bounds = ranges.get(spec.name) or _default_range(spec)
        arrays[spec.name] = _draw(random, spec, shape, bounds, whole=spec.name in whole)
    return arrays


def index_ranges(model: onnx.ModelProto, inputs: tuple[TensorSpec, ...]) -> dict[str, Range]:
    """The range of every input that indexes a table of known length, such as an embedding's.

    An input is followed through reshapes, casts and slices to a Gather on a constant; where it reaches
    several, the shortest table counts.
    """
    rows = _tables(model.graph)
    owners: dict[str, set[str]] = {spec.name: {spec.name} for spec in inputs}
    limits: dict[str, int] = {}
    for node in model.graph.node:
        sources = node.input if node.op_type == "Concat" else node.input[:1]
        carried: set[str] = set().union(*(owners.get(name, set()) for name in sources))
        if node.op_type in CARRIERS and carried:
            for name in node.output:
                owners[name] = carried
        if node.op_type != "Gather" or node.input[0] not in rows:
            continue
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        length = rows[node.input[0]][axis]
        for owner in owners.get(node.input[1], ()):
            limits[owner] = min(length, limits.get(owner, length))
    return {name: (0.0, float(limit - 1)) for name, limit in limits.items()}


def _tables(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer if tensor.dims}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value" and attribute.t.dims:
                    shapes[node.output[0]] = tuple(attribute.t.dims)
        elif node.op_type in ("Identity", "Cast", "DequantizeLinear") and node.input[0] in shapes:
            shapes[node.output[0]] = shapes[node.input[0]]
    return shapes


def _default_range(spec: TensorSpec) -> Range:
    if "mask" in spec.name.lower():
        return (0.0, 1.0)
    if np.dtype(dtypes.BY_NAME[spec.dtype].numpy).kind in "iu":
        return FULL_RANGE.get(spec.dtype, SMALL_INTEGERS)
    return FLOATS


def _draw(
    random: np.random.Generator, spec: TensorSpec, shape: tuple[int, ...], bounds: Range, *, whole: bool
) -> NDArray[Any]:
    wanted = dtypes.BY_NAME[spec.dtype].numpy
    is_mask = "mask" in spec.name.lower()
    if spec.dtype == "string":
        words = np.empty(math.prod(shape), dtype=object)
        words[:] = [WORDS[pick] for pick in random.integers(len(WORDS), size=words.size)]
        return words.reshape(shape)
    if spec.dtype == "bool":
        array = np.asarray(random.integers(2, size=shape)).astype(bool)
    elif wanted.kind in "iu" or whole or is_mask:
        low, high = (int(bound) for bound in bounds)
        array = np.asarray(random.integers(low, high, size=shape, endpoint=True)).astype(wanted)
    else:
        array = np.asarray(random.uniform(*bounds, size=shape)).astype(wanted)
    if is_mask and array.ndim and array.shape[-1]:
        array[..., 0] = 1  # a row that is masked whole is undefined in most attention
    return array
