"""Groups of coupled channels: what can be removed from a graph, what cannot and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from tritonsmith.compress.cost import Cost
from tritonsmith.compress.pruning.axes import Ids, Rewrite, Walk, label_axes
from tritonsmith.compress.shapes import Shape, infer_shapes

Channels = NDArray[np.int64]  # indices of channels inside of a group


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An axis of a weight: `channels[position]` is the channel of the group, -1 for one of another group."""

    tensor: str
    axis: int
    channels: Channels
    reads: bool  # a product sums over this axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Channels that the same nodes make; each goes from all members at once.

    `width` is how many positions one channel takes in the axis that makes it: the size of a head, the
    number of groups of a convolution. `frozen` is the reason why all of them stay, None where they may go.
    """

    name: str  # of the first node that makes them
    kind: str  # "channels" of convolutions, "neurons" of matrices, "heads" of attention
    nodes: tuple[str, ...]
    size: int
    width: int
    ids: Ids  # [size]
    members: tuple[Member, ...]
    frozen: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A number of FLOPs or parameters that is proportional to what is left of each of these axes.

    An axis is `(channel ids, how often each)`.
    """

    amount: int
    axes: tuple[tuple[Ids, NDArray[np.int64]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is needed to choose channels and to slice a graph.

    `axes` has the ids of every axis of a weight that can shrink, by name and axis.
    """

    groups: tuple[Group, ...]
    axes: Mapping[tuple[str, int], Ids]
    flow: Mapping[str, tuple[tuple[int, Ids], ...]]  # tensor -> its axes with ids
    shapes: Mapping[str, Shape]  # of the whole graph
    rewrites: tuple[Rewrite, ...]
    flops: tuple[Term, ...]
    parameters: tuple[Term, ...]
    roots: Ids  # [ids] the id that stands for each

    def kept_ids(self, kept: Mapping[str, Channels]) -> NDArray[np.bool_]:
        """Whether each id stays, where only these channels stay of the groups named."""
        stays = np.ones(len(self.roots), dtype=np.bool_)
        for group in self.groups:
            if group.name in kept:
                stays[group.ids] = False
                stays[group.ids[kept[group.name]]] = True
        return stays[self.roots]

    @property
    def prunable(self) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.frozen is None)

    @property
    def frozen(self) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.frozen is not None)

    def cost(self, kept: NDArray[np.bool_]) -> Cost:
        """The cost with `kept[id]` telling which ids are left."""
        return Cost(parameters=_sum(self.parameters, kept), flops=_sum(self.flops, kept))


def plan_groups(
    model: onnx.ModelProto, parameters: Mapping[str, int], spared: Mapping[str, str] | None = None
) -> Plan:
    """Find the groups of a graph without Constant nodes.

    `parameters` tells how many parameters each weight counts as; `spared` names nodes to leave alone,
    with the reason.

    Raises:
        CompressionError: the shapes cannot be inferred.
    """
    shapes = infer_shapes(model)
    walk = label_axes(model, shapes, spared or {})
    find = walk.unions.find
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    axes = {
        (name, axis): find(ids)
        for name, labels in walk.labels.items()
        if name in weights
        for axis, ids in enumerate(labels)
        if ids is not None
    }
    groups = _groups(walk, axes)
    return Plan(
        groups=groups,
        axes=axes,
        flow={
            name: tuple((axis, find(ids)) for axis, ids in enumerate(labels) if ids is not None)
            for name, labels in walk.labels.items()
        },
        shapes=shapes.shapes,
        rewrites=tuple(walk.rewrites),
        flops=tuple(_term(cost.flops, [find(ids) for ids in cost.ids]) for cost in walk.costs),
        parameters=tuple(
            _term(count, [axes[name, axis] for axis in range(len(weights[name])) if (name, axis) in axes])
            for name, count in parameters.items()
        ),
        roots=find(np.arange(walk.unions.count)),
    )


def _groups(walk: Walk, axes: Mapping[tuple[str, int], Ids]) -> tuple[Group, ...]:
    find = walk.unions.find
    reasons: dict[int, str] = {}
    for ids, reason in walk.frozen:
        for root in np.unique(find(ids)).tolist():
            reasons.setdefault(root, reason)
    heads = (
        set(np.unique(np.concatenate([find(ids) for ids in walk.heads])).tolist()) if walk.heads else set()
    )
    makers: dict[int, list[int]] = {}
    for index, producer in enumerate(walk.producers):
        for root in np.unique(find(producer.ids)).tolist():
            makers.setdefault(root, []).append(index)
    alike: dict[tuple[tuple[int, ...], str | None], list[int]] = {}
    for root, indices in makers.items():
        alike.setdefault((tuple(indices), reasons.get(root)), []).append(root)
    members = _members(list(alike.values()), axes, _reading(walk, axes))
    groups = []
    for ((made_by, why), roots), found in zip(alike.items(), members, strict=True):
        producers = [walk.producers[index] for index in made_by]
        first = find(producers[0].ids)
        ids = np.array(sorted(roots), dtype=np.int64)
        kind = "heads" if ids[0] in heads else "channels"
        if kind != "heads" and all(producer.kind == "neurons" for producer in producers):
            kind = "neurons"
        groups.append(
            Group(
                name=producers[0].node,
                kind=kind,
                nodes=tuple(dict.fromkeys(producer.node for producer in producers)),
                size=len(ids),
                width=int((first == ids[0]).sum()),
                ids=ids,
                members=found,
                frozen=why,
            )
        )
    return _named_apart(groups)


def _reading(walk: Walk, axes: Mapping[tuple[str, int], Ids]) -> set[tuple[str, int]]:
    """The axes of weights that products sum over: told by ids before they are joined."""
    read = set(np.concatenate(walk.reads).tolist()) if walk.reads else set()
    found = set()
    for name, axis in axes:
        ids = walk.labels[name][axis]
        if ids is not None and int(ids[0]) in read:
            found.add((name, axis))
    return found


def _members(
    sets: list[list[int]], axes: Mapping[tuple[str, int], Ids], reading: set[tuple[str, int]]
) -> list[tuple[Member, ...]]:
    """For each set of ids, the axes of weights that they occur in."""
    home, rank = {}, {}
    for index, roots in enumerate(sets):
        for channel, root in enumerate(sorted(roots)):
            home[root], rank[root] = index, channel
    found: list[list[Member]] = [[] for _ in sets]
    for (tensor, axis), ids in axes.items():
        homes = np.array([home.get(root, -1) for root in ids.tolist()])
        ranks = np.array([rank.get(root, -1) for root in ids.tolist()])
        for index in np.unique(homes[homes >= 0]).tolist():
            channels = np.where(homes == index, ranks, -1)
            found[index].append(
                Member(tensor=tensor, axis=axis, channels=channels, reads=(tensor, axis) in reading)
            )
    return [tuple(members) for members in found]


def _named_apart(groups: list[Group]) -> tuple[Group, ...]:
    """A node may make several groups; they are told apart by a number."""
    seen: dict[str, int] = {}
    named = []
    for group in groups:
        count = seen[group.name] = seen.get(group.name, 0) + 1
        named.append(group if count == 1 else replace(group, name=f"{group.name} ({count})"))
    return tuple(named)


def _term(amount: int, axes: list[Ids]) -> Term:
    counted = []
    for ids in axes:
        roots, counts = np.unique(ids, return_counts=True)
        counted.append((roots, counts))
    return Term(amount=amount, axes=tuple(counted))


def _sum(terms: tuple[Term, ...], kept: NDArray[np.bool_]) -> int:
    amount = 0.0
    for term in terms:
        share = 1.0
        for roots, counts in term.axes:
            share *= counts[kept[roots]].sum() / counts.sum()
        amount += term.amount * share
    return round(amount)
