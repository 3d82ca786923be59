"""Reading and writing ONNX files by path, whatever their size, and what their signature says."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError

from tritonsmith import dtypes
from tritonsmith.artifact import BATCH_AXIS, TensorSpec, sha256_of
from tritonsmith.errors import RepositoryError, SourceError

# protobuf cannot serialize a message of 2 GiB; stay clear of it.
EXTERNAL_DATA_THRESHOLD_BYTES = 1_800_000_000
DATA_SUFFIX = ".data"
EMBEDDED_BYTES = 1024  # smaller weights stay in the .onnx file itself
ALIGNMENT_BYTES = 4096  # so that a runtime can map each weight
CHUNK_BYTES = 1 << 24


def load_model(path: Path, *, with_weights: bool = True) -> onnx.ModelProto:
    """Read an ONNX file, with the external data beside it unless `with_weights` is False."""
    if not path.is_file():
        raise SourceError(f"{path} is no file", expected="an ONNX model")
    if path.stat().st_size == 0:
        raise SourceError(f"{path} is empty", expected="an ONNX model")
    try:
        model = onnx.load(str(path), load_external_data=with_weights)
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as ONNX", found=_first_line(error)) from error
    if not model.graph.node and not model.graph.output:
        raise SourceError(f"{path} cannot be read as ONNX", found="no graph in it", expected="an ONNX model")
    return model


def is_large(path: Path) -> bool:
    """Whether the model with its weights comes near what one protobuf message can hold."""
    return model_bytes(path) >= EXTERNAL_DATA_THRESHOLD_BYTES


def load_editable(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its weights, or, where it is large, with weights still in their files.

    Such a model can be saved again by `save_model` with `weights_from`.
    """
    return load_model(path, with_weights=not is_large(path))


def save_model(
    model: onnx.ModelProto, path: Path, *, weights_from: Path | None = None, data_name: str | None = None
) -> None:
    """Write an ONNX file; where it would pass 2 GB its weights go to one file beside it.

    That file is `data_name`, by default `<name>.data`. Weights that the model still keeps in other
    files are copied from the folder `weights_from`, without reading them into memory. The model in
    memory is left without its weights then.

    Raises:
        RepositoryError: the disk is full or the folder cannot be written.
    """
    stays_outside = any(_external_location(tensor) for tensor in _tensors(model))
    try:
        if stays_outside or _weight_bytes(model) >= EXTERNAL_DATA_THRESHOLD_BYTES:
            _move_weights(model, path.parent / (data_name or path.name + DATA_SUFFIX), weights_from)
        onnx.save(model, str(path))
    except OSError as error:
        raise RepositoryError(f"cannot write {path}", found=error.strerror or error) from error


def check_file(path: Path) -> None:
    """Raise SourceError where a file breaks ONNX's own rules; read by path, whatever its size."""
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise SourceError(f"{path.name} is no valid ONNX model", found=_first_line(error)) from error


def model_files(path: Path) -> tuple[Path, ...]:
    """The file and every external data file that it names; each lies inside the file's own folder."""
    model = load_model(path, with_weights=False)
    folder = path.absolute().parent
    names = sorted({name for tensor in _tensors(model) if (name := _external_location(tensor))})
    files = [path]
    for name in names:
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise SourceError(
                f"{path} keeps weights outside of its folder", found=name, expected=f"a file in {folder}"
            )
        if not file.is_file():
            raise SourceError(f"{path} keeps weights in a file that is missing", found=name)
        files.append(file)
    return tuple(files)


def copy_model(path: Path, target: Path) -> Path:
    """Copy a model with its data files, which keep their names, to `target`, the model itself last."""
    first, *others = model_files(path)
    for file in others:
        shutil.copyfile(file, target.parent / file.name)
    shutil.copyfile(first, target)
    return target


def copy_renamed(path: Path, target: Path) -> Path:
    """Copy a model to `target` with its data in `<target>.data`, so that several can lie in one folder."""
    if len(model_files(path)) == 1:
        shutil.copyfile(path, target)
    else:
        save_model(load_model(path, with_weights=False), target, weights_from=path.parent)
    return target


