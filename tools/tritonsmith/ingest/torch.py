"""PyTorch sources: a `.pt2` file of torch.export, or `package.module:factory`.

A factory is the user's own code, see `torch_factory`. A `.pt2` file runs nothing, see `torch_archive`.
Pickled modules (`.pt`, `.pth`) and
TorchScript are refused: the first need their classes and example inputs, the second cannot be traced.

The result is float32 whatever the weights are: a module with float16, bfloat16 or float64 weights is
cast, with its inputs of those types, and the cast module is what the result is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonsmith.artifact import BATCH_AXIS
from tritonsmith.errors import SourceError
from tritonsmith.ingest.source import ConvertOptions, Exported
from tritonsmith.ingest.torch_archive import load_program
from tritonsmith.ingest.torch_example import ExampleInputs, cast_to_float32, value_ranges
from tritonsmith.ingest.torch_export import (
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
from tritonsmith.ingest.torch_factory import export_factory

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

FILE_SUFFIXES = (".pt2", ".pt", ".pth", ".ckpt")


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
    return export_factory(source, folder)


def _export_program(path: Path, folder: Path, *, allow_code: bool) -> Exported:
    program = load_program(path, allow_code=allow_code)
    source = str(path)
    _refuse_training(source, program)
    example = _program_example(source, program)
    free = _program_axes(program, example)
    module, output_names = _flat_module(source, program)
    float_example, cast = cast_to_float32(module, example)
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
            ranges=value_ranges(example),
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
        ranges=value_ranges(example),
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
