"""PyTorch sources: a `.pt2` file of torch.export, or `package.module:factory`.

A factory is the user's own code, named on purpose, so it is imported and called; the current folder is
searched first. A `.pt2` file runs nothing, see `torch_archive`. Pickled modules (`.pt`, `.pth`) and
TorchScript are refused: the first need their classes and example inputs, the second cannot be traced.

The result is float32 whatever the weights are: a module with float16, bfloat16 or float64 weights is
cast, with its inputs of those types, and the cast module is what the result is compared with.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tritonsmith.artifact import BATCH_AXIS
from tritonsmith.errors import SourceError
from tritonsmith.ingest.source import ConvertOptions, Exported
from tritonsmith.ingest.torch_archive import load_program
from tritonsmith.ingest.torch_export import (
    ExampleInputs,
    export_module,
    finish_export,
    lengths_of,
    module_reference,
    named_tensors,
    quiet,
    reason_of,
    require_torch,
    sizes_of,
)

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

FILE_SUFFIXES = (".pt2", ".pt", ".pth", ".ckpt")
FACTORY = "package.module:factory, a function that returns (module, example inputs)"
RETURNED = "(module, example inputs) or (module, example inputs, free axes)"


def export_torch(source: str, folder: Path, options: ConvertOptions) -> Exported:
    """Read a `.pt2` file or call a factory, and write `folder/raw.onnx`.

    A factory is a function without arguments that returns `(module, inputs)` or
    `(module, inputs, free_axes)`. `inputs` are tensors: one, a tuple in the order of forward()'s
    parameters, or a dictionary by their names. `free_axes` names the axes of each input that may vary,
    `{"ids": {0: "batch", 1: "sequence"}}`; it is then the whole truth, and `{}` fixes every axis.
    Without it, axis 0 is the batch axis where all inputs share its size and the module leaves it free.

    A `.pt2` file keeps the free axes that it was exported with; axis 0 is the batch axis where it is
    one free axis of all inputs and outputs, so a file of a fixed batch is converted without a batch
    axis. The bounds of a `Dim` are not kept: ONNX has none.

    Raises:
        MissingExtraError: torch or onnxscript is not installed.
        SourceError: the source cannot be found, read, traced or converted.
    """
    require_torch(source, extra="torch")
    if source.endswith(FILE_SUFFIXES) or Path(source).is_file():
        return _export_program(Path(source), folder, allow_code=options.allow_code)
    return _export_factory(source, folder)


def _export_program(path: Path, folder: Path, *, allow_code: bool) -> Exported:
    program = load_program(path, allow_code=allow_code)
    source = str(path)
    _refuse_training(source, program)
    example = _program_example(source, program)
    free = _program_axes(program, example)
    module, output_names = _flat_module(source, program)
    float_example, cast = _cast_to_float32(module, example)
    lengths = _derived_lengths(program, free)
    if cast is not None or lengths:  # torch.onnx fails on a loaded program with a Dim like 2 * steps
        return export_module(
            source,
            module,
            float_example,
            free,
            folder,
            kind="torch",
            must_stay_free=True,
            options={} if cast is None else {"cast": cast},
            ranges=_value_ranges(example),
            lengths=lengths,
        )
    return finish_export(
        source,
        program,
        list(example.tensors),
        output_names,
        free,
        folder,
        kind="torch",
        reference=module_reference(source, module, example),
        options={},
        ranges=_value_ranges(example),
    )


def _refuse_training(source: str, program: ExportedProgram) -> None:
    """Raise where the graph makes noise or normalises by its batch: nothing can put it in eval mode now."""
    flags = {"dropout": 2, "feature_dropout": 2, "alpha_dropout": 2, "dropout_": 2, "batch_norm": 5}
    for node in program.graph.nodes:
        name = str(node.target).removeprefix("aten.").partition(".")[0]
        flag = flags.get(name)
        if flag is not None and len(node.args) > flag and node.args[flag] is True:
            raise SourceError(
                f"{source} was exported in training mode",
                found=f"{node.name}: {node.target} with training on",
                fix="export it again after module.eval()",
            )


def _program_example(source: str, program: ExportedProgram) -> ExampleInputs:
    """The inputs that the program was traced with, or zeros of their shapes where they were not kept."""
    import torch

    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    keys = program.graph_signature.user_inputs
    kept = torch.utils._pytree.tree_leaves(program.example_inputs) if program.example_inputs else []
    tensors = {}
    for index, key in enumerate(keys):
        value = values.get(key) if isinstance(key, str) else None
        if isinstance(key, str) and not isinstance(value, torch.Tensor):
            raise SourceError(
                f"input {key!r} of {source} is no tensor",
                found=type(value).__name__,
                expected="tensors and constants; export it with a constant there",
            )
        if isinstance(value, torch.Tensor):
            shape = [size if isinstance(size, int) else size.node.hint or 2 for size in value.shape]
            same = len(kept) == len(keys) and isinstance(kept[index], torch.Tensor)
            tensors[str(key)] = kept[index] if same else torch.zeros(shape, dtype=value.dtype)
    return ExampleInputs(tensors=tensors, positional_count=len(tensors))


def _program_axes(program: ExportedProgram, example: ExampleInputs) -> dict[str, dict[int, str]]:
    """The free axes of a program by name: axis 0 is the batch axis where it is one symbol of all inputs."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    shapes = {name: sizes_of(values[name]) for name in example.tensors}
    firsts = {shape[0] if shape else None for shape in shapes.values()}
    names = {size: BATCH_AXIS for size in firsts if isinstance(size, str)} if len(firsts) == 1 else {}
    free: dict[str, dict[int, str]] = {}
    for name, shape in shapes.items():
        for axis, size in enumerate(shape):
            if isinstance(size, str):
                free.setdefault(name, {})[axis] = names.setdefault(size, f"{name}_{axis}")
    return free


