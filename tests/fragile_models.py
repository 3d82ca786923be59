"""The digits network with one layer that INT8 hurts, and on purpose only that one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from digits_models import conv_model, split_digits
from tritonsmith.compress.int8.static import QUANTIZED_OPS

FRAGILE = "conv_2"
OUTLIER = 100.0


def fragile_model() -> onnx.ModelProto:
    """`conv_model` with channel 0 of conv_1 always zero after its Relu, and huge weights on it in conv_2.

    Multiplied by zero, they change no output; but each filter of conv_2 has one scale, so its other weights
    are left with one to three of 127 steps.
    """
    model = conv_model()
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    shift = numpy_helper.to_array(weights["shift1"]).copy()
    shift[0] = -50.0
    filters = numpy_helper.to_array(weights["k2"]).copy()
    filters[:, 0] = OUTLIER * np.abs(filters).max()
    for name, array in (("shift1", shift), ("k2", filters)):
        weights[name].CopyFrom(numpy_helper.from_array(array, name))
    return model


def writer_of(prepared: Path) -> Callable[[frozenset[str], Path], None]:
    """A function that quantizes all nodes but those named, by ONNX Runtime's own tool, to a path."""

    def write(kept: frozenset[str], path: Path) -> None:
        quantize_static(
            prepared,
            path,
            _Images(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED_OPS),
            nodes_to_exclude=sorted(kept),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )

    return write


class _Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._parts = iter(np.array_split(split_digits().train_images[:128, None], 4))

    def get_next(self) -> dict[str, Any] | None:
        part = next(self._parts, None)
        return None if part is None else {"image": part}
