"""Reading and writing ONNX files by path, whatever their size, and what their signature says."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from tritonsmith import dtypes
from tritonsmith.artifact import BATCH_AXIS, TensorSpec, sha256_of
from tritonsmith.errors import SourceError

# protobuf cannot serialize a message of 2 GiB; stay clear of it.
EXTERNAL_DATA_THRESHOLD_BYTES = 1_800_000_000
DATA_SUFFIX = ".data"


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


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write an ONNX file; weights go to `<name>.data` beside it where the file would pass 2 GB."""
    if _weight_bytes(model) < EXTERNAL_DATA_THRESHOLD_BYTES:
        onnx.save(model, str(path))
        return
    onnx.save(
        model,
        str(path),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=path.name + DATA_SUFFIX,
        size_threshold=1024,
    )


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


def _weight_bytes(model: onnx.ModelProto) -> int:
    return sum(len(tensor.raw_data) or tensor.ByteSize() for tensor in _tensors(model))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
