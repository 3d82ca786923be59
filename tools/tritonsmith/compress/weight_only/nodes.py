"""The nodes that stand for a product or a look-up once its weight is stored in blocks.

ONNX Runtime's constant folding leaves DequantizeLinear alone but runs Cast, Reshape, Mul and the like on
constants when a session opens. So what is to be widened once goes through those, and what an engine fuses
with its product (MatMulNBits) or keeps narrow (OpenVINO, TensorRT) through DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tritonsmith.compress.graph import drop_unused, nodes_of
from tritonsmith.compress.weight_only.blocks import Grid, codes_of

Array = NDArray[Any]

NIBBLE = 4
OFFSET = 8  # of INT4 codes kept as unsigned nibbles


@dataclass(slots=True, kw_only=True)
class Rewriter:
    """A graph that is being rewritten: weights once each, nodes in their order, names of its own.

    `int4_type` says whether the server reads Cast from INT4 (ONNX Runtime 1.23); else INT4 that is
    widened at loading is kept as two nibbles a byte. Not frozen: it is the graph's own work space.
    """

    graph: onnx.GraphProto
    int4_type: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    _taken: set[str] = field(default_factory=set)
    _made: dict[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.graph
        self._taken |= {tensor.name for tensor in graph.initializer} | {v.name for v in graph.input}
        for node in nodes_of(graph):
            self._taken |= {node.name, *node.output}

    def product_of_floats(self, node: onnx.NodeProto, weight: Array, grid: Grid) -> None:
        """MatMul with a blocked DequantizeLinear before its weight."""
        node.input[1] = self._dequantized(node.input[1], weight, grid)
        self.nodes.append(node)

    def product_of_integers(self, node: onnx.NodeProto, weight: Array, grid: Grid) -> None:
        """MatMulInteger of the activation, quantized as it comes, and the weight in INT8.

        ONNX Runtime fuses it to DynamicQuantizeMatMul or MatMulIntegerToFloat, with a bias that follows.
        """
        x, name = node.input
        scales = grid.steps[0] if grid.scales is None else grid.scales
        weight_8 = self._widened(name, weight, grid)
        scale_name = self._once(name, "scales", scales)
        key = (x, "dynamic")
        if key not in self._made:
            outputs = [self._fresh(f"{x}_{part}") for part in ("uint8", "scale", "zero_point")]
            self._add("DynamicQuantizeLinear", [x], outputs)
            self._made[key] = outputs[0]
            self._made[x, "scale"], self._made[x, "zero_point"] = outputs[1:]
        y = node.output[0]
        whole, floats, scale = (self._fresh(f"{y}_{part}") for part in ("int32", "float", "scale"))
        self._add("MatMulInteger", [self._made[key], weight_8, self._made[x, "zero_point"]], [whole])
        self._add("Cast", [whole], [floats], to=TensorProto.FLOAT)
        self._add("Mul", [self._made[x, "scale"], scale_name], [scale])
        self._add("Mul", [floats, scale], [y])

    def lookup_of_table(self, node: onnx.NodeProto, weight: Array, grid: Grid) -> None:
        """Gather from a table that is widened whole: what TensorRT and OpenVINO read.

        ONNX Runtime would widen all of it in each run.
        """
        node.input[0] = self._dequantized(node.input[0], weight, grid)
        self.nodes.append(node)

    def lookup_of_rows(self, node: onnx.NodeProto, weight: Array, grid: Grid) -> None:
        """Gather of codes and of their scales; only the rows that were looked up are widened.

        Cast and Mul widen them: of a product of two DequantizeLinears ONNX Runtime makes no MatMulNBits.
        """
        name, indices = node.input
        y = node.output[0]
        codes = self._widened(name, weight, grid)
        rows, floats, scales = (self._fresh(f"{y}_{part}") for part in ("codes", "float", "scales"))
        per_row = grid.steps if grid.scales is None else grid.scales[:, None]
        self._add("Gather", [codes, indices], [rows], axis=0)
        self._add("Gather", [self._once(name, "scales", per_row), indices], [scales], axis=0)
        if per_row.shape[1] > 1:
            spread = self._fresh(f"{y}_spread")
            index = self._block_of_element(weight.shape[1], grid.block)
            self._add("Gather", [scales, index], [spread], axis=-1)
            scales = spread
        self._add("Cast", [rows], [floats], to=TensorProto.FLOAT)
        self._add("Mul", [floats, scales], [y])

    def finish(self) -> None:
        """Put the nodes into the graph; weights that nothing reads any more go."""
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        del self.graph.node[:]
        self.graph.node.extend(kept)
        drop_unused(self.graph)

    def _dequantized(self, name: str, weight: Array, grid: Grid) -> str:
        if (name, "dequantized") not in self._made:
            codes = self._fresh(f"{name}_int{grid.bits}")
            self.graph.initializer.append(tensor_of_codes(codes_of(weight, grid), codes, grid.bits))
            output = self._fresh(f"{name}_dequantized")
            inputs = [codes, self._once(name, "scales", grid.steps)]
            self._add("DequantizeLinear", inputs, [output], axis=grid.axis, block_size=grid.block)
            self._made[name, "dequantized"] = output
        return self._made[name, "dequantized"]

    def _widened(self, name: str, weight: Array, grid: Grid) -> str:
        """INT8 of the weight's shape: its codes, times their multipliers where there are any."""
        if (name, "widened") not in self._made:
            codes = codes_of(weight, grid)
            if grid.bits == NIBBLE:
                result = self._unpacked(name, codes, grid)
            else:
                result = self._once(name, "int8", codes)
            self._made[name, "widened"] = result
        return self._made[name, "widened"]

    def _unpacked(self, name: str, codes: Array, grid: Grid) -> str:
        """A chain of nodes from stored INT4 to INT8, all of them folded when a session opens."""
        if self.int4_type:
            stored = self._fresh(f"{name}_int4")
            self.graph.initializer.append(tensor_of_codes(codes, stored, NIBBLE))
            result = self._chain(name, "int32", "Cast", [stored], to=TensorProto.INT32)
        else:
            result = self._from_nibbles(name, codes)
        if grid.multipliers is not None:
            index = self._block_of_element(codes.shape[grid.axis], grid.block)
            stored = self._once(name, "multipliers", grid.multipliers)
            spread = self._chain(name, "spread", "Gather", [stored, index], axis=grid.axis)
            wide = self._chain(name, "multipliers_int32", "Cast", [spread], to=TensorProto.INT32)
            result = self._chain(name, "multiplied", "Mul", [result, wide])
        return self._chain(name, "int8", "Cast", [result], to=TensorProto.INT8)

    def _from_nibbles(self, name: str, codes: Array) -> str:
        """INT32 from bytes that hold the first half of the codes below and the second half above."""
        packed = self._once(name, "nibbles", nibbles_of(codes))
        four = self._once("", "four", np.array(NIBBLE, dtype=np.uint8))
        high = self._chain(name, "high", "BitShift", [packed, four], direction="RIGHT")
        moved = self._chain(name, "moved", "BitShift", [packed, four], direction="LEFT")
        low = self._chain(name, "low", "BitShift", [moved, four], direction="RIGHT")
        both = self._chain(name, "both", "Concat", [low, high], axis=0)
        if codes.size % 2:
            ends = [self._sizes([value]) for value in (0, codes.size, 0)]
            both = self._chain(name, "even", "Slice", [both, *ends])
        wide = self._chain(name, "wide", "Cast", [both], to=TensorProto.INT32)
        offset = self._once("", "offset", np.array(OFFSET, dtype=np.int32))
        signed = self._chain(name, "signed", "Sub", [wide, offset])
        return self._chain(name, "shaped", "Reshape", [signed, self._sizes(codes.shape)])

    def _block_of_element(self, length: int, block: int) -> str:
        return self._once("", f"block_of_{length}_by_{block}", np.arange(length, dtype=np.int32) // block)

    def _sizes(self, values: Iterable[int]) -> str:
        sizes = np.array(list(values), dtype=np.int64)
        return self._once("", "sizes_" + "_".join(map(str, sizes)), sizes)

    def _once(self, name: str, part: str, array: Array) -> str:
        """An initializer, made at its first use."""
        if (name, part) not in self._made:
            fresh = self._fresh(f"{name}_{part}" if name else part)
            self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), fresh))
            self._made[name, part] = fresh
        return self._made[name, part]

    def _chain(self, name: str, part: str, kind: str, inputs: list[str], **attributes: Any) -> str:
        output = self._fresh(f"{name}_{part}_of_codes")
        self._add(kind, inputs, [output], **attributes)
        return output

    def _add(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        name = self._fresh(f"{outputs[0]}_{kind}")
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, **attributes))

    def _fresh(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def tensor_of_codes(codes: Array, name: str, bits: int) -> onnx.TensorProto:
    """An initializer of INT8, or of INT4, two elements a byte with the first one below (onnx.proto)."""
    if bits != NIBBLE:
        return numpy_helper.from_array(np.ascontiguousarray(codes), name)
    flat = _even(codes).astype(np.uint8)
    packed = (flat[0::2] & 0xF) | (flat[1::2] & 0xF) << NIBBLE
    return onnx.TensorProto(
        name=name, data_type=TensorProto.INT4, dims=codes.shape, raw_data=packed.tobytes()
    )


def nibbles_of(codes: Array) -> Array:
    """uint8, half as many: element i holds code i below and code i + half above, each plus 8."""
    flat = (_even(codes) + OFFSET).astype(np.uint8)
    half = len(flat) // 2
    packed: Array = flat[:half] | flat[half:] << NIBBLE
    return packed


def _even(codes: Array) -> Array:
    flat = codes.reshape(-1)
    return np.append(flat, np.int8(0)) if flat.size % 2 else flat
