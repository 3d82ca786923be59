"""Channels and heads cut out of a PyTorch module along torch-pruning's dependencies, and its cost."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
import torch_pruning
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from tritonsmith.errors import CompressionError
from tritonsmith.ingest.torch_export import named_tensors, quiet, reason_of
from tritonsmith.ingest.torch_module import TorchModule

Array: TypeAlias = NDArray[np.float64]

HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")  # what modules call their number of heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Output channels of one layer, with all that follows from removing them."""

    layer: str
    units: tuple[tuple[int, ...], ...]  # channels that can only go together: one, a head, one of each group
    importance: Array  # [units]
    multiple: int  # sizes that are left are multiples of this, in units
    head_channels: int | None  # channels of one attention head, where units are heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Output channels of a layer that go; `heads` are those that its attention has left, if it is one."""

    layer: str
    channels: tuple[int, ...]
    heads: int | None


def cut(loaded: TorchModule, plan: Sequence[Cut]) -> None:
    """Remove the channels of a plan from the module itself."""
    if not plan:
        return
    graph = graph_of(loaded)
    with quiet():
        for item in plan:
            layer = loaded.module.get_submodule(item.layer)
            pruner = graph.get_pruner_of_module(layer)
            graph.get_pruning_group(layer, pruner.prune_out_channels, list(item.channels)).prune()
            if item.heads is not None:
                _set_heads(loaded.module, item)


def cut_copy(loaded: TorchModule, plan: Sequence[Cut]) -> TorchModule:
    """The same on a copy."""
    copied = replace(loaded, module=copy.deepcopy(loaded.module))
    cut(copied, plan)
    return copied


def flops_of_module(loaded: TorchModule) -> int:
    """FLOPs of the products on the example inputs, counted by torch: twice the multiply-adds."""
    with quiet(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        loaded.example.call(loaded.module.eval(), loaded.example.tensors)
    return int(counter.get_total_flops())


def channels_of_module(loaded: TorchModule) -> dict[str, int]:
    """How many output channels each layer has, by its name."""
    counts = {}
    for name, layer in loaded.module.named_modules():
        for attribute in ("out_channels", "out_features"):
            if isinstance(size := getattr(layer, attribute, None), int):
                counts[name] = size
    return counts


def parameters_of_module(loaded: TorchModule) -> int:
    return sum(parameter.numel() for parameter in loaded.module.parameters())


def graph_of(loaded: TorchModule) -> Any:
    """torch-pruning's dependency graph of a module."""
    loaded.module.requires_grad_(True)  # the graph is read from autograd

    def call(traced: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Any:
        return list(named_tensors(loaded.source, loaded.example.call(traced, tensors)).values())

    try:
        with quiet(), torch.enable_grad():
            return torch_pruning.DependencyGraph().build_dependency(
                loaded.module, example_inputs=dict(loaded.example.tensors), forward_fn=call
            )
    except Exception as error:  # whatever the library meets in a module that it does not know
        raise CompressionError(
            f"torch-pruning cannot follow {loaded.source}",
            found=reason_of(error),
            fix="use prune, which works on the ONNX graph",
        ) from error


def _set_heads(module: torch.nn.Module, item: Cut) -> None:
    owner: Any = module.get_submodule(item.layer.rpartition(".")[0])
    assert item.heads is not None  # noqa: S101
    for name in HEAD_COUNTS:
        if isinstance(getattr(owner, name, None), int):
            setattr(owner, name, item.heads)
    if isinstance(getattr(owner, "all_head_size", None), int):
        owner.all_head_size = module.get_submodule(item.layer).out_features
