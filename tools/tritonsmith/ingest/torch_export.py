"""A torch program to a raw ONNX file: what the readers of PyTorch and Hugging Face sources share.

A module is traced by `torch.export`, and the trace is written by `torch.onnx.export(dynamo=True)`. Each
axis that may be free is left to torch to decide (`Dim.AUTO`) and looked at afterwards. An example of
one row would freeze its axis (pytorch#148886), so such an axis is repeated to two first.

Names are the source's: an input is named as the parameter of `forward`, an output as its dictionary
key or NamedTuple field, `output` where there is one tensor and `output_0`, `output_1` where there are
several without names.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from tritonsmith import dtypes
from tritonsmith.artifact import BATCH_AXIS, Json, TensorSpec, tool_versions
from tritonsmith.errors import MissingExtraError, SourceError
from tritonsmith.ingest.source import Exported, Reference
from tritonsmith.ingest.torch_example import ExampleInputs, array_from_tensor, tensor_from_array, widen

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

FreeAxes = Mapping[str, Mapping[int, str]]  # input name -> axis -> the axis's name
TOOLS = ("torch", "onnxscript")
ADDED_LENGTHS = (0, 1, 2, 6)


def require_torch(source: object, *, extra: str) -> None:
    """Raise MissingExtraError unless torch and onnxscript can be imported."""
    for package in TOOLS:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingExtraError(f"{source} needs PyTorch", package=package, extra=extra) from error


def export_module(
    source: str,
    module: torch.nn.Module,
    example: ExampleInputs,
    free: FreeAxes,
    folder: Path,
    *,
    kind: str,
    must_stay_free: bool,
    options: Mapping[str, Json],
    ranges: Mapping[str, tuple[float, float]],
    lengths: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Exported:
    """Trace a module in eval mode and write `folder/raw.onnx`; the module itself is the reference.

    Where torch fixes one of the axes in `free` to its example's size, `must_stay_free` decides whether
    that is an error or whether every axis is then fixed.

    Raises:
        SourceError: the module fails on its examples, cannot be traced or has no ONNX form.
    """
    import torch

    tensors = {name: widen(tensor, free.get(name, {})) for name, tensor in example.tensors.items()}
    try:
        with quiet(), torch.no_grad():
            result = example.call(module, tensors)
    except Exception as error:
        raise SourceError(
            f"{source} fails on its example inputs",
            found=reason_of(error),
            expected=", ".join(f"{name}: {_kind_of(tensor)}" for name, tensor in tensors.items()),
        ) from error
    output_names = list(named_tensors(source, result))
    program = _trace(source, module, example, tensors, free)
    if frozen := _frozen_axes(program, list(tensors), free):
        if must_stay_free:
            raise SourceError(
                f"{source} fixes an axis that should stay free",
                found=", ".join(frozen),
                fix="make forward() independent of that size, or do not name the axis",
            )
        tensors, free = dict(example.tensors), {}
        program = _trace(source, module, example, tensors, free)
    return finish_export(
        source,
        program,
        list(tensors),
        output_names,
        free,
        folder,
        kind=kind,
        reference=module_reference(source, module, example),
        options=options,
        ranges=ranges,
        lengths=lengths,
    )


def finish_export(
    source: str,
    program: ExportedProgram,
    input_names: Sequence[str],
    output_names: Sequence[str],
    axis_names: FreeAxes,
    folder: Path,
    *,
    kind: str,
    reference: Reference,
    options: Mapping[str, Json],
    ranges: Mapping[str, tuple[float, float]],
    lengths: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Exported:
    """Write a traced program as `folder/raw.onnx` and read its signature.

    A free axis is called by its name in `axis_names`, any other by the first input and axis where it
    stands (`ids_1`). Axes that torch found equal share a name.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    input_keys = [key for key in program.graph_signature.user_inputs if isinstance(key, str)]
    output_keys = [key for key in program.graph_signature.user_outputs if isinstance(key, str)]
    symbols: dict[str, str] = {}
    for name, key in zip(input_names, input_keys, strict=True):
        for axis, size in enumerate(sizes_of(values[key])):
            if isinstance(size, str):
                symbols.setdefault(size, axis_names.get(name, {}).get(axis, f"{name}_{axis}"))
    inputs = [_spec(n, values[k], symbols) for n, k in zip(input_names, input_keys, strict=True)]
    outputs = [_spec(n, values[k], symbols) for n, k in zip(output_names, output_keys, strict=True)]
    raw = folder / "raw.onnx"
    _write_onnx(source, program, raw)
    return Exported(
        kind=kind,
        raw=raw,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        batched=bool(inputs) and all(spec.shape[:1] == (BATCH_AXIS,) for spec in (*inputs, *outputs)),
        reference=reference,
        tools=tool_versions(*TOOLS, *(("transformers",) if kind == "huggingface" else ())),
        options=options,
        ranges=ranges,
        lengths={**lengths_of(program, [values[key] for key in input_keys], symbols), **lengths},
    )


def sizes_of(value: Any) -> tuple[int | str, ...]:
    """The shape of a traced tensor: a number where torch fixed the axis, else its symbol.

    A fixed axis can still be a SymInt, whose expression is then a number.
    """
    return tuple(int(text) if (text := str(size)).isdigit() else text for size in value.shape)


