"""The inputs and outputs of a plan: TensorRT's data types as numpy's, and what a profile takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith.errors import PlanError

NUMPY_NAMES = {  # trt.DataType -> numpy
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}
INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """An input or output of a plan."""

    name: str
    kind: str  # member of trt.DataType
    shape: tuple[int, ...]  # -1: free
    is_input: bool
    smallest: tuple[int, ...] | None  # that the profile takes; inputs only
    largest: tuple[int, ...] | None

    def numpy_type(self) -> np.dtype[Any]:
        """The numpy type of its elements; bfloat16 is that of ml_dtypes.

        Raises:
            PlanError: numpy has none.
        """
        if self.kind == "BF16":
            try:
                import ml_dtypes
            except ImportError as error:
                raise PlanError(
                    f"tensor {self.name!r} is bfloat16, which numpy lacks", fix="pip install ml-dtypes"
                ) from error
            bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return bfloat16
        if self.kind not in NUMPY_NAMES:
            raise PlanError(f"tensor {self.name!r} is {self.kind}, which numpy lacks")
        return np.dtype(NUMPY_NAMES[self.kind])


def shape_fits(binding: Binding, shape: tuple[int, ...], path: Path) -> None:
    """Raise PlanError where the profile does not take this shape of an input."""
    low, high = binding.smallest or binding.shape, binding.largest or binding.shape
    if len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
        return
    ranges = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(low, high, strict=True))
    raise PlanError(
        f"the profile of {path} does not take this shape of input {binding.name!r}",
        found=f"[{', '.join(map(str, shape))}]",
        expected=f"[{ranges}]",
    )


def fed_array(binding: Binding, array: NDArray[Any], path: Path) -> NDArray[Any]:
    """The array as the plan takes it, contiguous.

    TensorRT 8.6 has no int64: it makes such inputs int32, and values that fit are passed on.

    Raises:
        PlanError: another data type, or values beyond int32.
    """
    wanted = binding.numpy_type()
    if array.dtype == wanted:
        return np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype == np.int64 and wanted == np.int32:
        if array.size and (array.min() < INT32.min or array.max() > INT32.max):
            raise PlanError(
                f"input {binding.name!r} of {path} is int32",
                found=f"int64 from {array.min()} to {array.max()}",
                expected=f"{INT32.min} to {INT32.max}",
            )
        return np.ascontiguousarray(array, dtype=np.int32).reshape(array.shape)
    raise PlanError(
        f"input {binding.name!r} of {path} has another data type", found=array.dtype, expected=wanted
    )
