"""Why a product of a quantized file does not run in INT8, read from what stands around it in the file."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import TensorProto

from tritonsmith.compress.graph import PASSES_WEIGHTS_ON, constants_of, readers_of
from tritonsmith.compress.int8.qdq_tensorrt import PRODUCTS, SMALLEST_SIDE

CONVOLUTIONS = ("Conv", "ConvTranspose")
RECURRENT = ("GRU", "RNN")
WEIGHTS_ONLY = "weights only: they are widened, and the product is a float one"


class Explainer:
    """Gives the reason for one node after another of one file."""

    def __init__(self, model: onnx.ModelProto, kept: Iterable[str], engine: str) -> None:
        graph = model.graph
        self._kept = frozenset(kept)
        self._engine = engine
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._constants = constants_of(graph)
        self._makers = {name: node for node in graph.node for name in node.output}
        self._readers = readers_of(graph)
        self._outputs = {value.name for value in graph.output}

    def explain(self, node: onnx.NodeProto | None, kind: str) -> str:
        """Why `node`, which the engine built as `kind`, is computed in floating point."""
        if "MatMulNBits" in (kind, node.op_type if node is not None else ""):
            return WEIGHTS_ONLY
        if kind in ("Attention", "MultiHeadAttention"):
            return "fused attention, which multiplies two activations"
        if node is None:
            return "made by the engine's own optimiser"
        if node.name in self._kept:
            return "kept in floating point, by request or for the budget"
        if node.op_type in RECURRENT:
            return f"no engine has INT8 kernels for {node.op_type}"
        if node.op_type == "LSTM":
            return "its weights stay in floating point"
        if not self._constants & set(node.input[:2]):
            return "multiplies two activations (attention)"
        return self._weight_reason(node) or self._data_reason(node) or self._result_reason(node)

    def _weight_reason(self, node: onnx.NodeProto) -> str | None:
        name = next(name for name in reversed(node.input[:2]) if name in self._constants)
        maker = self._makers.get(name)
        while maker is not None and maker.op_type in PASSES_WEIGHTS_ON - {"DequantizeLinear"}:
            name = maker.input[0]
            maker = self._makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear":
            small = name in self._weights and min(self._weights[name].dims, default=0) < SMALLEST_SIDE
            if node.op_type in PRODUCTS and small and self._engine == "tensorrt":
                return f"a side of its weights is below {SMALLEST_SIDE}, which is faster in floating point"
            return "its weights were not quantized"
        stored = self._weights.get(maker.input[0])
        if stored is not None and stored.data_type not in (TensorProto.INT8, TensorProto.UINT8):
            kind = TensorProto.DataType.Name(stored.data_type)
            return f"{WEIGHTS_ONLY} ({kind})"
        return None

    def _data_reason(self, node: onnx.NodeProto) -> str | None:
        data = next((name for name in node.input[:2] if name not in self._constants), node.input[0])
        maker = self._makers.get(data)
        if maker is not None and maker.op_type == "DequantizeLinear":
            return None
        if maker is None:
            return "its input is not quantized"
        return f"its input is left in floating point by {maker.name or maker.op_type}"

    def _result_reason(self, node: onnx.NodeProto) -> str:
        result = node.output[0]
        readers = self._readers.get(result, [])
        if node.op_type in CONVOLUTIONS and self._engine == "onnxruntime":
            others = [
                reader.name or reader.op_type for reader in readers if reader.op_type != "QuantizeLinear"
            ]
            if result in self._outputs:
                return "it gives an output of the model in floating point"
            if others:
                return f"its result is read in floating point by {others[0]}"
        return f"{self._engine} chose floating point for it"
