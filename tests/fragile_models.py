"""The digits network with one layer that INT8 hurts, and on purpose only that one."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from digits_models import conv_model

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
