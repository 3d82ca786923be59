"""Which channels and heads of a PyTorch module go together, and how much they matter.

Dependencies and importance are torch-pruning's (Fang et al., 2023, arXiv 2301.12900).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch_pruning

from tritonsmith.compress.pruning.torch_cut import HEAD_COUNTS, Array, Cut, Group, cut_copy, graph_of
from tritonsmith.compress.pruning.torch_plan import nearest, plan_sizes
from tritonsmith.errors import CompressionError
from tritonsmith.ingest.torch_export import named_tensors, quiet, reason_of
from tritonsmith.ingest.torch_module import TorchModule

ATTENTION = ("BmmBackward", "ScaledDotProduct")  # a product of two activations, in autograd's names
# What a module raises whose parts no longer fit together.
UNFIT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def find_groups(
    loaded: TorchModule, *, gradients: Iterable[None] | None, round_to: int, keep: Collection[str]
) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """The groups that can be cut, and a line for each that is left alone.

    Without `gradients`, importance is the squared norm of a channel's weights over its group's mean.
    With them, it is the squared first-order term (Molchanov et al., 2019, arXiv 1906.10771): each item leaves
    the gradients of one batch in the module's parameters.
    """
    graph = graph_of(loaded)
    kept = _kept_modules(loaded.module, keep)
    chosen, alone = [], []
    with quiet():
        for members in graph.get_all_groups():
            reason = _reason_to_leave(members, graph, kept)
            if reason is None:
                chosen.append(members)
            else:
                alone.append(f"{_layer_of(members, graph)}: {reason}")
        groups = []
        for members, scores in zip(chosen, _scores(chosen, gradients), strict=True):
            if scores is None:
                alone.append(f"{_layer_of(members, graph)}: it has no weight to judge by")
                continue
            group = _group_of(members, graph, scores, round_to)
            if len(group.units) <= group.multiple:
                alone.append(f"{group.layer}: {len(scores)} channels are not more than {round_to}")
            else:
                groups.append(group)
    return _try_groups(loaded, groups, alone)


def _scores(chosen: Sequence[Any], gradients: Iterable[None] | None) -> list[Array | None]:
    """Importance `[channels]` of each group."""
    scorers = torch_pruning.pruner.importance
    if gradients is None:
        magnitude = scorers.GroupMagnitudeImportance()
        return [_array(magnitude(members)) for members in chosen]
    taylor = scorers.GroupTaylorImportance(normalizer=None, multivariable=True)
    totals: list[Array | None] = [None] * len(chosen)
    for _ in gradients:
        for index, members in enumerate(chosen):
            term, total = _array(taylor(members)), totals[index]
            if term is not None:
                totals[index] = term**2 if total is None else total + term**2
    return totals


def _array(scores: torch.Tensor | None) -> Array | None:
    return None if scores is None or not len(scores) else scores.detach().double().numpy()


def _kept_modules(module: torch.nn.Module, keep: Collection[str]) -> frozenset[torch.nn.Module]:
    modules = dict(module.named_modules())
    if unknown := [name for name in keep if name not in modules]:
        raise CompressionError(
            f"no module is named {unknown[0]!r}",
            expected=", ".join(name for name, part in modules.items() if not list(part.children()))[:500],
        )
    return frozenset(part for name in keep for part in modules[name].modules())


def _reason_to_leave(members: Any, graph: Any, kept: Collection[torch.nn.Module]) -> str | None:
    for dep, _ in members:
        if dep.target.type == torch_pruning.ops.OPTYPE.OUTPUT:
            return "it makes an output"
        target = dep.target.module
        if target in kept and graph.is_out_channel_pruning_fn(dep.handler):
            return "it is kept"
        if isinstance(target, torch.nn.MultiheadAttention):
            return "heads of nn.MultiheadAttention cannot be cut"
    attends, heads = _attends(members), _heads_of(members, graph)
    if attends and heads is None:
        return f"attention without a number of heads ({', '.join(HEAD_COUNTS)})"
    return None


def _group_of(members: Any, graph: Any, scores: Array, round_to: int) -> Group:
    channels = len(scores)
    heads = _heads_of(members, graph) if _attends(members) else None
    if heads is not None:
        size = channels // heads
        units = tuple(tuple(range(head * size, (head + 1) * size)) for head in range(heads))
        multiple = 1
    else:
        parts = _channel_groups(members, graph)
        size = channels // parts
        units = tuple(tuple(range(index, channels, size)) for index in range(size))
        multiple = max(1, round_to // np.gcd(round_to, parts))
    return Group(
        layer=_layer_of(members, graph),
        units=units,
        importance=np.array([scores[list(unit)].mean() for unit in units]),
        multiple=multiple,
        head_channels=None if heads is None else channels // heads,
    )


def _layer_of(members: Any, graph: Any) -> str:
    return str(graph._module2name[members[0].dep.target.module])


def _channel_groups(members: Any, graph: Any) -> int:
    """Into how many equal parts the channels are divided by grouped convolutions and norms."""
    parts = 1
    for dep, _ in members:
        target = dep.target.module
        pruner = graph.get_pruner_of_module(target)
        if pruner is None or dep.target.type == torch_pruning.ops.OPTYPE.PARAMETER:
            continue
        depthwise = getattr(target, "groups", None) == getattr(target, "out_channels", 0)
        if depthwise:
            continue
        out = graph.is_out_channel_pruning_fn(dep.handler)
        divided = pruner.get_out_channel_groups(target) if out else pruner.get_in_channel_groups(target)
        parts = max(parts, int(divided))
    return parts


def _attends(members: Any) -> bool:
    return any(mark in str(dep.target.name) for dep, _ in members for mark in ATTENTION)


def _heads_of(members: Any, graph: Any) -> int | None:
    owner = _layer_of(members, graph).rpartition(".")[0]
    module = graph.model.get_submodule(owner)
    counts = (getattr(module, name, None) for name in HEAD_COUNTS)
    return next((count for count in counts if isinstance(count, int) and count > 0), None)


def _try_groups(
    loaded: TorchModule, groups: Sequence[Group], alone: list[str]
) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """Leave out the groups without which the module fails or answers in another shape."""
    with quiet(), torch.no_grad():
        before = _shapes(loaded)
    smaller = {group.layer: nearest(group, len(group.units) - group.multiple) for group in groups}
    if _failure(loaded, plan_sizes(groups, smaller), before) is None:
        return tuple(groups), tuple(alone)
    able = []
    for group in groups:
        failure = _failure(loaded, plan_sizes([group], smaller), before)
        if failure is None:
            able.append(group)
        else:
            alone.append(f"{group.layer}: {failure}")
    return tuple(able), tuple(alone)


def _failure(loaded: TorchModule, plan: Sequence[Cut], before: Mapping[str, Any]) -> str | None:
    try:
        with quiet(), torch.no_grad():
            after = _shapes(cut_copy(loaded, plan))
    except UNFIT as error:
        return f"without it the module fails: {reason_of(error)}"
    return None if after == before else "it makes an output"


def _shapes(loaded: TorchModule) -> dict[str, Any]:
    result = loaded.example.call(loaded.module.eval(), loaded.example.tensors)
    return {name: tensor.shape for name, tensor in named_tensors(loaded.source, result).items()}