def model_bytes(path: Path) -> int:
    """Bytes on disk of the model with its external data."""
    return sum(file.stat().st_size for file in model_files(path))


def model_sha256(path: Path) -> str:
    """The SHA-256 of the file; with external data, of the names and SHA-256s of all its files."""
    files = model_files(path)
    if len(files) == 1:
        return sha256_of(path)
    lines = "".join(f"{file.name} {sha256_of(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def signature_of(model: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs (without those that an initializer already feeds) and the outputs of a graph."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(_spec(value) for value in model.graph.input if value.name not in weights)
    return inputs, tuple(_spec(value) for value in model.graph.output)


def is_batched(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> bool:
    """Whether axis 0 of every input and output is the batch axis."""
    specs = inputs + outputs
    return bool(inputs) and all(spec.shape[:1] == (BATCH_AXIS,) for spec in specs)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the default operator set that the model imports."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def precision_of(model: onnx.ModelProto) -> str:
    """The precision that most weight bytes are kept in: "int8" where they are dequantized, "fp16", "fp32"."""
    quantized = {"DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
    if any(node.op_type in quantized for node in model.graph.node):
        return "int8"
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    counts = {True: 0, False: 0}
    for tensor in _tensors(model):
        if tensor.data_type in (*halves, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            counts[tensor.data_type in halves] += math.prod(tensor.dims)
    return "fp16" if counts[True] > counts[False] else "fp32"


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    if not value.type.HasField("tensor_type"):
        kind = value.type.WhichOneof("value")
        raise SourceError(f"{value.name!r} is a {kind}, which Triton cannot serve", expected="a tensor")
    tensor = value.type.tensor_type
    data_type = dtypes.BY_ONNX.get(tensor.elem_type)
    if data_type is None:
        name = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise SourceError(f"tensor {value.name!r} has a data type that Triton cannot serve", found=name)
    if not tensor.HasField("shape"):
        raise SourceError(
            f"tensor {value.name!r} has no rank", expected="a shape, with free axes where needed"
        )
    axes: list[int | str] = []
    for index, dim in enumerate(tensor.shape.dim):
        axes.append(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_{index}")
    return TensorSpec(name=value.name, dtype=data_type.name, shape=tuple(axes))


def _tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    tensors = list(model.graph.initializer)
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    tensors.append(attribute.t)
                elif attribute.type == onnx.AttributeProto.GRAPH:
                    tensors.extend(attribute.g.initializer)
                    graphs.append(attribute.g)
    return tensors


def _external_location(tensor: onnx.TensorProto) -> str | None:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), None)


def _move_weights(model: onnx.ModelProto, target: Path, weights_from: Path | None) -> None:
    """Put every weight of some size into one file and point the model to it."""
    with target.open("wb") as stream:
        for tensor in _tensors(model):
            location = _external_location(tensor)
            if location is None and len(tensor.raw_data) < EMBEDDED_BYTES:
                continue
            stream.write(bytes(-stream.tell() % ALIGNMENT_BYTES))
            offset = stream.tell()
            if location is None:
                stream.write(tensor.raw_data)
            elif weights_from is None:
                raise ValueError(f"{tensor.name!r} keeps its weights in {location}, of an unknown folder")
            else:
                _copy_part(weights_from / location, tensor, stream)
            length = stream.tell() - offset
            tensor.raw_data = b""  # set_external_data wants the field, and nothing in it
            onnx.external_data_helper.set_external_data(tensor, target.name, offset, length)
            tensor.ClearField("raw_data")


def _copy_part(path: Path, tensor: onnx.TensorProto, target: BinaryIO) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    with path.open("rb") as source:
        source.seek(int(entries.get("offset", 0)))
        left = int(entries.get("length", path.stat().st_size - source.tell()))
        while left:
            chunk = source.read(min(left, CHUNK_BYTES))
            if not chunk:
                raise SourceError(
                    f"{path} ends inside of weight {tensor.name!r}", found=f"{left} bytes missing"
                )
            target.write(chunk)
            left -= len(chunk)


def _weight_bytes(model: onnx.ModelProto) -> int:
    return sum(len(tensor.raw_data) or tensor.ByteSize() for tensor in _tensors(model))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
