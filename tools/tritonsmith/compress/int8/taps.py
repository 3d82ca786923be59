"""Tensors inside of a graph, read while it runs on real inputs a few rows at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tritonsmith import onnx_model
from tritonsmith.compress.calibration import chunks
from tritonsmith.engines.onnxruntime import open_onnxruntime
from tritonsmith.errors import CompressionError, EngineError
from tritonsmith.samples import Samples

Tensors = Mapping[str, NDArray[Any]]

# Bounds memory: the tensors of one run that are read live at once, beside what the engine needs itself.
TAPPED_BYTES = 128 << 20


def float_tensors(graph: onnx.GraphProto) -> set[str]:
    """Names of the float32 inputs and results of nodes, as far as types were inferred."""
    values = [*graph.input, *graph.value_info, *graph.output]
    weights = {tensor.name for tensor in graph.initializer}
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    return {name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT} - weights


def run_tapped(
    path: Path, names: Sequence[str], samples: Samples, *, batched: bool
) -> Iterator[tuple[int, Tensors]]:
    """Run the model on all samples; yield the count of rows and the tensors `names` of each run.

    The model's external data lie beside it. Each run holds about `TAPPED_BYTES` of tensors at most.

    Raises:
        CompressionError: ONNX Runtime refuses the graph or its inputs.
    """
    inputs = {value.name for value in onnx_model.load_model(path, with_weights=False).graph.input}
    inner = [name for name in names if name not in inputs]
    session = _open_tapped(path, inner)
    rows = 1
    start = 0
    while start < samples.count:
        part = _rows(samples, start, start + rows)
        for feeds in chunks(part, batched=batched):
            count = len(next(iter(feeds.values()))) if batched else 1
            try:
                found = session.run(feeds) if inner else {}
            except EngineError as error:
                raise CompressionError(f"{path.name} cannot be run", found=error.found) from error
            taken = {name: feeds[name] if name in inputs else found[name] for name in names}
            yield count, taken
            row_bytes = sum(array.nbytes for array in taken.values()) / count
        start += part.count
        rows = int(np.clip(TAPPED_BYTES / max(1.0, row_bytes), 1, samples.count)) if batched else 1


def _rows(samples: Samples, start: int, stop: int) -> Samples:
    arrays = {name: array[start:stop] for name, array in samples.arrays.items()}
    return Samples(path=samples.path, sha256=samples.sha256, arrays=arrays, target=None)


def _open_tapped(path: Path, names: Sequence[str]) -> Any:
    model = onnx_model.load_model(path, with_weights=False)
    given = {value.name for value in model.graph.output}
    types = {value.name: value for value in model.graph.value_info}
    for name in names:
        if name not in given:
            model.graph.output.append(types.get(name) or onnx.ValueInfoProto(name=name))
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="tapped-", suffix=".onnx") as stream:
        onnx.save(model, stream.name)
        try:
            return open_onnxruntime(Path(stream.name))
        except EngineError as error:
            raise CompressionError(f"ONNX Runtime refuses {path.name}", found=error.found) from error
