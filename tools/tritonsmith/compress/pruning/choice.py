"""Which channels go: a share of each group, or the least important of all groups until a cost is met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tritonsmith.compress.pruning.groups import Channels, Group, Plan
from tritonsmith.compress.pruning.importance import Scores
from tritonsmith.errors import CompressionError

MOST = 0.9  # no group loses more than this share where a cost is to be met: a layer of two channels is none

Kept = dict[str, Channels]  # group name -> sorted indices of the channels that stay


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many FLOPs or parameters may be left of the `whole` that there were at first."""

    goal: str  # "flops" or "parameters"
    limit: int
    whole: int

    def cost(self, plan: Plan, kept: Mapping[str, Channels]) -> int:
        cost = plan.cost(plan.kept_ids(kept))
        return cost.flops if self.goal == "flops" else cost.parameters


def unit_of(group: Group, round_to: int) -> int:
    """How many channels make up one multiple of `round_to` positions."""
    return round_to // math.gcd(round_to, group.width)


def choose_ratio(groups: Sequence[Group], scores: Scores, *, ratio: float, round_to: int) -> Kept:
    """Keep the best `1 - ratio` of each group, rounded up to `round_to`.

    Raises:
        CompressionError: nothing of some group would be left.
    """
    emptied = [group for group in groups if not 0 <= ratio < 1 or round(group.size * (1 - ratio)) == 0]
    if emptied:
        smallest = min(emptied, key=lambda group: group.size)
        raise CompressionError(
            f"a ratio of {ratio:g} would empty {len(emptied)} of {len(groups)} groups",
            found=f"{smallest.name} has {smallest.size} {smallest.kind}",
            expected="at least one channel left in each, and a ratio from 0 up to 1",
            fix="lower the ratio, or name the small ones in keep",
        )
    return {
        group.name: _best(scores[group.name], _round_up(group, group.size * (1 - ratio), round_to))
        for group in groups
    }


def choose_budget(
    plan: Plan,
    groups: Sequence[Group],
    scores: Scores,
    budget: Budget,
    *,
    round_to: int,
    least: Mapping[str, int],
) -> Kept:
    """Remove the channels of lowest score, of all groups alike, until the budget is met.

    The threshold is found by bisection; then steps of `round_to` channels come back, best first, as far as
    the budget lets them. `least` has how many channels of each group stay in any case.

    Raises:
        CompressionError: the budget cannot be met with these groups.
    """
    order = np.sort(np.concatenate([scores[group.name] for group in groups])) if groups else np.empty(0)

    def kept_at(count: int) -> Kept:
        bar = order[count - 1] if count else -np.inf
        return {
            group.name: _best(
                scores[group.name],
                _round_up(group, max((scores[group.name] > bar).sum(), least[group.name]), round_to),
            )
            for group in groups
        }

    low, high = 0, len(order)
    if budget.cost(plan, kept_at(high)) > budget.limit:
        raise _unreachable(plan, groups, budget, kept_at(high))
    while low < high:
        middle = (low + high) // 2
        if budget.cost(plan, kept_at(middle)) <= budget.limit:
            high = middle
        else:
            low = middle + 1
    return _give_back(plan, groups, scores, budget, kept_at(low), round_to)


def score_per_cost(plan: Plan, groups: Sequence[Group], scores: Scores, budget: Budget) -> Scores:
    """Scores that are losses, over what one channel of the group costs: the loss of each FLOP saved."""
    whole = budget.cost(plan, {})
    prices = {
        group.name: max(1, whole - budget.cost(plan, {group.name: np.arange(1, group.size)}))
        for group in groups
    }
    return {group.name: scores[group.name] / prices[group.name] for group in groups}


def _give_back(
    plan: Plan, groups: Sequence[Group], scores: Scores, budget: Budget, kept: Kept, round_to: int
) -> Kept:
    """Let steps of channels back in, the most important first, while the budget still holds."""
    closed: set[str] = set()
    while True:
        worth: dict[str, float] = {}
        for group in groups:
            left = len(kept[group.name])
            if left < group.size and group.name not in closed:
                worth[group.name] = float(np.sort(scores[group.name])[::-1][left])
        if not worth:
            return kept
        name = max(worth, key=lambda name: worth[name])
        group = next(group for group in groups if group.name == name)
        more = _round_up(group, len(kept[name]) + 1, round_to)
        trial = {**kept, name: _best(scores[name], more)}
        if budget.cost(plan, trial) <= budget.limit:
            kept = trial
        else:
            closed.add(name)


def _unreachable(plan: Plan, groups: Sequence[Group], budget: Budget, kept: Kept) -> CompressionError:
    frozen = "; ".join(f"{group.name}: {group.frozen}" for group in plan.frozen[:5])
    more = f" and {len(plan.frozen) - 5} more" if len(plan.frozen) > 5 else ""
    asked, reached = (number / max(1, budget.whole) for number in (budget.limit, budget.cost(plan, kept)))
    return CompressionError(
        f"the {budget.goal} cannot be brought to {asked:.3g} of what they were",
        found=f"{reached:.3g} with up to {MOST:.0%} gone of each of {len(groups)} groups; "
        f"stays whole: {frozen or 'nothing'}{more}",
        expected="a share that these groups can reach",
        fix="ask for a larger share, a smaller round_to, or keep fewer nodes",
    )


def least_left(size: int) -> int:
    """How many channels stay of a group that had `size` before anything was pruned."""
    return max(1, math.ceil(size * (1 - MOST)))


def _round_up(group: Group, count: float, round_to: int) -> int:
    unit = unit_of(group, round_to)
    return min(group.size, unit * max(1, math.ceil(round(count, 6) / unit)))


def _best(scores: NDArray[np.float64], count: int) -> Channels:
    """The indices of the highest scores, in order; of equals the first."""
    order = np.argsort(-scores, kind="stable")[:count]
    return np.sort(order).astype(np.int64)
