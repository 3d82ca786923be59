"""ONNX tensors as PyTorch tensors and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch

from tritonsmith.errors import CompressionError

TYPES: Mapping[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.UINT16: torch.uint16,
    onnx.TensorProto.UINT32: torch.uint32,
    onnx.TensorProto.UINT64: torch.uint64,
    onnx.TensorProto.BOOL: torch.bool,
}
NARROW: Mapping[int, type[np.integer[Any]]] = {
    onnx.TensorProto.INT4: np.int8,
    onnx.TensorProto.UINT4: np.uint8,
}


def tensor_from_onnx(tensor: onnx.TensorProto) -> torch.Tensor:
    """One copy of an initializer, 4-bit integers widened to 8.

    Raises:
        CompressionError: a data type that PyTorch does not have, such as strings.
    """
    if tensor.data_type not in TYPES and tensor.data_type not in NARROW:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        raise CompressionError(f"tensor {tensor.name!r} cannot be trained with", found=kind)
    array = onnx.numpy_helper.to_array(tensor)
    if tensor.data_type in NARROW:
        array = array.astype(NARROW[tensor.data_type])
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C"))  # what onnx gives may be read-only


def write_tensor(values: torch.Tensor, tensor: onnx.TensorProto) -> None:
    """Put values into an initializer of the same shape; its data type stays."""
    values = values.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        raw = values.view(torch.uint16).numpy().tobytes()
    else:
        raw = values.numpy().tobytes()
    for field in ("float_data", "double_data", "int32_data"):
        tensor.ClearField(field)
    tensor.raw_data = raw
