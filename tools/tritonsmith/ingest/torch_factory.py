"""`package.module:factory`: a function of the user's own that returns a module and example inputs.

It is named on purpose, so it is imported and called; the current folder is searched first.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tritonsmith.artifact import BATCH_AXIS
from tritonsmith.errors import SourceError
from tritonsmith.ingest.source import Exported
from tritonsmith.ingest.torch_example import ExampleInputs, cast_to_float32, value_ranges
from tritonsmith.ingest.torch_export import reason_of
from tritonsmith.ingest.torch_module import TorchModule, export_loaded
from tritonsmith.user_code import import_user_module

if TYPE_CHECKING:
    import torch

FACTORY = "package.module:factory, a function that returns (module, example inputs)"
RETURNED = "(module, example inputs) or (module, example inputs, free axes)"


def export_factory(source: str, folder: Path) -> Exported:
    """Call a factory and write its module as `folder/raw.onnx`; `export_torch` says what it may return."""
    return export_loaded(load_factory(source), folder)


def load_factory(source: str) -> TorchModule:
    """Call a factory; its module comes back in eval mode and in float32."""
    module, inputs, named_axes = _call_factory(source)
    module = module.eval().cpu()
    example = _bind(source, module, inputs)
    example, cast = cast_to_float32(module, example)
    return TorchModule(
        source=source,
        kind="torch",
        module=module,
        example=example,
        free=_free_axes(source, example, named_axes),
        must_stay_free=named_axes is not None,
        options={"factory": source, **({"cast": cast} if cast else {})},
        ranges=value_ranges(example),
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
    module = import_user_module(module_name, f"source {source}", SourceError)
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
