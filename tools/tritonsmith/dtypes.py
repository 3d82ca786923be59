"""The data types of tensors, under the four names that they go by.

A data type is named as numpy names it ("float32"), plus "bfloat16" and "string".
ONNX knows it by a number of TensorProto.DataType (onnx.proto3), config.pbtxt by `TYPE_*`
(model_config.proto), and the wire by the KServe v2 name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class DataType:
    name: str
    onnx: int  # TensorProto.DataType
    config: str  # model_config.proto DataType
    wire: str  # KServe v2
    numpy: np.dtype[Any]  # object for strings


DATA_TYPES = tuple(
    DataType(name=name, onnx=onnx, config=config, wire=wire, numpy=np.dtype(numpy))
    for name, onnx, config, wire, numpy in (
        ("float32", 1, "TYPE_FP32", "FP32", np.float32),
        ("uint8", 2, "TYPE_UINT8", "UINT8", np.uint8),
        ("int8", 3, "TYPE_INT8", "INT8", np.int8),
        ("uint16", 4, "TYPE_UINT16", "UINT16", np.uint16),
        ("int16", 5, "TYPE_INT16", "INT16", np.int16),
        ("int32", 6, "TYPE_INT32", "INT32", np.int32),
        ("int64", 7, "TYPE_INT64", "INT64", np.int64),
        ("string", 8, "TYPE_STRING", "BYTES", np.object_),
        ("bool", 9, "TYPE_BOOL", "BOOL", np.bool_),
        ("float16", 10, "TYPE_FP16", "FP16", np.float16),
        ("float64", 11, "TYPE_FP64", "FP64", np.float64),
        ("uint32", 12, "TYPE_UINT32", "UINT32", np.uint32),
        ("uint64", 13, "TYPE_UINT64", "UINT64", np.uint64),
        ("bfloat16", 16, "TYPE_BF16", "BF16", ml_dtypes.bfloat16),
    )
)

BY_NAME = {data_type.name: data_type for data_type in DATA_TYPES}
BY_ONNX = {data_type.onnx: data_type for data_type in DATA_TYPES}
BY_CONFIG = {data_type.config: data_type for data_type in DATA_TYPES}
BY_WIRE = {data_type.wire: data_type for data_type in DATA_TYPES}


def name_from_numpy(dtype: np.dtype[Any]) -> str | None:
    """The name of a numpy data type, or None for one that no tensor has (complex, datetime)."""
    if dtype.kind in "OSU":
        return "string"
    return dtype.name if dtype.name in BY_NAME else None
