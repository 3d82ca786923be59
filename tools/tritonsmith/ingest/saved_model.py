"""TensorFlow SavedModel folders, from Keras's `model.export`, `tf.saved_model.save` or TensorFlow 1.

Inputs and outputs go by the keys of the signature that is served, `serving_default` or the only one, in
alphabetical order: the file keeps none.
A signature keeps its own axes: without a free first axis there is no batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tritonsmith import dtypes
from tritonsmith.errors import SourceError
from tritonsmith.ingest.source import ConvertOptions, Exported
from tritonsmith.ingest.tensorflow_export import FlatFunction, Port, export_flat, refuse_outside
from tritonsmith.ingest.tensorflow_framework import first_line, import_framework

GRAPH_FILES = ("saved_model.pb", "saved_model.pbtxt")
DEFAULT_SIGNATURE = "serving_default"
INITIALIZER_SIGNATURE = "__saved_model_init_op"


def export_saved_model(source: Path, folder: Path, options: ConvertOptions) -> Exported:
    """Export the signature of a SavedModel folder to `folder/raw.onnx`; the signature is the reference.

    Raises:
        SourceError: the folder is no SavedModel, is damaged, has no signature or several and none of
            them `serving_default`, or cannot be converted.
        MissingExtraError: TensorFlow or tf2onnx is not installed.
    """
    if not source.is_dir():
        raise SourceError(f"{source} is no folder", expected="a SavedModel folder")
    graphs = [source / name for name in GRAPH_FILES if (source / name).is_file()]
    if not graphs:
        raise SourceError(f"{source} is no SavedModel", expected=f"{GRAPH_FILES[0]} in it")
    if graphs[0].stat().st_size == 0:
        raise SourceError(f"{graphs[0]} is empty", expected="a SavedModel")
    tf = import_framework("tensorflow", source)
    _check_graphs(source, graphs[0])
    loaded = _load(tf, source)
    key = _pick_signature(source, loaded)
    function = _flat_signature(source, key, loaded)
    return export_flat(function, folder, options, kind="saved-model", notes={"signature": key})


def _check_graphs(source: Path, file: Path) -> None:
    """Read the graphs without running them: loading alone would run a SavedModel's initializer."""
    from google.protobuf import text_format
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel()
    try:
        if file.suffix == ".pb":
            model.ParseFromString(file.read_bytes())
        else:
            text_format.Parse(file.read_text(encoding="utf-8"), model)
    except (DecodeError, text_format.ParseError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{file} cannot be read as a SavedModel; is it truncated?", found=first_line(error)
        ) from error
    if not model.meta_graphs:
        raise SourceError(f"{file} holds no graph", expected="a SavedModel")
    for graph in model.meta_graphs:
        refuse_outside(source, graph.graph_def)


def _load(tf: Any, source: Path) -> Any:
    try:
        return tf.saved_model.load(str(source))
    except Exception as error:
        raise SourceError(
            f"{source} cannot be loaded as a SavedModel", found=first_line(error), fix="save it again"
        ) from error


def _pick_signature(source: Path, loaded: Any) -> str:
    keys = sorted(str(key) for key in loaded.signatures if key != INITIALIZER_SIGNATURE)
    if DEFAULT_SIGNATURE in keys:
        return DEFAULT_SIGNATURE
    if len(keys) == 1:
        return keys[0]
    raise SourceError(
        f"{source} does not say which of its functions is served",
        found=f"signatures {', '.join(keys)}" if keys else "no signature",
        expected=f"one signature, or one named {DEFAULT_SIGNATURE}",
        fix=f"save it with tf.saved_model.save(..., signatures={{{DEFAULT_SIGNATURE!r}: function}})",
    )


def _flat_signature(source: Path, key: str, loaded: Any) -> FlatFunction:
    signature = loaded.signatures[key]
    _, specs = signature.structured_input_signature
    ports = tuple(_port(source, name, spec) for name, spec in sorted(specs.items()))
    names = tuple(sorted(signature.structured_outputs))

    def call(tensors: list[Any]) -> list[Any]:
        # `loaded` owns the variables; without it here they would be gone by the first call.
        answers = loaded.signatures[key](
            **{port.name: tensor for port, tensor in zip(ports, tensors, strict=True)}
        )
        return [answers[name] for name in names]

    return FlatFunction(source=source, inputs=ports, output_names=names, call=call)


def _port(source: Path, name: str, spec: Any) -> Port:
    if spec.dtype.name not in dtypes.BY_NAME:
        raise SourceError(
            f"{source}: input {name!r} has a data type that Triton cannot serve", found=spec.dtype.name
        )
    if spec.shape.rank is None:
        raise SourceError(
            f"{source}: input {name!r} has no rank",
            expected="a shape, with None for free axes",
            fix="save it with a signature that has one",
        )
    return Port(name=name, dtype=spec.dtype.name, shape=tuple(spec.shape.as_list()))
