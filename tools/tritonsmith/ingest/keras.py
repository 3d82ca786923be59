"""Keras 2 and Keras 3 models, from `.h5` and `.keras` files.

Inputs go by the names of their Input layers, outputs by their keys where the model answers with a
dictionary and by the names of the layers that compute them otherwise. Where one layer computes
several, a number is added. A subclassed model has no such layers: its inputs go by the names of the arguments of
`call`, its outputs by "output", or "output_0", "output_1" and so on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tritonsmith.ingest.keras_file import (
    KerasFile,
    copy_in_float32,
    mixed_policy_of,
    read_keras_file,
    refuse_code,
    refuse_unknown_classes,
)
from tritonsmith.ingest.source import ConvertOptions, Exported
from tritonsmith.ingest.tensorflow_export import FlatFunction, Port, export_flat, import_framework


def export_keras(source: Path, folder: Path, options: ConvertOptions) -> Exported:
    """Export a Keras file to `folder/raw.onnx`.

    Raises:
        SourceError: the file cannot be read, holds code without `allow_code`, or uses a class that
            `custom_objects` does not supply; or tf2onnx cannot convert it.
        MissingExtraError: TensorFlow, Keras, tf_keras or tf2onnx is not installed.
    """
    file = read_keras_file(source)
    if not options.allow_code:
        refuse_code(file)
    refuse_unknown_classes(file, frozenset())
    keras = import_framework("tf_keras" if file.is_keras_2 else "keras", source)
    policy = mixed_policy_of(file)
    path = copy_in_float32(file, folder) if policy else source
    model = keras.models.load_model(path, compile=False, safe_mode=not options.allow_code)
    return export_flat(
        _flat(model, file, keras), folder, options, kind="keras", notes={"keras_version": file.keras_version}
    )


def _flat(model: Any, file: KerasFile, keras: Any) -> FlatFunction:
    inputs = tuple(
        Port(name=name, dtype=keras.backend.standardize_dtype(t.dtype), shape=tuple(t.shape))
        for name, t in zip([t._keras_history.operation.name for t in model.inputs], model.inputs, strict=True)
    )
    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input

    def call(tensors: list[Any]) -> list[Any]:
        packed = keras.tree.pack_sequence_as(structure, tensors)
        return keras.tree.flatten(model(packed, training=False))

    names = tuple(t._keras_history.operation.name for t in model.outputs)
    return FlatFunction(source=file.path, inputs=inputs, output_names=names, call=call)
