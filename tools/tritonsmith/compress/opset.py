"""Raising the opset of a model of any size."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, version_converter

from tritonsmith import onnx_model
from tritonsmith.errors import CompressionError

PER_CHANNEL_OPSET = 13  # QuantizeLinear and DequantizeLinear got their axis there
BLOCKED_OPSET = 21  # and their blocks, and INT4
NEEDS = {PER_CHANNEL_OPSET: "per-channel quantization", BLOCKED_OPSET: "weights in blocks"}
LARGE_ELEMENTS = 4096  # what takes part in shapes is smaller; the converter needs to see that


def raise_opset(model: onnx.ModelProto, opset: int, name: str) -> onnx.ModelProto:
    """The model at `opset`, or as it is where it is there already; `name` is its file's, for messages.

    ONNX's converter serializes what it is given, so large weights are taken out and put back: models
    over 2 GB pass, too. The given model is left without them.

    Raises:
        CompressionError: the converter knows no way for an operator.
    """
    found = onnx_model.opset_of(model)
    if found >= opset:
        return model
    graph = model.graph
    large = [tensor for tensor in graph.initializer if int(np.prod(tensor.dims)) > LARGE_ELEMENTS]
    inputs = {value.name for value in graph.input}
    for tensor in large:
        graph.initializer.remove(tensor)
        if tensor.name not in inputs:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        raised = version_converter.convert_version(model, opset)
    except (version_converter.ConvertError, RuntimeError, ValueError) as error:
        raise CompressionError(
            f"{name} is of an opset too old for {NEEDS.get(opset, 'this step')}, and cannot be raised",
            found=f"opset {found}: {str(error).strip().splitlines()[0]}",
            expected=f"opset {opset} or newer",
            fix="export the model again with a newer opset",
        ) from error
    added = {tensor.name for tensor in large} - inputs
    for value in [value for value in raised.graph.input if value.name in added]:
        raised.graph.input.remove(value)
    raised.graph.initializer.extend(large)
    return raised
