"""The largest request that a served model may be sent, and what it and its answer weigh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith import dtypes
from tritonsmith.client import Signature, Tensor
from tritonsmith.errors import DeployError
from tritonsmith.samples import load_served_samples

_STRING_HEADER_BYTES = 4  # KServe v2, binary tensor data: each string is led by its length


def largest_request(
    signature: Signature, samples: Path | None, *, axis_length: int | None = None
) -> dict[str, NDArray[Any]]:
    """Inputs by name: max_batch_size samples, each as large as they come.

    Given samples are repeated until the batch is full, the largest first. Without samples every number is 1
    (a valid index, mask and pixel) and free axes are `axis_length` long.

    Raises:
        DeployError: no samples for a model that takes strings, or has free axes without `axis_length`.
        SamplesError: samples that do not fit the model.
    """
    count = max(1, signature.max_batch_size)
    if samples is None:
        return {
            tensor.name: _ones(signature, tensor, count, axis_length)
            for tensor in signature.inputs
            if not tensor.optional
        }
    arrays = load_served_samples(samples, signature).arrays
    order = np.argsort(-_row_bytes(arrays), kind="stable")
    if signature.max_batch_size == 0:
        return {name: array[order[0]] for name, array in arrays.items()}
    rows = np.resize(order, count)
    return {name: array[rows] for name, array in arrays.items()}


def bytes_of(arrays: Mapping[str, NDArray[Any]]) -> int:
    """What the tensors weigh on the wire, as binary tensor data."""
    return sum(_bytes_of(array) for array in arrays.values())


def _bytes_of(array: NDArray[Any]) -> int:
    if array.dtype != object:
        return array.nbytes
    return sum(_STRING_HEADER_BYTES + len(item) for item in array.ravel())


def _row_bytes(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """Bytes of each sample, all inputs together: [samples]."""
    per_input = [[_bytes_of(np.asarray(row)) for row in array] for array in arrays.values()]
    total: NDArray[np.int64] = np.array(per_input, np.int64).sum(axis=0)
    return total


def _ones(signature: Signature, tensor: Tensor, count: int, axis_length: int | None) -> NDArray[Any]:
    if tensor.datatype == "BYTES":
        raise DeployError(
            f"model {signature.model!r} takes strings, of which any length could be the largest",
            found=tensor,
            fix=f"give it samples: --samples {signature.model}=X.npz",
        )
    shape = list(tensor.shape)
    if signature.max_batch_size:
        shape[0] = count
    if -1 in shape and axis_length is None:
        raise DeployError(
            f"model {signature.model!r} has free axes, of which any length could be the largest",
            found=tensor,
            fix=f"give it samples (--samples {signature.model}=X.npz), or say --axis-length N",
        )
    sizes = [axis_length if axis < 0 else axis for axis in shape]
    return np.ones([size or 1 for size in sizes], dtypes.BY_WIRE[tensor.datatype].numpy)
