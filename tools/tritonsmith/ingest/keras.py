"""Keras 2 and Keras 3 models, from `.h5` and `.keras` files.

Inputs go by the names of their Input layers. Outputs go by their keys where the model answers with a
dictionary, otherwise by the names of the layers that compute them, with a number added where one layer
computes several. A subclassed model has neither: its inputs go by the arguments of `call` (or the keys
of a dictionary), its outputs by their keys, or by "output", or "output_0", "output_1" and so on.

Files of Keras 2 are read by tf_keras, which is Keras 2, unless the custom objects are Keras 3's.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from tritonsmith.artifact import Json
from tritonsmith.errors import SourceError, UsageError
from tritonsmith.ingest.keras_file import (
    KerasFile,
    copy_in_float32,
    mixed_policy_of,
    read_keras_file,
    refuse_code,
    refuse_foreign,
)
from tritonsmith.ingest.keras_gru import traceable_gru
from tritonsmith.ingest.keras_signature import flat_function_of
from tritonsmith.ingest.source import ConvertOptions, Exported
from tritonsmith.ingest.tensorflow_export import export_flat
from tritonsmith.ingest.tensorflow_framework import first_line, import_framework
from tritonsmith.user_code import import_user_module

# The modules of Keras whose contents a file may name without saying where they are.
NAMED_PARTS = (
    *("layers", "models", "activations", "initializers", "regularizers"),
    *("constraints", "losses", "metrics", "ops"),
)
# What Keras says, as a warning, of layers that keep fresh random weights.
LOST_WEIGHTS = ("cannot be built", "freshly", "Could not load weights", "could not be loaded")


def export_keras(source: Path, folder: Path, options: ConvertOptions) -> Exported:
    """Export a Keras file to `folder/raw.onnx`; its own model, in inference mode, is the reference.

    A model trained under a mixed-precision policy is loaded in float32.

    Raises:
        SourceError: the file cannot be read, holds code without `allow_code`, uses a class that
            `custom_objects` does not supply, keeps state between calls, or cannot be converted.
        MissingExtraError: TensorFlow, Keras, tf_keras or tf2onnx is not installed.
        UsageError: `custom_objects` names no module.
    """
    file = read_keras_file(source)
    if not options.allow_code:
        refuse_code(file)
    import_framework("tensorflow", source)
    custom = _import_custom_objects(options.custom_objects)
    keras = import_framework(_framework_for(file, custom), source)
    names = frozenset(custom) | frozenset(keras.saving.get_custom_objects())
    refuse_foreign(file, _own_names(keras), names)
    policy = mixed_policy_of(file)
    model = _load(keras, copy_in_float32(file, folder) if policy else source, file, custom, options)
    layers = _prepare_layers(model, source)
    count = len(model.weights)
    function = flat_function_of(model, keras, source, while_traced=_tracing(keras, layers))
    notes: dict[str, Json] = {"keras_version": file.keras_version, "loaded_with": keras.__name__}
    if policy:
        notes["policy"] = f"{policy}, loaded in float32"
    exported = export_flat(function, folder, options, kind="keras", notes=notes)
    if len(model.weights) != count:
        raise _lost_weights(source, f"{len(model.weights)} weights in use, {count} of them from the file")
    return exported


def _own_names(keras: Any) -> frozenset[str]:
    """What a file may name without a module: the layers, models and functions of Keras itself."""
    parts = [getattr(keras, name) for name in NAMED_PARTS if hasattr(keras, name)]
    return frozenset(name for part in parts for name in dir(part)) | {"Functional"}


def _import_custom_objects(name: str | None) -> Mapping[str, Any]:
    """The public classes and functions of a module, by name; importing it may register more."""
    if name is None:
        return {}
    module = import_user_module(name, f"--custom-objects {name}", UsageError)
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
    }


def _framework_for(file: KerasFile, custom: Mapping[str, Any]) -> str:
    if not file.is_keras_2:
        return "keras"
    bases = {
        base.__module__.partition(".")[0] for item in custom.values() for base in getattr(item, "__mro__", ())
    }
    return "keras" if "keras" in bases else "tf_keras"


def _load(keras: Any, path: Path, file: KerasFile, custom: Mapping[str, Any], options: ConvertOptions) -> Any:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = keras.models.load_model(
                path, custom_objects=dict(custom), compile=False, safe_mode=not options.allow_code
            )
    except Exception as error:
        raise SourceError(
            f"{file.path} cannot be loaded by {keras.__name__} {keras.__version__}",
            found=first_line(error),
            expected=f"a model that Keras {file.keras_version} saved",
            fix="if a class or function is missing, add --custom-objects package.module; "
            "otherwise load it where it was made and save it as .keras",
        ) from error

    for warning in caught:
        if any(sign in str(warning.message) for sign in LOST_WEIGHTS):
            raise _lost_weights(file.path, " ".join(str(warning.message).split())[:300])
    return model


def _lost_weights(source: Path, found: str) -> SourceError:
    """Keras leaves a layer that it could not restore with fresh random weights, and only warns."""
    return SourceError(
        f"{source} holds weights that Keras could not give back to their layers",
        found=found,
        fix="create the layers' weights in build(), or wrap the model in a functional one before saving",
    )


def _prepare_layers(model: Any, source: Path) -> list[Any]:
    """All layers, however deep, without cuDNN's kernels, which ONNX does not have."""
    # Keras has no public walk into wrappers such as Bidirectional.
    layers = list(model._flatten_layers())
    for layer in layers:
        if getattr(layer, "stateful", False) is True and not hasattr(layer, "layers"):
            raise SourceError(
                f"{source} keeps state between calls",
                found=f"layer {layer.name!r} is stateful",
                expected="a model whose answer depends on its inputs alone",
                fix="rebuild it with stateful=False, load the weights, and save it again",
            )
        if hasattr(layer, "use_cudnn"):
            layer.use_cudnn = False
    return layers


def _tracing(keras: Any, layers: list[Any]) -> Any:
    if keras.__name__ != "keras":
        return nullcontext

    import tensorflow

    return partial(traceable_gru, layers, keras, tensorflow)
