"""One request from the command line: inputs from text and files, the answer for a reader or a program."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritonsmith.artifact import Json
from tritonsmith.client import Client, Signature, Tensor
from tritonsmith.errors import ClientError, UsageError

CLASS_COUNT = 5
PRECISION_DIGITS = 5
SCALAR_DIGITS = 6
# Longer arrays are shortened to their first and last values.
FULL_VALUES_COUNT = 40
EDGE_VALUES_COUNT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Class:
    """One of the best classes of an output."""

    index: int
    label: str | None  # None where the server has no name for it
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One output: its array or, where the server knows labels, the best classes of each sample."""

    name: str
    datatype: str
    answer: NDArray[Any] | tuple[tuple[Class, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server answered to one request; `latency_ms` is what the client waited."""

    model: str
    latency_ms: float
    outputs: tuple[Output, ...]

    def __str__(self) -> str:
        lines = []
        for output in self.outputs:
            lines.append(f"{output.name} ({output.datatype})")
            answer = output.answer
            text = _classes_text(answer) if isinstance(answer, tuple) else _array_text(answer)
            lines += [f"  {line}" for line in text.splitlines()]
        return "\n".join([*lines, f"({self.model} answered in {self.latency_ms:.1f} ms)"])

    def json(self) -> dict[str, Json]:
        return {
            "model": self.model,
            "latency_ms": self.latency_ms,
            "outputs": {output.name: _output_json(output) for output in self.outputs},
        }


def infer(
    name: str,
    inputs: Sequence[str],
    *,
    url: str,
    protocol: str | None = None,
    version: int | None = None,
    timeout_s: float = 60.0,
) -> Answer:
    """Send one request to a running server.

    Args:
        inputs: `NAME=VALUE` each; a value is text for an input of strings, else a number or a JSON array.
            `NAME=@FILE` takes a file: .npy and .json as arrays, any other as its bytes. The batch axis and
            other leading axes of size 1 may be left out.

    Raises:
        UsageError: an input that is no `NAME=VALUE`, is given twice, or cannot be read as its type.
        ClientError: what the model does not take, or a server that does not answer.
    """
    with Client(url, protocol=protocol, timeout_s=timeout_s) as client:
        model = client.model(name, version)
        arrays = parse_inputs(model.signature, inputs)
        labelled = {tensor.name: CLASS_COUNT for tensor in model.signature.outputs if tensor.labelled}
        started = time.perf_counter()
        answer = model(arrays, classes=labelled)
        latency_ms = (time.perf_counter() - started) * 1e3
    return Answer(
        model=name,
        latency_ms=latency_ms,
        outputs=tuple(
            _output(model.signature, tensor, answer[tensor.name]) for tensor in model.signature.outputs
        ),
    )


def parse_inputs(signature: Signature, inputs: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` texts as what the client takes; see `infer`."""
    tensors = {tensor.name: tensor for tensor in signature.inputs}
    parsed: dict[str, Any] = {}
    for text in inputs:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"{text!r} is no input", expected="NAME=VALUE or NAME=@FILE")
        if name in parsed:
            raise UsageError(f"input {name!r} is given twice")
        if name not in tensors:
            raise ClientError(
                f"model {signature.model!r} has no input {name!r}",
                expected="; ".join(map(str, tensors.values())),
            )
        parsed[name] = _with_leading_axes(tensors[name], _parse(tensors[name], value))
    return parsed


def _parse(tensor: Tensor, value: str) -> Any:
    if value.startswith("@"):
        return _read(tensor, Path(value[1:]))
    if tensor.datatype == "BYTES" and value[:1] not in ("[", '"'):
        return value
    return _from_json(tensor, value, f"input {tensor.name!r}")


def _read(tensor: Tensor, path: Path) -> Any:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        content = path.read_bytes()
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"input {tensor.name!r}: {path} cannot be read", found=error) from error
    if path.suffix == ".json":
        return _from_json(tensor, content.decode(errors="replace"), str(path))
    if tensor.datatype == "BYTES":
        return np.array([content, None], dtype=object)[:1]  # alone, bytes would become an S array
    if tensor.datatype == "UINT8":
        return np.frombuffer(content, np.uint8)
    raise UsageError(
        f"input {tensor.name!r} cannot take the bytes of {path}",
        expected=f"{tensor}, from .npy or .json",
        fix="send the file to an ensemble that decodes it",
    )


def _from_json(tensor: Tensor, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"{where} is no number or JSON array", found=text[:60], expected=f"{tensor}, such as [1, 2]"
        ) from error


def _with_leading_axes(tensor: Tensor, value: Any) -> Any:
    """The value with the leading axes of size 1 that it lacks, by nesting: the client makes the array."""
    missing = len(tensor.shape) - _rank(value)
    for _ in range(missing):
        value = value[None] if isinstance(value, np.ndarray) else [value]
    return value


def _rank(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.ndim
    return 1 + (_rank(value[0]) if value else 0) if isinstance(value, list) else 0


def _output(signature: Signature, tensor: Tensor, array: NDArray[Any]) -> Output:
    if not tensor.labelled:
        return Output(name=tensor.name, datatype=tensor.datatype, answer=array)
    rows = array if signature.max_batch_size else array[None]
    classes = tuple(tuple(_class(item) for item in row) for row in rows.reshape(len(rows), -1))
    return Output(name=tensor.name, datatype=tensor.datatype, answer=classes)


def _class(item: bytes) -> Class:
    value, index, *label = item.decode(errors="replace").split(":", 2)
    return Class(index=int(index), label=label[0] if label else None, value=float(value))


def _classes_text(rows: tuple[tuple[Class, ...], ...]) -> str:
    blocks = []
    for row in rows:
        names = [item.label if item.label is not None else f"class {item.index}" for item in row]
        width = max(map(len, names), default=0)
        blocks.append(
            "\n".join(f"{name:<{width}}  {item.value:.4f}" for name, item in zip(names, row, strict=True))
        )
    return "\n\n".join(blocks)


def _array_text(array: NDArray[Any]) -> str:
    if array.size == 0:
        return f"empty, of shape {list(array.shape)}"
    if array.dtype == object:
        return "\n".join(_text(item) for item in array.ravel())
    if array.dtype.kind == "V":  # ml_dtypes.bfloat16
        array = array.astype(np.float32)
    if array.size == 1:
        value = array.ravel()[0]
        return f"{value:.{SCALAR_DIGITS}g}" if array.dtype.kind == "f" else str(value)
    values = np.array2string(
        array,
        precision=PRECISION_DIGITS,
        threshold=FULL_VALUES_COUNT,
        edgeitems=EDGE_VALUES_COUNT,
        floatmode="maxprec",
        max_line_width=100,
    )
    return f"{values}\nshape {list(array.shape)}"


def _output_json(output: Output) -> dict[str, Json]:
    if isinstance(output.answer, tuple):
        rows = [
            [{"index": item.index, "label": item.label, "value": item.value} for item in row]
            for row in output.answer
        ]
        return {"datatype": output.datatype, "classes": rows}
    array = output.answer
    if array.dtype.kind == "V":
        array = array.astype(np.float32)
    data = [_plain(item) for item in array.ravel().tolist()]
    return {"datatype": output.datatype, "shape": list(array.shape), "data": data}


def _plain(item: Any) -> Json:
    """A value that JSON can hold; NaN and infinities go by their names."""
    if isinstance(item, bytes):
        return _text(item)
    if isinstance(item, float) and not math.isfinite(item):
        return str(item)
    plain: Json = item
    return plain


def _text(item: bytes) -> str:
    return item.decode(errors="backslashreplace")