def _derived_lengths(
    program: ExportedProgram, free: Mapping[str, Mapping[int, str]]
) -> dict[str, tuple[int, ...]]:
    """Lengths to try where an axis is a formula of another; empty where none is."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    symbols = {
        str(sizes_of(values[name])[axis]): axis_name
        for name, axes in free.items()
        for axis, axis_name in axes.items()
    }
    if all(symbol.isidentifier() for symbol in symbols):
        return {}
    return lengths_of(program, [values[name] for name in free], symbols)


def _flat_module(source: str, program: ExportedProgram) -> tuple[torch.nn.Module, list[str]]:
    """The program as a module of its tensors alone, in order, and the names of what it returns."""
    import torch

    keys, spec = program.graph_signature.user_inputs, program.call_spec.in_spec
    if spec is None or program.call_spec.out_spec is None:
        raise SourceError(f"{source} does not say how its program is called")
    try:
        with quiet():
            inner = program.module(check_guards=False)
    except Exception as error:
        raise SourceError(f"the program in {source} is broken", found=reason_of(error)) from error

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *tensors: torch.Tensor) -> Any:
            remaining = iter(tensors)
            leaves = [next(remaining) if isinstance(key, str) else key for key in keys]
            args, kwargs = torch.utils._pytree.tree_unflatten(leaves, spec)
            return self.inner.forward(*args, **kwargs)  # a call would check the bounds of each Dim

    marks = [torch.empty(0) if isinstance(key, str) else None for key in program.graph_signature.user_outputs]
    result = torch.utils._pytree.tree_unflatten(marks, program.call_spec.out_spec)
    return Flat(), list(named_tensors(source, result))


def _export_factory(source: str, folder: Path) -> Exported:
    module, inputs, named_axes = _call_factory(source)
    module = module.eval().cpu()
    example = _bind(source, module, inputs)
    example, cast = _cast_to_float32(module, example)
    free = _free_axes(source, example, named_axes)
    return export_module(
        source,
        module,
        example,
        free,
        folder,
        kind="torch",
        must_stay_free=named_axes is not None,
        options={"factory": source, **({"cast": cast} if cast else {})},
        ranges=_value_ranges(example),
    )


def _call_factory(source: str) -> tuple[torch.nn.Module, Any, Mapping[str, Mapping[int, str]] | None]:
    import torch

    factory = _find_factory(source)
    try:
        result = factory()
    except Exception as error:
        raise SourceError(f"the factory {source} failed", found=reason_of(error)) from error
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise SourceError(
            f"the factory {source} returned something else",
            found=type(result).__name__ + (f" of {len(result)}" if isinstance(result, tuple) else ""),
            expected=RETURNED,
        )
    module, inputs, *axes = result
    if isinstance(module, torch.jit.ScriptModule):
        raise SourceError(
            f"the factory {source} returned a TorchScript module",
            expected="the torch.nn.Module that it was scripted from",
        )
    if not isinstance(module, torch.nn.Module):
        raise SourceError(
            f"the factory {source} returned no module first",
            found=type(module).__name__,
            expected=RETURNED,
        )
    return module, inputs, axes[0] if axes else None


def _find_factory(source: str) -> Any:
    module_name, _, attribute = source.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise SourceError(f"{source!r} names no factory", expected=FACTORY)
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(missing + "."):
            raise SourceError(
                f"no Python module is named {missing!r}",
                expected=FACTORY,
                fix=f"run from the folder that holds it ({folder} was searched), or add it to PYTHONPATH",
            ) from error
        raise SourceError(f"{module_name} cannot be imported", found=reason_of(error)) from error
    except Exception as error:
        raise SourceError(f"{module_name} cannot be imported", found=reason_of(error)) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = sorted(
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module_name and name[0] != "_"
        )
        raise SourceError(
            f"{module_name} has no function {attribute!r}"
            if factory is None
            else f"{source} is not a function",
            found=", ".join(names) if factory is None else type(factory).__name__,
            expected=FACTORY,
        )
    return factory


def _bind(source: str, module: torch.nn.Module, inputs: Any) -> ExampleInputs:
    """The example inputs under the names of forward()'s parameters."""
    import torch

    if isinstance(inputs, torch.Tensor | np.ndarray):
        inputs = (inputs,)
    if not isinstance(inputs, tuple | list | Mapping) or not inputs:
        raise SourceError(
            f"the factory {source} returned no example inputs",
            found=type(inputs).__name__,
            expected="a tuple of tensors, or a dictionary of tensors by the names of forward()'s parameters",
        )
    keywords = {str(key): value for key, value in inputs.items()} if isinstance(inputs, Mapping) else {}
    values = () if isinstance(inputs, Mapping) else tuple(inputs)
    try:
        inspect.signature(module.forward).bind(*values, **keywords)
    except TypeError as error:
        raise SourceError(
            f"the example inputs of {source} do not fit {type(module).__name__}.forward()",
            found=error,
            expected=f"forward{inspect.signature(module.forward)}",
        ) from error
    names = [*_positional_names(module, len(values)), *keywords]
    tensors = {}
    for name, value in zip(names, (*values, *keywords.values()), strict=True):
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if not isinstance(tensor, torch.Tensor):
            raise SourceError(
                f"example input {name!r} of {source} is no tensor",
                found=type(value).__name__,
                expected="a tensor; close over any other argument in the factory",
            )
        tensors[name] = tensor.detach().cpu()
    return ExampleInputs(tensors=tensors, positional_count=len(values))


