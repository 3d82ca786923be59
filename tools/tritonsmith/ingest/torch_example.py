"""Example inputs of a torch module: how it is called with them, and which types and values they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleInputs:
    """Tensors to call a module with: the first of them by position, the rest by keyword."""

    tensors: Mapping[str, torch.Tensor]
    positional_count: int

    def call(self, module: Callable[..., Any], tensors: Mapping[str, torch.Tensor]) -> Any:
        """Call `module` with other tensors of the same names."""
        args, kwargs = self.split(tensors)
        return module(*args, **kwargs)

    def split(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The values by input name, as positional and keyword arguments."""
        names = list(self.tensors)
        args = tuple(values[name] for name in names[: self.positional_count])
        return args, {name: values[name] for name in names[self.positional_count :]}


def widen(tensor: torch.Tensor, axes: Mapping[int, str]) -> torch.Tensor:
    """The tensor with each of the axes that has one row repeated to two."""
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = tensor.repeat_interleave(2, dim=axis)
    return tensor


def cast_to_float32(module: torch.nn.Module, example: ExampleInputs) -> tuple[ExampleInputs, str | None]:
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


def value_ranges(example: ExampleInputs) -> dict[str, tuple[float, float]]:
    """What the examples of the integer inputs span: an index beyond may be none."""
    return {
        name: (int(tensor.min()), int(tensor.max()))
        for name, tensor in example.tensors.items()
        if not tensor.is_floating_point() and tensor.dtype.itemsize > 1
        if tensor.numel() and tensor.min() < tensor.max()
    }


def tensor_from_array(array: NDArray[Any]) -> torch.Tensor:
    """A copy of the array as a tensor of the same data type, bfloat16 included."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def array_from_tensor(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor's values as a numpy array of the same data type, bfloat16 included."""
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: NDArray[Any] = tensor.numpy()
    return array


def _retype_constants(module: torch.fx.GraphModule, narrow: set[torch.dtype]) -> None:
    """Replace data types that a traced graph spells out."""
    import torch

    def retype(value: Any) -> Any:
        return torch.float32 if isinstance(value, torch.dtype) and value in narrow else value

    for node in module.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, retype)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, retype)
    module.recompile()
