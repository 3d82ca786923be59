"""The dialect of ONNX Runtime's CPU and OpenVINO: asymmetric activations, INT32 biases, Q on outputs.

ONNX Runtime's selectors fuse a convolution to QLinearConv only where its output is quantized too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from tritonsmith.compress.graph import drop_unused
from tritonsmith.compress.int8.arithmetic import Arithmetic

Range = tuple[float, float]


def write_onnxruntime(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    *,
    arithmetic: Arithmetic,
    kinds: tuple[str, ...],
    spared: frozenset[str],
) -> onnx.ModelProto:
    """Quantize nodes of `kinds`, those named in `spared` left out, with these ranges by tensor name.

    The model given is used up.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import add_infer_metadata

    symmetric = arithmetic.activations == "int8"
    pairs = {
        name: (np.array(low, np.float32), np.array(high, np.float32)) for name, (low, high) in ranges.items()
    }
    add_infer_metadata(model)
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=arithmetic.reduce_range,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, pairs),
        nodes_to_quantize=[],
        nodes_to_exclude=sorted(spared),
        op_types_to_quantize=list(kinds),
        extra_options={"ActivationSymmetric": symmetric},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantized: onnx.ModelProto = quantizer.model.model
    _free_last_outputs(quantized.graph, kinds, spared)
    return quantized


def _free_last_outputs(graph: onnx.GraphProto, kinds: tuple[str, ...], spared: frozenset[str]) -> None:
    """Let Gemm and MatMul give floats where nothing quantized reads them.

    Both engines run an INT8 product with a float result, and rounding a result once more only costs
    accuracy: a regression's output would have 256 values.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    for quantize in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        maker = makers.get(quantize.input[0])
        if maker is None or maker.op_type not in ("Gemm", "MatMul"):
            continue
        pair = readers.get(quantize.output[0], [])
        if len(readers[quantize.input[0]]) != 1 or [node.op_type for node in pair] != ["DequantizeLinear"]:
            continue
        dequantize = pair[0]
        reading = readers.get(dequantize.output[0], [])
        if any(node.op_type in kinds and node.name not in spared for node in reading):
            continue
        if quantize.input[0] in outputs:
            continue
        maker.output[0] = dequantize.output[0]
        graph.node.remove(quantize)
        graph.node.remove(dequantize)
    drop_unused(graph)