def _positional_names(module: torch.nn.Module, count: int) -> list[str]:
    names: list[str] = []
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}_{index}" for index in range(count - len(names))]
        names.append(name)
    return names[:count]


def _cast_to_float32(module: torch.nn.Module, example: ExampleInputs) -> tuple[ExampleInputs, str | None]:
    """Make the module's weights float32 in place, and its inputs of the type that the weights had."""
    import torch

    weights = (*module.parameters(), *module.buffers())
    narrow = {weight.dtype for weight in weights if weight.is_floating_point()} - {torch.float32}
    if not narrow:
        return example, None
    module.float()
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            _retype_constants(part, narrow)
    tensors = {
        name: tensor.float() if tensor.dtype in narrow else tensor for name, tensor in example.tensors.items()
    }
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
    return replace(example, tensors=tensors), f"{names} to float32"


def _retype_constants(module: torch.fx.GraphModule, narrow: set[torch.dtype]) -> None:
    """Replace data types that a traced graph spells out."""
    import torch

    def retype(value: Any) -> Any:
        return torch.float32 if isinstance(value, torch.dtype) and value in narrow else value

    for node in module.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, retype)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, retype)
    module.recompile()


def _free_axes(
    source: str, example: ExampleInputs, named: Mapping[str, Mapping[int, str]] | None
) -> dict[str, dict[int, str]]:
    """The axes that may vary: those that the factory named, else axis 0 where all inputs share it."""
    tensors = example.tensors
    if named is None:
        rows = {tensor.shape[0] if tensor.ndim else None for tensor in tensors.values()}
        return {name: {0: BATCH_AXIS} for name in tensors} if len(rows) == 1 and None not in rows else {}
    free: dict[str, dict[int, str]] = {}
    for name, axes in named.items():
        if name not in tensors:
            raise SourceError(
                f"the free axes of {source} name an input that is not there",
                found=name,
                expected=", ".join(tensors),
            )
        for axis, axis_name in axes.items():
            if not isinstance(axis, int) or not 0 <= axis < tensors[name].ndim:
                raise SourceError(
                    f"the free axes of {source} name an axis that input {name!r} has not",
                    found=axis,
                    expected=f"0 to {tensors[name].ndim - 1}",
                )
            if not isinstance(axis_name, str) or not axis_name.isidentifier():
                raise SourceError(
                    f"axis {axis} of input {name!r} of {source} has no name",
                    found=repr(axis_name),
                    expected="a name, such as 'sequence'",
                )
        free[name] = dict(axes)
    return free


def _value_ranges(example: ExampleInputs) -> dict[str, tuple[float, float]]:
    """What the examples of the integer inputs span: an index beyond may be none."""
    return {
        name: (int(tensor.min()), int(tensor.max()))
        for name, tensor in example.tensors.items()
        if not tensor.is_floating_point() and tensor.dtype.itemsize > 1
        if tensor.numel() and tensor.min() < tensor.max()
    }
