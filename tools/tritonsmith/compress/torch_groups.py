"""Which channels and heads of a PyTorch module go together, how much they matter, and cutting them out.

Dependencies and importance are torch-pruning's (Fang et al., 2023, arXiv 2301.12900). How many of each group
stay is decided here: its own rounding always goes down, and spares a group that would be left with nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
ATTENTION = ("BmmBackward", "ScaledDotProduct")  # a product of two activations, in autograd's names
# What a module raises whose parts no longer fit together.
UNFIT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


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


def find_groups(
    loaded: TorchModule, *, gradients: Iterable[None] | None, round_to: int, keep: Collection[str]
) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """The groups that can be cut, and a line for each that is left alone.

    Without `gradients`, importance is the squared norm of a channel's weights over its group's mean.
    With them, it is the squared first-order term (Molchanov et al., 2019, arXiv 1906.10771): each item leaves
    the gradients of one batch in the module's parameters.
    """
    graph = _graph_of(loaded)
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


def plan_ratio(
    groups: Sequence[Group], ratio: float, *, part: float, channels: Mapping[str, int]
) -> tuple[Cut, ...]:
    """Cut every group alike, the least important units first: `ratio` of all when `part` is 1.

    `channels` are those that each layer began with; in between, what is left is their (1 - ratio) ** part.

    Raises:
        CompressionError: a group would be left with less than one unit.
    """
    left = {}
    for group in groups:
        first = channels[group.layer] / len(group.units[0])
        if first * (1 - ratio) < 1:
            raise CompressionError(
                f"a ratio of {ratio:g} would empty {group.layer}",
                found=f"{first:g} {'channels' if group.head_channels is None else 'heads'}",
                expected=f"a ratio of at most {1 - 1 / first:.3g}",
                fix=f"ask for less, or add {group.layer!r} to `keep`",
            )
        left[group.layer] = _nearest(group, first * (1 - ratio) ** part)
    return _plan(groups, left)


def plan_target(
    loaded: TorchModule, groups: Sequence[Group], cost: Callable[[TorchModule], int], most: float
) -> tuple[Cut, ...]:
    """Cut the least important units of all groups until `cost` of what is left is at most `most`.

    The threshold under which units go is found by bisection. Rounding makes steps of it, so what then fits
    under the target is given back, the most important first.

    Raises:
        CompressionError: the smallest model that the groups allow costs more.
    """

    def left_at(threshold: float) -> dict[str, int]:
        return {g.layer: _nearest(g, float((g.importance > threshold).sum())) for g in groups}

    def cost_of(left: Mapping[str, int]) -> int:
        return cost(cut_copy(loaded, _plan(groups, left)))

    if cost(loaded) <= most:
        return ()
    thresholds = np.unique(np.concatenate([group.importance for group in groups]))
    low, high = -1, len(thresholds) - 1
    if (least := cost_of(left_at(thresholds[high]))) > most:
        raise CompressionError(
            f"{loaded.source} cannot be pruned so far",
            found=f"{least / most:.2f} times the target with one multiple of `round_to` left in every group",
            fix="ask for less, or round to a smaller number",
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost_of(left_at(thresholds[middle])) <= most else (middle, high)
    left = left_at(thresholds[high])
    grown = True
    while grown:
        grown = False
        for group in sorted(groups, key=lambda group: _next_importance(group, left), reverse=True):
            more = {**left, group.layer: min(len(group.units), left[group.layer] + group.multiple)}
            if more != left and cost_of(more) <= most:
                left, grown = more, True
    return _plan(groups, left)


def cut(loaded: TorchModule, plan: Sequence[Cut]) -> None:
    """Remove the channels of a plan from the module itself."""
    if not plan:
        return
    graph = _graph_of(loaded)
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


def _graph_of(loaded: TorchModule) -> Any:
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


def _set_heads(module: torch.nn.Module, item: Cut) -> None:
    owner: Any = module.get_submodule(item.layer.rpartition(".")[0])
    assert item.heads is not None  # noqa: S101
    for name in HEAD_COUNTS:
        if isinstance(getattr(owner, name, None), int):
            setattr(owner, name, item.heads)
    if isinstance(getattr(owner, "all_head_size", None), int):
        owner.all_head_size = module.get_submodule(item.layer).out_features


def _nearest(group: Group, wanted: float) -> int:
    """The multiple that is nearest to what is wanted of a group, at least one and at most all."""
    return min(len(group.units), max(1, round(wanted / group.multiple)) * group.multiple)


def _next_importance(group: Group, left: Mapping[str, int]) -> float:
    """That of the first unit that would come back."""
    ranked = np.sort(group.importance)[::-1]
    return float(ranked[left[group.layer]]) if left[group.layer] < len(ranked) else -np.inf


def _plan(groups: Sequence[Group], left: Mapping[str, int]) -> tuple[Cut, ...]:
    """Cut each group to so many units, the least important first."""
    plan = []
    for group in groups:
        order = np.argsort(group.importance, kind="stable")[: len(group.units) - left[group.layer]]
        gone = sorted(channel for unit in order for channel in group.units[unit])
        heads = None if group.head_channels is None else left[group.layer]
        if gone:
            plan.append(Cut(layer=group.layer, channels=tuple(gone), heads=heads))
    return tuple(plan)


def _try_groups(
    loaded: TorchModule, groups: Sequence[Group], alone: list[str]
) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """Leave out the groups without which the module fails or answers in another shape."""
    with quiet(), torch.no_grad():
        before = _shapes(loaded)
    smaller = {group.layer: _nearest(group, len(group.units) - group.multiple) for group in groups}
    if _failure(loaded, _plan(groups, smaller), before) is None:
        return tuple(groups), tuple(alone)
    able = []
    for group in groups:
        failure = _failure(loaded, _plan([group], smaller), before)
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
