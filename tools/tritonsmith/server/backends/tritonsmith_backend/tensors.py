"""Arrays out of Triton's tensors and back.

Strings are object arrays of bytes. bfloat16 is held as its bits in uint16: numpy has no such type, and the
stub hands it over through DLPack alone.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

BFLOAT16 = "TYPE_BF16"
DLPACK_BFLOAT = 4  # dlpack.h, DLDataTypeCode.kDLBfloat
UNUSED_NAME = b"dltensor"  # dlpack.h and the Python specification of DLPack: the names of a capsule
USED_NAME = b"used_dltensor"


class _DLTensor(ctypes.Structure):
    """dlpack.h, DLTensor: the first member of DLManagedTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.restype = ctypes.c_int
_rename.argtypes = [ctypes.py_object, ctypes.c_char_p]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def array_from_tensor(tensor: Any, data_type: str) -> np.ndarray:
    """The tensor's values; numbers are a view that lives as long as the request."""
    if data_type != BFLOAT16:
        return tensor.as_numpy()
    shape = tuple(tensor.shape())
    capsule = tensor.to_dlpack()
    inner = _DLTensor.from_address(_pointer_of(capsule, UNUSED_NAME))
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, np.uint16)
    bits = ctypes.string_at(inner.data + inner.byte_offset, count * 2)
    return np.frombuffer(bits, np.uint16).reshape(shape)


def tensor_from_array(name: str, array: np.ndarray, data_type: str) -> Any:
    if data_type != BFLOAT16:
        return pb_utils.Tensor(name, array)
    owner = np.array(array, np.uint16).__dlpack__()  # a copy: DLPack takes no read-only array
    pointer = _pointer_of(owner, UNUSED_NAME)
    _DLTensor.from_address(pointer).code = DLPACK_BFLOAT
    # The stub gives a used capsule a name of its own, at which numpy's would never be freed. So the stub
    # gets a bare capsule, and numpy's is marked as used; the stub calls numpy's deleter in the end.
    _rename(owner, USED_NAME)
    return pb_utils.Tensor.from_dlpack(name, _new_capsule(pointer, UNUSED_NAME, None))
