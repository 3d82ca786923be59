"""Bias correction (Nagel et al., arXiv 1906.04721, 4.2): a quantized layer's mean error taken off its bias.

The expectation is measured: on calibration data, each layer is computed twice from the same inputs, as it
was and with its quantized weights and input, and the mean difference of each output channel is subtracted.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tritonsmith import onnx_model
from tritonsmith.compress.graph import drop_unused, readers_of
from tritonsmith.compress.int8.taps import run_tapped
from tritonsmith.samples import Samples

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
AXES_AS_INPUT_OPSET = 18  # of ReduceMean


def correct_biases(
    prepared: Path, quantized: onnx.ModelProto, samples: Samples, *, batched: bool
) -> tuple[Path, int]:
    """Write the float model with corrected biases beside `prepared`; return it and how many were corrected.

    `quantized` is the same graph in QDQ form, from which the quantized weights and scales are read. A
    MatMul is corrected where it alone feeds an Add of a constant.

    Raises:
        CompressionError: the graph cannot be run.
    """
    model = onnx_model.load_model(prepared)
    measured = onnx_model.load_model(prepared)
    errors = _add_errors(measured, quantized.graph)
    measuring = prepared.with_name("measuring.onnx")
    onnx_model.save_model(measured, measuring)
    means = _means(measuring, list(errors.values()), samples, batched=batched)
    measuring.unlink()
    corrected = 0
    for node in list(model.graph.node):
        if node.name in errors:
            corrected += _correct(model.graph, node, means[errors[node.name]])
    drop_unused(model.graph)
    out = prepared.with_name("corrected.onnx")
    onnx_model.save_model(model, out)
    return out, corrected


def _means(
    path: Path, names: list[str], samples: Samples, *, batched: bool
) -> dict[str, NDArray[np.float64]]:
    sums: dict[str, NDArray[np.float64]] = {}
    total = 0
    for count, tensors in run_tapped(path, names, samples, batched=batched):
        for name, array in tensors.items():
            sums[name] = sums.get(name, np.zeros(array.shape)) + count * array.astype(np.float64)
        total += count
    return {name: array / total for name, array in sums.items()}


def _add_errors(model: onnx.ModelProto, quantized: onnx.GraphProto) -> dict[str, str]:
    """Beside each quantized layer, compute the mean of its error by channel; tensor names by node name."""
    graph = model.graph
    as_input = onnx_model.opset_of(model) >= AXES_AS_INPUT_OPSET
    arrays = {tensor.name: tensor for tensor in quantized.initializer}
    makers = {name: node for node in quantized.node for name in node.output}
    twins = {node.name: node for node in quantized.node}
    ranks = _ranks(graph)
    errors = {}
    for node in list(graph.node):
        twin = twins.get(node.name)
        if node.op_type not in LAYERS or twin is None or node.output[0] not in ranks:
            continue
        data, weight = (makers.get(name) for name in twin.input[:2])
        if data is None or weight is None or not _dequantizes(data) or not _dequantizes(weight):
            continue
        if weight.input[0] not in arrays:
            continue
        name = f"{node.name}_quantization"
        graph.initializer.append(numpy_helper.from_array(_weights_of(weight, arrays), f"{name}_weight"))
        parts = _scale_names(graph, name, data, arrays)
        rank = ranks[node.output[0]]
        channel = 1 if node.op_type in ("Conv", "ConvTranspose") else rank - 1
        axes = [axis for axis in range(rank) if axis != channel]
        layer = onnx.NodeProto.FromString(node.SerializeToString())
        layer.name = f"{name}_layer"
        layer.input[0], layer.input[1] = f"{name}_input", f"{name}_weight"
        layer.output[0] = f"{name}_output"
        mean = helper.make_node("ReduceMean", [f"{name}_error"], [f"{name}_mean"], keepdims=0)
        if as_input:
            graph.initializer.append(numpy_helper.from_array(np.array(axes), f"{name}_axes"))
            mean.input.append(f"{name}_axes")
        else:
            mean.attribute.append(helper.make_attribute("axes", axes))
        graph.node.extend(
            [
                helper.make_node("QuantizeLinear", [node.input[0], *parts], [f"{name}_steps"]),
                helper.make_node("DequantizeLinear", [f"{name}_steps", *parts], [f"{name}_input"]),
                layer,
                helper.make_node("Sub", [f"{name}_output", node.output[0]], [f"{name}_error"]),
                mean,
            ]
        )
        errors[node.name] = f"{name}_mean"
    return errors


def _dequantizes(node: onnx.NodeProto) -> bool:
    return node.op_type == "DequantizeLinear"


def _ranks(graph: onnx.GraphProto) -> dict[str, int]:
    values = [*graph.value_info, *graph.output]
    return {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in values
        if value.type.tensor_type.HasField("shape")
    }


def _weights_of(dequantize: onnx.NodeProto, arrays: dict[str, onnx.TensorProto]) -> NDArray[np.float32]:
    values, scales = (numpy_helper.to_array(arrays[name]) for name in dequantize.input[:2])
    axis = next((attribute.i for attribute in dequantize.attribute if attribute.name == "axis"), 1)
    if scales.ndim == 1:
        scales = scales.reshape([-1 if index == axis % values.ndim else 1 for index in range(values.ndim)])
    weights: NDArray[np.float32] = values.astype(np.float32) * scales  # symmetric: the zero point is 0
    return weights


def _scale_names(
    graph: onnx.GraphProto, name: str, data: onnx.NodeProto, arrays: dict[str, onnx.TensorProto]
) -> list[str]:
    found = []
    for part, source in zip(("scale", "zero_point"), data.input[1:3], strict=True):
        graph.initializer.append(
            numpy_helper.from_array(numpy_helper.to_array(arrays[source]), f"{name}_{part}")
        )
        found.append(f"{name}_{part}")
    return found


def _correct(graph: onnx.GraphProto, node: onnx.NodeProto, error: NDArray[np.float64]) -> bool:
    weights = {tensor.name: tensor for tensor in graph.initializer}
    target, slot, factor = node, 2, 1.0
    if node.op_type == "MatMul":
        readers = readers_of(graph).get(node.output[0], [])
        if len(readers) != 1 or readers[0].op_type != "Add":
            return False
        target = readers[0]
        slot = 1 - list(target.input).index(node.output[0])
    elif node.op_type == "Gemm":
        factor = next((attribute.f for attribute in node.attribute if attribute.name == "beta"), 1.0)
    name = target.input[slot] if len(target.input) > slot else ""
    fits = not name or (name in weights and list(weights[name].dims) in ([], [1], [len(error)]))
    if not fits or factor == 0.0:
        return False
    old = numpy_helper.to_array(weights[name]) if name else np.zeros(len(error), np.float32)
    bias = np.broadcast_to(old, error.shape) - error / factor
    corrected = f"{node.name}_corrected_bias"
    graph.initializer.append(numpy_helper.from_array(bias.astype(np.float32), corrected))
    if len(target.input) > slot:
        target.input[slot] = corrected
    else:
        target.input.append(corrected)
    return True
