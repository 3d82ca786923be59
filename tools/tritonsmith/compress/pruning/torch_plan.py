"""How many channels of each group of a PyTorch module stay, by a ratio or by a target for its cost.

torch-pruning's own rounding always goes down, and spares a group that it would leave with nothing, so how
many stay is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tritonsmith.compress.pruning.torch_cut import Cut, Group, cut_copy
from tritonsmith.errors import CompressionError
from tritonsmith.ingest.torch_module import TorchModule


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
        left[group.layer] = nearest(group, first * (1 - ratio) ** part)
    return plan_sizes(groups, left)


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
        return {g.layer: nearest(g, float((g.importance > threshold).sum())) for g in groups}

    def cost_of(left: Mapping[str, int]) -> int:
        return cost(cut_copy(loaded, plan_sizes(groups, left)))

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
    return plan_sizes(groups, left)


def nearest(group: Group, wanted: float) -> int:
    """The multiple that is nearest to what is wanted of a group, at least one and at most all."""
    return min(len(group.units), max(1, round(wanted / group.multiple)) * group.multiple)


def _next_importance(group: Group, left: Mapping[str, int]) -> float:
    """That of the first unit that would come back."""
    ranked = np.sort(group.importance)[::-1]
    return float(ranked[left[group.layer]]) if left[group.layer] < len(ranked) else -np.inf


def plan_sizes(groups: Sequence[Group], left: Mapping[str, int]) -> tuple[Cut, ...]:
    """Cut each group to so many units, the least important first."""
    plan = []
    for group in groups:
        order = np.argsort(group.importance, kind="stable")[: len(group.units) - left[group.layer]]
        gone = sorted(channel for unit in order for channel in group.units[unit])
        heads = None if group.head_channels is None else left[group.layer]
        if gone:
            plan.append(Cut(layer=group.layer, channels=tuple(gone), heads=heads))
    return tuple(plan)
