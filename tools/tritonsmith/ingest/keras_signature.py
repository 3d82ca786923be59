"""What a loaded Keras model takes and gives, by name, as a function on flat lists of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tritonsmith import dtypes
from tritonsmith.errors import SourceError
from tritonsmith.ingest.tensorflow_export import FlatFunction, Port, Shape
from tritonsmith.ingest.tensorflow_framework import first_line

Call = Callable[[list[Any]], Any]
ARGUMENT = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
INTEGERS = ("int32", "int64", "bool", "uint8", "int8", "int16", "uint16", "uint32", "uint64")


def flat_function_of(
    model: Any, keras: Any, source: Path, *, while_traced: Callable[[], AbstractContextManager[None]]
) -> FlatFunction:
    """The inference of a functional, Sequential or subclassed model.

    Raises:
        SourceError: an input has a data type that cannot be served, or a subclassed model was saved
            before it knew its inputs.
    """
    if getattr(model, "inputs", None):
        ports, call = _graph_inputs(model, keras, source)
        names = _graph_outputs(model, keras)
    else:
        ports, call, names = _call_signature(model, keras, source)
    return FlatFunction(
        source=source,
        inputs=ports,
        output_names=_separate(names),
        call=lambda tensors: [leaf for _, leaf in _leaves(call(tensors))],
        while_traced=while_traced,
    )


def _graph_inputs(model: Any, keras: Any, source: Path) -> tuple[tuple[Port, ...], Call]:
    """The Input layers of a functional or Sequential model, in the order of `model.inputs`."""
    import tensorflow as tf

    ports = tuple(
        _port(name, tensor, source)
        for name, tensor in zip(_separate(_layer_name(t) for t in model.inputs), model.inputs, strict=True)
    )
    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input

    def call(tensors: list[Any]) -> Any:
        return model(tf.nest.pack_sequence_as(structure, tensors), training=False)

    return ports, call


def _graph_outputs(model: Any, keras: Any) -> list[str]:
    structure = model.outputs[0] if isinstance(model, keras.Sequential) else model.output
    return [path or _layer_name(tensor) for path, tensor in _leaves(structure)]


def _layer_name(tensor: Any) -> str:
    """The name of the layer that made a symbolic tensor, in Keras 3 (operation) and Keras 2 (layer)."""
    history = tensor._keras_history
    layer = getattr(history, "operation", None) or history.layer
    return str(layer.name)


def _port(name: str, tensor: Any, source: Path) -> Port:
    dtype = str(getattr(tensor.dtype, "name", tensor.dtype))
    if dtype not in dtypes.BY_NAME:
        raise SourceError(f"{source}: input {name!r} has a data type that Triton cannot serve", found=dtype)
    if getattr(tensor, "sparse", False) or type(tensor).__name__ in (
        "SparseKerasTensor",
        "RaggedKerasTensor",
    ):
        raise SourceError(f"{source}: input {name!r} is sparse or ragged", expected="a dense tensor")
    return Port(name=name, dtype=dtype, shape=tuple(tensor.shape))


def _call_signature(model: Any, keras: Any, source: Path) -> tuple[tuple[Port, ...], Call, list[str]]:
    """The first argument of a subclassed model's `call`, whose shape Keras wrote into the file.

    The file says nothing of data types: an input that the model only ever casts to an integer is one,
    all others are float32.
    """
    if isinstance(model, keras.Sequential):
        raise _unbuilt(source, model)
    parameters = inspect.signature(model.call).parameters
    first = next(iter(parameters))
    shapes = _built_shape(model, source)
    required = [
        name for name, item in parameters.items() if item.default is item.empty and item.kind in ARGUMENT
    ]
    if missing := [name for name in required if name not in (first, "training")]:
        raise SourceError(
            f"{source}: a subclassed model whose call takes several arguments cannot be read",
            found=f"{type(model).__name__}.call also takes {', '.join(missing)}",
            expected="one argument, which may be a list or a dictionary of tensors",
            fix="build a functional model around it from keras.Input layers, and save that",
        )
    mode = {"training": False} if "training" in parameters else {}

    def call(tensors: list[Any]) -> Any:
        return model(_fill(shapes, iter(tensors)), **mode)

    leaves = _shape_leaves(shapes)
    names = _separate(path if path[:1].isalpha() else f"{first}{path}" for path, _ in leaves)
    ports = tuple(
        Port(name=name, dtype="float32", shape=(None, *shape[1:]))
        for name, (_, shape) in zip(names, leaves, strict=True)
    )
    traced = _trace(ports, call, source)
    if integers := _integer_inputs(traced):
        ports = tuple(replace(port, dtype=integers.get(i, port.dtype)) for i, port in enumerate(ports))
        traced = _trace(ports, call, source)
    paths = [path for path, _ in _leaves(traced.structured_outputs)]
    if paths == [""]:
        return ports, call, ["output"]
    return ports, call, [path or f"output_{index}" for index, path in enumerate(paths)]


def _built_shape(model: Any, source: Path) -> Any:
    config = model.get_build_config() or {}
    shapes = config.get("shapes_dict")
    shape = next(iter(shapes.values())) if shapes else config.get("input_shape")
    if not shape:
        raise _unbuilt(source, model)
    return shape


def _trace(ports: tuple[Port, ...], call: Call, source: Path) -> Any:
    import tensorflow as tf

    signature = [tf.TensorSpec(port.shape, tf.as_dtype(port.dtype)) for port in ports]
    try:
        return tf.function(
            lambda *tensors: call(list(tensors)), input_signature=signature
        ).get_concrete_function()
    except Exception as error:
        raise SourceError(f"{source} cannot be traced by TensorFlow", found=first_line(error)) from error


def _integer_inputs(traced: Any) -> dict[int, str]:
    """The integer types to which inputs are cast before anything else is done with them, by place."""
    found = {}
    for index, tensor in enumerate(traced.inputs[: len(traced.structured_input_signature[0])]):
        consumers = tensor.consumers()
        casts = {
            operation.get_attr("DstT").name if operation.type == "Cast" else "" for operation in consumers
        }
        if len(casts) == 1 and (dtype := casts.pop()) in INTEGERS:
            found[index] = dtype
    return found


def _leaves(structure: Any, path: str = "", *, keyed: bool = False) -> list[tuple[str, Any]]:
    """The tensors of a nested structure in TensorFlow's order, each with its keys; lists alone have none."""
    if isinstance(structure, Mapping):
        items = [(str(key), structure[key]) for key in sorted(structure)]
        keyed = True
    elif isinstance(structure, (list, tuple)):
        items = [(str(index), item) for index, item in enumerate(structure)]
    else:
        return [(path if keyed else "", structure)]
    return [
        leaf for key, item in items for leaf in _leaves(item, f"{path}_{key}" if path else key, keyed=keyed)
    ]


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(item is None or isinstance(item, int) for item in value)


