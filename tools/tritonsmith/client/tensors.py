"""Arrays held against a signature, split to its batch size, and joined again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import triton_to_np_dtype

from tritonsmith.client.signature import Signature, Tensor
from tritonsmith.errors import ClientError


class InferResult(Protocol):
    """tritonclient's own, of either protocol."""

    def as_numpy(self, name: str) -> NDArray[Any] | None: ...


def fit_inputs(signature: Signature, values: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The arrays in the model's order and data types.

    Raises:
        ClientError: a missing or unknown name, a value that its data type cannot hold, another shape, or
            unequal batches.
    """
    known = {tensor.name: tensor for tensor in signature.inputs}
    if unknown := [name for name in values if name not in known]:
        raise ClientError(
            f"model {signature.model!r} has no input {unknown[0]!r}", expected=_listed(signature.inputs)
        )
    missing = [t.name for t in signature.inputs if t.name not in values and not t.optional]
    if missing:
        raise ClientError(
            f"model {signature.model!r} needs input {missing[0]!r}",
            found=sorted(values) or "no inputs",
            expected=_listed(signature.inputs),
        )
    arrays = {name: _fit(signature, known[name], values[name]) for name in known if name in values}
    if signature.max_batch_size:
        _check_batch(signature, arrays)
    return arrays


def check_outputs(
    signature: Signature, outputs: Sequence[str] | None, classes: Mapping[str, int] | None
) -> dict[str, int]:
    """Name of each wanted output -> how many classes to answer for it (0: its numbers)."""
    if isinstance(outputs, str):
        raise ClientError("outputs is a string", found=outputs, expected="a list of output names")
    known = [tensor.name for tensor in signature.outputs]
    classes = classes or {}
    wanted = known if outputs is None else list(outputs)
    if unknown := [name for name in (*wanted, *classes) if name not in known]:
        raise ClientError(
            f"model {signature.model!r} has no output {unknown[0]!r}", expected=_listed(signature.outputs)
        )
    if not wanted:
        raise ClientError("no output is asked for", expected=_listed(signature.outputs))
    return {name: classes.get(name, 0) for name in wanted}


def split(signature: Signature, arrays: dict[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
    """The arrays in batches of at most `max_batch_size`."""
    size = signature.max_batch_size
    count = len(next(iter(arrays.values()))) if size and arrays else 0
    if count <= size:
        yield arrays
        return
    for start in range(0, count, size):
        yield {name: array[start : start + size] for name, array in arrays.items()}


def arrays_from_result(names: Iterable[str], result: InferResult) -> dict[str, NDArray[Any]]:
    """The named arrays of tritonclient's result; ClientError where one is left out or cut short."""
    arrays = {}
    for name in names:
        try:
            array = result.as_numpy(name)
        except ValueError as error:
            raise ClientError(f"the server answered a broken output {name!r}", found=error) from error
        if array is None:
            raise ClientError(f"the server answered without the output {name!r}")
        arrays[name] = array
    return arrays


def join(replies: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """The answers to the parts of a batch as one.

    Raises:
        ClientError: outputs of parts that differ in more than the batch axis.
    """
    if len(replies) == 1:  # a reply's arrays lie in its read-only message
        return {name: array if array.flags.writeable else array.copy() for name, array in replies[0].items()}
    joined = {}
    for name in replies[0]:
        parts = [reply[name] for reply in replies]
        shapes = {part.shape[1:] for part in parts}
        if len(shapes) > 1:
            raise ClientError(
                f"the batch was sent in {len(parts)} requests, whose answers for {name!r} cannot be joined",
                found=f"shapes {sorted(shapes)} behind the batch axis",
                fix="send at most max_batch_size samples in one call",
            )
        joined[name] = np.concatenate(parts)
    return joined


def _fit(signature: Signature, tensor: Tensor, value: Any) -> NDArray[Any]:
    where = f"model {signature.model!r}, input {tensor.name!r}"
    try:
        array = _array(tensor, value)
    except (ValueError, OverflowError) as error:
        raise ClientError(f"{where} cannot be made an array", found=error, expected=str(tensor)) from error
    if tensor.datatype == "BYTES":
        array = _bytes(where, array)
    else:
        array = _numbers(where, tensor, array, rounding=not isinstance(value, (np.ndarray, np.generic)))
    fits = array.ndim == len(tensor.shape) and all(
        want in (-1, have) for want, have in zip(tensor.shape, array.shape, strict=True)
    )
    if not fits:
        lacks_batch = bool(signature.max_batch_size) and array.ndim == len(tensor.shape) - 1
        raise ClientError(
            f"{where} has another shape",
            found=list(array.shape),
            expected=f"{tensor} (? is any size)",
            fix=f"one sample is a batch of one: pass {tensor.name}[None]" if lacks_batch else None,
        )
    return array


def _array(tensor: Tensor, value: Any) -> NDArray[Any]:
    """numpy's array of a value, save where numpy's choice would change what a list holds."""
    if isinstance(value, np.ndarray):
        return value
    if tensor.datatype == "BYTES":  # an S array drops trailing NULs
        return np.asarray(value, dtype=object)
    array = np.asarray(value)
    if tensor.datatype == "UINT64" and array.dtype == np.float64:  # so does a list with 0 and 2**64 - 1
        integers = np.asarray(value, dtype=object)
        if all(isinstance(item, int) for item in integers.flat):
            return integers
    return array


def _bytes(where: str, array: NDArray[Any]) -> NDArray[Any]:
    """Strings as UTF-8 in an object array of bytes; numpy's S arrays have lost their trailing NULs."""
    if array.size and array.dtype.kind not in "OSU":
        raise ClientError(f"{where} is not text", found=f"{array.dtype} array", expected="str or bytes")
    items = array.ravel().tolist()
    wrong = [item for item in items if not isinstance(item, (bytes, str))]
    if wrong:
        raise ClientError(f"{where} is not text", found=repr(wrong[0]), expected="str or bytes")
    try:
        encoded = [item.encode() if isinstance(item, str) else item for item in items]
    except UnicodeEncodeError as error:  # a lone surrogate
        raise ClientError(f"{where} is not text", found=error, expected="str that UTF-8 can hold") from error
    return np.fromiter(encoded, object, len(items)).reshape(array.shape)


def _numbers(where: str, tensor: Tensor, array: NDArray[Any], *, rounding: bool) -> NDArray[Any]:
    """The numbers in the tensor's data type, unless one of them would change.

    With `rounding`, floats may lose digits: Python's own have no smaller type to come in.
    """
    wanted = np.dtype(triton_to_np_dtype(tensor.datatype))
    if array.dtype == wanted or array.size == 0:
        return array.astype(wanted, copy=False)
    if array.dtype.kind == "O" and wanted.kind in "iu":
        array = _wide_integers(array)
    allowed = {"b": "b", "i": "iu", "u": "iu"}.get(wanted.kind, "fiu")  # ml_dtypes.bfloat16 is of kind V
    if array.dtype.kind not in allowed:
        raise ClientError(f"{where} has another data type", found=array.dtype, expected=str(tensor))
    with np.errstate(all="ignore"):
        converted = array.astype(wanted)
        changed = _changed(array, converted, rounding=rounding)
    if changed.any():
        raise ClientError(
            f"{where}: {wanted} cannot hold every value",
            found=f"{array.dtype} array with {array[changed].flat[0]}",
            expected=str(tensor),
            fix=f"convert it yourself where the loss is meant: {tensor.name}.astype({wanted.name!r})",
        )
    return converted


def _wide_integers(array: NDArray[Any]) -> NDArray[Any]:
    """Python integers of which some fit uint64 and not int64; as they came where that is not the case."""
    fits = all(isinstance(item, int) and 0 <= item < 2**64 for item in array.flat)
    return array.astype(np.uint64) if fits else array


def _changed(array: NDArray[Any], converted: NDArray[Any], *, rounding: bool) -> NDArray[np.bool_]:
    """Where a value is not what it was before the conversion."""
    if converted.dtype.kind in "iu":
        limits = np.iinfo(converted.dtype)
        return np.asarray((array < int(limits.min)) | (array > int(limits.max)))
    back = converted.astype(array.dtype)
    if array.dtype.kind == "f" and rounding:
        return np.asarray(np.isfinite(back) != np.isfinite(array))
    return np.asarray((back != array) & ((back == back) | (array == array)))


def _check_batch(signature: Signature, arrays: Mapping[str, NDArray[Any]]) -> None:
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise ClientError(
            f"model {signature.model!r}: inputs of unequal batch", found=counts, expected="one size"
        )
    if 0 in counts.values():
        raise ClientError(f"model {signature.model!r}: a batch of no samples", expected="at least one")


def _listed(tensors: tuple[Tensor, ...]) -> str:
    return "; ".join(str(tensor) + (" (optional)" if tensor.optional else "") for tensor in tensors)
