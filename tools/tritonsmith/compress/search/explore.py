"""The order in which a search tries things, and when it stops trying them.

What ends a branch: a first part that loses more than the budget for certain, since later steps add to that;
a size that cannot be reached by arithmetic; a bound that is met already. Each is kept as a reason.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from tritonsmith.compress.search.goal import is_beyond, is_within, misses, ordered
from tritonsmith.compress.search.space import ROWS_MULTIPLE, Chain, Facts, Family, families_of
from tritonsmith.compress.search.trial import Trial, name_of
from tritonsmith.compress.steps import Cast, Quantize, QuantizeWeights, ShareRows
from tritonsmith.console import human_bytes

if TYPE_CHECKING:
    from tritonsmith.compress.search.search import Run

LEVELS = 6  # of one family: halvings, then bisection
RESCUES = 2  # levels too large for the bound, tried for a best effort
SLACK = 0.95  # of an expected size
HALVING = 2.0
NOTHING_LOST = 0.25  # of the budget: a finer calibrator has little to win back
MOST_TAILS = 2
HOPELESS = 5.0  # times the budget: no patience brings that back
CALIBRATORS = ("percentile", "entropy", "mse")
MANY_WEIGHTS = 0.3  # share of the weights from which a step that only touches these is worth a try


def explore(run: Run, facts: Facts) -> None:
    """Try candidates until the bounds are met or nothing sensible is left."""
    try_narrowings(run, facts)
    if _met(run, "smaller models"):
        return
    tails = pick_tails(run, facts)
    goal = run.goal
    families = families_of(
        facts, sized=goal.size_at_most_bytes is not None, paced=goal.speed_at_least is not None
    )
    if not facts.trained_on:
        run.skip("distillation, and pruning by more than a third", facts.untrained)
    for index, family in enumerate(families):
        descend(run, family, tails)
        if _met(run, ", ".join(rest.name for rest in families[index + 1 :])):
            return


def try_narrowings(run: Run, facts: Facts) -> None:
    """The whole model in narrower numbers."""
    dynamic = None
    if facts.transformer and run.material.engine == "onnxruntime":
        dynamic = run.consider(Quantize(method="dynamic"))
    if dynamic is not None and is_within(dynamic.tuning, run.goal.max_drop):
        run.skip("static INT8", f"dynamic INT8 suits this graph, and loses {dynamic.drop:+.4f} only")
    else:
        _try_static(run, facts)
    _try_weights(run, facts)
    _try_shared_rows(run, facts)
    half = run.trials[0].size_bytes / 2
    bound = run.goal.size_at_most_bytes
    if bound is not None and 0.9 * half > bound and _acceptable(run):
        run.skip("cast", f"FP16 halves the file to about {human_bytes(int(half))}, more than the bound")
    else:
        run.consider(Cast(to="fp16"))


def _try_static(run: Run, facts: Facts) -> None:
    if run.material.calibration is None:
        run.skip("static INT8", "there is no calibration data: give it with --calibration")
        return
    budget = run.goal.max_drop
    first = run.consider(Quantize(method="static"))
    if first is None:
        return
    found = [first]
    if first.drop <= NOTHING_LOST * budget:
        reason = f"min-max loses {first.drop:+.4f}, and no calibrator saves bytes or time"
        run.skip("other calibrators", reason)
    else:
        tried = [run.consider(Quantize(method="static", calibrator=name)) for name in CALIBRATORS]
        found += [trial for trial in tried if trial is not None]
    best = min(found, key=lambda trial: trial.drop)
    if is_within(best.tuning, budget):
        return
    spec = best.specs[-1]
    assert isinstance(spec, Quantize)  # noqa: S101 - made above
    calibrator = spec.calibrator
    if facts.transformer:
        run.consider(Quantize(method="static", calibrator=calibrator, smooth=0.5))
    run.consider(Quantize(method="static", calibrator=calibrator, mixed=True))
    if facts.trained_on:
        run.consider(Quantize(method="static", calibrator=calibrator, epochs=facts.epochs))


def _try_weights(run: Run, facts: Facts) -> None:
    share = facts.multiplied + facts.embedded
    if share < MANY_WEIGHTS:
        reason = (
            f"only {share:.0%} of the weights are in matrix products and tables, the rest in convolutions"
        )
        run.skip("INT4 weights", reason)
        return
    if facts.transformer:
        run.consider(QuantizeWeights(bits=4, arithmetic="int8"))
    four = run.consider(QuantizeWeights(bits=4))
    if four is None or is_beyond(four.tuning, run.goal.max_drop):
        run.consider(QuantizeWeights(bits=8))


def _try_shared_rows(run: Run, facts: Facts) -> None:
    if facts.embedded < MANY_WEIGHTS:
        return
    rows = math.ceil(facts.used_rows / ROWS_MULTIPLE) * ROWS_MULTIPLE
    if not facts.used_rows:
        run.skip("share-rows", "there is no calibration data that says which rows of the table are used")
    elif rows >= 0.9 * facts.table_rows:
        run.skip("share-rows", f"the calibration data use {facts.used_rows} of {facts.table_rows} rows")
    elif run.consider(ShareRows(rows=rows)) is not None:
        for tail in pick_tails(run, facts):
            run.consider(ShareRows(rows=rows), *tail)


def pick_tails(run: Run, facts: Facts) -> list[Chain]:
    """What smaller models are finished with: the smallest and the fastest narrowing that is not hopeless."""
    usable = _acceptable(run)
    if not usable:
        run.skip("a narrowing after other steps", "each loses more than the budget on the whole model")
        return []
    small = min(usable, key=lambda trial: trial.size_bytes)
    fast = max(usable, key=lambda trial: trial.speed.ratio)
    return list(dict.fromkeys((small.specs, fast.specs)))[:MOST_TAILS]


def _acceptable(run: Run) -> list[Trial]:
    narrow = (Quantize, QuantizeWeights, Cast)
    return [
        trial
        for trial in run.trials
        if trial.specs
        and isinstance(trial.specs[-1], narrow)
        and all(isinstance(spec, (*narrow, ShareRows)) for spec in trial.specs)
        and not is_beyond(trial.tuning, run.goal.max_drop)
    ]


def descend(run: Run, family: Family, tails: list[Chain]) -> None:
    """Smaller and smaller until the budget does not hold, then levels between.

    Levels are whole numbers on a grid that is the same in every search, so that another one meets them again.
    """
    level: int | None = start_of(run, family, tails)
    kept, lost, left = 0, None, LEVELS
    lossy: Trial | None = None  # at level `lost`; more training is tried once
    patience = family.patient is not None
    while level is not None and left:
        left -= 1
        tried = _try_level(run, family.chain(family.share(level)), tails)
        if tried is None or run.met():
            return
        if is_within(tried.tuning, run.goal.max_drop):
            kept = level
        else:
            lost, lossy = level, tried
            if patience and run.goal.bounded:
                patience = False
                _try_patience(run, family, level, tried, tails)
                if run.met():
                    return
            if left > RESCUES and _too_large(run, family, level, tried):
                left = RESCUES
        level = _next_level(run, family, kept, lost, tried)
    if patience and lost is not None and lossy is not None:
        _try_patience(run, family, lost, lossy, tails)


def start_of(run: Run, family: Family, tails: list[Chain]) -> int:
    """The first level that can keep the bounds, if weights shrink with the share, and time with the FLOPs."""
    goal, shares = run.goal, []
    ends = [trial for trial in run.trials if trial.specs in tails] or run.trials[:1]
    if goal.size_at_most_bytes is not None:
        share = max(_share_for(trial, goal.size_at_most_bytes) for trial in ends)
        if share > 0:
            shares.append(share)
        else:
            graph = min(trial.graph_bytes for trial in ends)
            reason = f"the graph alone, without its weights, has {human_bytes(graph)}"
            run.skip(f"{family.name}, as far as the bound on the size", reason)
    if goal.speed_at_least is not None and family.axis != "parameters":
        shares.append(max(trial.speed.ratio for trial in ends) / goal.speed_at_least)
    first = 1 if family.axis == "depth" else family.level_for(1 / HALVING)
    level = family.level_for(min(shares)) if shares and min(shares) < 1 else first
    if level > family.deepest:
        least = family.share(family.deepest)
        why = "without training" if not family.epochs else "something must be left"
        run.skip(f"{family.name}, to {family.share(level):.3g}", f"{why}: no more than to {least:.2g}")
    return min(level, family.deepest)


def _share_for(trial: Trial, size_bytes: int) -> float:
    """The share of the weights that may stay in this model so that it has `size_bytes`."""
    return (size_bytes - trial.graph_bytes) / max(1, trial.size_bytes - trial.graph_bytes)


def _try_level(run: Run, chain: Chain, tails: list[Chain]) -> Trial | None:
    """The best of a smaller model finished by each tail; None where it cannot be made."""
    goal = run.goal
    bare = run.consider(*chain)
    if bare is None:
        return None
    if is_beyond(bare.tuning, goal.max_drop):
        for tail in tails:
            reason = f"its first part alone loses {bare.drop:+.4f}, beyond the budget for certain"
            run.skip(name_of((*chain, *tail)), reason)
        return bare
    finished = []
    expected = {tail: _expected_bytes(run, bare, tail) for tail in tails}
    for tail in tails:
        bound = goal.size_at_most_bytes
        if bound is not None and SLACK * expected[tail] > bound and expected[tail] > min(expected.values()):
            about = human_bytes(expected[tail])
            run.skip(name_of((*chain, *tail)), f"it would have about {about}, more than the bound")
            continue
        trial = run.consider(*chain, *tail)
        if trial is not None:
            finished.append(trial)
    return ordered(finished, run.trials[0], goal)[0] if finished else bare


def _try_patience(run: Run, family: Family, level: int, lossy: Trial, tails: list[Chain]) -> None:
    """More training, where it may bring back what is lost."""
    budget, share = run.goal.max_drop, family.share(level)
    hopeless = lossy.drop > HOPELESS * budget and is_beyond(lossy.tuning, budget)
    if family.patient is None or hopeless:
        reason = f"{lossy.drop:+.4f} is more than {HOPELESS:g} times the budget"
        run.skip(f"more training of {lossy.name}", reason)
        return
    chain = family.chain(share)
    tail = lossy.specs[len(chain) :]
    bare = run.consider(*chain)
    last = tail[-1] if len(tail) == 1 else None
    if bare is not None and is_within(bare.tuning, budget) and isinstance(last, Quantize):
        epochs = max(1, family.epochs // 2)
        trial = run.consider(*chain, replace(last, method="static", epochs=epochs))
        if trial is not None and is_within(trial.tuning, budget):
            return
    _try_level(run, family.patient(share), tails)


def _too_large(run: Run, family: Family, level: int, tried: Trial) -> bool:
    """Whether larger models than this one, which loses too much, cannot keep the bound on the size."""
    bound = run.goal.size_at_most_bytes
    if bound is None or tried.size_bytes <= bound / family.step:
        return False
    run.skip(
        f"{family.name}, to more than {family.share(level):.3g}, for the bound on the size",
        f"this one has {human_bytes(tried.size_bytes)}; larger ones are for the best effort only",
    )
    return True


def _next_level(run: Run, family: Family, kept: int, lost: int | None, tried: Trial) -> int | None:
    if lost is not None:
        return (kept + lost) // 2 if lost - kept > 1 else None
    if kept >= family.deepest:
        return None
    missed = misses(tried, run.goal, tried.tuning)
    further = max(missed.values(), default=HALVING - 1)
    return min(kept + family.level_for(1 / min(HALVING, 1 + further)), family.deepest)


def _expected_bytes(run: Run, bare: Trial, tail: Chain) -> int:
    """What a tail will leave of a smaller model: its graph, and the same share of the weights as before."""
    whole, ended = run.trials[0], next(trial for trial in run.trials if trial.specs == tail)
    left = (ended.size_bytes - ended.graph_bytes) / max(1, whole.size_bytes - whole.graph_bytes)
    return ended.graph_bytes + round((bare.size_bytes - bare.graph_bytes) * left)


def _met(run: Run, rest: str) -> bool:
    if not run.met():
        return False
    if rest:
        run.skip(rest, "a candidate keeps all bounds on the tuning data already")
    return True