def _shape_leaves(shapes: Any, path: str = "") -> list[tuple[str, Shape]]:
    """The shapes of a nested structure in TensorFlow's order, with their keys; "_0" is a place in a list."""
    if _is_shape(shapes):
        return [(path, tuple(shapes))]
    if isinstance(shapes, Mapping):
        items = [(f"{path}_{key}" if path else str(key), shapes[key]) for key in sorted(shapes)]
    else:
        items = [(f"{path}_{index}", item) for index, item in enumerate(shapes)]
    return [leaf for inner, item in items for leaf in _shape_leaves(item, inner)]


def _fill(shapes: Any, tensors: Iterator[Any]) -> Any:
    """The structure of `shapes` with a tensor in the place of each shape."""
    if _is_shape(shapes):
        return next(tensors)
    if isinstance(shapes, Mapping):
        return {key: _fill(shapes[key], tensors) for key in sorted(shapes)}
    return [_fill(item, tensors) for item in shapes]


def _separate(names: Iterable[str]) -> tuple[str, ...]:
    """The same names with a number after each that was there before."""
    taken: list[str] = []
    for name in names:
        candidate, count = name, 0
        while candidate in taken:
            count += 1
            candidate = f"{name}_{count}"
        taken.append(candidate)
    return tuple(taken)


def _unbuilt(source: Path, model: Any) -> SourceError:
    return SourceError(
        f"{source} does not say what the model takes",
        found=f"{type(model).__name__} {model.name!r} was saved before it was called",
        fix="call the model on an example before model.save(), or start it with keras.Input",
    )