def named_tensors(source: str, result: Any, name: str = "") -> dict[str, Any]:
    """The tensors of a result by name, in the order in which torch flattens it; None is no output."""
    import torch

    if isinstance(result, torch.Tensor):
        return {name or "output": result}
    if result is None:
        return {}
    if isinstance(result, Mapping):
        parts = list(result.items())
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        parts = list(zip(result._fields, result, strict=True))
    elif isinstance(result, tuple | list):
        parts = list(enumerate(result)) if name or len(result) > 1 else [("output", result[0])]
        name = name or ("output" if len(result) > 1 else "")
    else:
        raise SourceError(
            f"{source} returns something that is no tensor",
            found=f"{type(result).__name__} as {name or 'the result'}",
            expected="a tensor, or a tuple, list, dictionary or NamedTuple of tensors",
        )
    leaves: dict[str, Any] = {}
    for key, part in parts:
        for leaf, tensor in named_tensors(source, part, f"{name}_{key}" if name else str(key)).items():
            if leaf in leaves:
                raise SourceError(f"{source} returns two tensors that would both be named {leaf!r}")
            leaves[leaf] = tensor
    return leaves


def module_reference(source: str, module: Callable[..., Any], example: ExampleInputs) -> Reference:
    """A module as a function of arrays by input name."""
    import torch

    def compute(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        tensors = {name: tensor_from_array(arrays[name]) for name in example.tensors}
        with quiet(), torch.no_grad():
            result = example.call(module, tensors)
        return {name: array_from_tensor(tensor) for name, tensor in named_tensors(source, result).items()}

    return compute


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' prints, log lines and warnings off the user's terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def reason_of(error: BaseException) -> str:
    """The first line of the exception at the root of a chain, with its class."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _trace(
    source: str,
    module: torch.nn.Module,
    example: ExampleInputs,
    tensors: Mapping[str, torch.Tensor],
    free: FreeAxes,
) -> ExportedProgram:
    import torch

    args, kwargs = example.split(tensors)
    shapes = {name: dict.fromkeys(free.get(name, {}), torch.export.Dim.AUTO) for name in tensors}
    shape_args, shape_kwargs = example.split(shapes)
    # torch wants the shapes in a dictionary by parameter, *args and **kwargs nested below theirs.
    dynamic = dict(inspect.signature(module.forward).bind(*shape_args, **shape_kwargs).arguments)
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise SourceError(
            f"torch.export cannot trace {source}",
            found=reason_of(error),
            fix="make forward() traceable: no branch or loop on the values of tensors",
        ) from error


def _frozen_axes(program: ExportedProgram, names: Sequence[str], free: FreeAxes) -> list[str]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    frozen = []
    for name, key in zip(names, program.graph_signature.user_inputs, strict=True):
        for axis, axis_name in free.get(name, {}).items():
            size = sizes_of(values[str(key)])[axis]
            if isinstance(size, int):
                frozen.append(f"axis {axis} ({axis_name}) of input {name!r} is fixed at {size}")
    return frozen


def _write_onnx(source: str, program: ExportedProgram, path: Path) -> None:
    import torch

    try:
        with quiet():
            converted = torch.onnx.export(program, dynamo=True, verbose=False)
            assert converted is not None  # noqa: S101 - None is for dynamo=False alone
            converted.save(str(path))
    except Exception as error:
        raise SourceError(
            f"torch.onnx cannot convert {source}",
            found=reason_of(error),
            fix="replace the operation that it names in the module's forward()",
        ) from error


def _spec(name: str, value: Any, symbols: Mapping[str, str]) -> TensorSpec:
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in dtypes.BY_NAME:
        raise SourceError(f"tensor {name!r} has a data type that Triton cannot serve", found=dtype)
    shape = tuple(
        symbols.get(size, f"{name}_{axis}") if isinstance(size, str) else size
        for axis, size in enumerate(sizes_of(value))
    )
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def lengths_of(
    program: ExportedProgram, values: Iterable[Any], symbols: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    """Lengths to try on free axes that torch bounded, or that are a formula of another axis.

    `values` are the traced inputs, `symbols` the names of their axes by expression. Torch's own lower
    bound of 2 is no real bound. Axes of one symbol are tried at lengths that go together.
    """
    tried: dict[Any, tuple[int, ...]] = {}
    bounded = set()
    for symbol, bounds in program.range_constraints.items():
        least = int(bounds.lower) if bounds.lower.is_Integer and bounds.lower > 2 else 1
        most = int(bounds.upper) if bounds.upper.is_Integer else None
        tried[symbol] = tuple(least + more for more in ADDED_LENGTHS if most is None or least + more <= most)
        if least > 1 or most is not None:
            bounded.add(symbol)
    expressions = {size.node.expr for value in values for size in value.shape if not isinstance(size, int)}
    for expression in expressions:
        if expression.free_symbols and not expression.is_Symbol:
            bounded |= expression.free_symbols
    lengths = {}
    for expression in expressions:
        for symbol in expression.free_symbols & bounded & set(tried):
            if len(expression.free_symbols) == 1:
                name = symbols[str(expression)]
                lengths[name] = tuple(int(expression.subs(symbol, length)) for length in tried[symbol])
    return lengths


def _kind_of(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
