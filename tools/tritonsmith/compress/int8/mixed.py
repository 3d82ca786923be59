"""Mixed precision: the layers that hurt stay in floating point until the budget holds, and no more of them.

From the most fragile layer on (`sensitivity.py`), a bisection finds how many must stay; then each of those,
the least fragile first, is quantized again where the budget holds without it. Every choice is measured on
the written file, on the tuning data, against the FP32 model that the chain began with. Greedy search in the
order of sensitivity is usual practice (e.g. Wu et al., Integer Quantization for Deep Learning Inference,
arXiv 2004.09602, section 5.2: quantize one layer at a time, order, and leave layers out from the worst on).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonsmith.artifact import Json
from tritonsmith.compress.chain import Material
from tritonsmith.compress.int8.sensitivity import (
    Layer,
    Outputs,
    Sensitivity,
    Write,
    drop_of,
    measure_sensitivity,
    predict_with,
)
from tritonsmith.errors import CompressionError, SamplesError, UsageError
from tritonsmith.gate import ROUNDING
from tritonsmith.metrics import Metric
from tritonsmith.samples import Samples

Say = Callable[[str], None]

MOST_RETRIES = 16  # layers that are tried in INT8 again


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A metric on the tuning data, and how much of it may be lost."""

    metric: Metric
    max_drop: float
    tuning: Samples
    baseline: Outputs  # of the model that the chain began with
    batched: bool
    engine: str

    def drop(self, path: Path) -> float:
        """How much worse the model at `path` is; infinite where its outputs are not finite."""
        found = predict_with(path, self.tuning, batched=self.batched, engine=self.engine)
        return drop_of(self.metric, self.baseline, found, self.tuning)

    def holds(self, drop: float) -> bool:
        return drop <= self.max_drop + ROUNDING


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """What was chosen: `kept` layers stay in floating point; `drop` is that of this choice."""

    kept: tuple[str, ...]  # nodes that name their layers, from the most fragile on
    nodes: frozenset[str]  # all nodes of those layers
    passed: bool
    drop: float
    int8_drop: float  # with every layer in INT8
    max_drop: float
    reason: str
    trials: int
    sensitivity: Sensitivity | None  # None: the budget held without asking

    def measured(self) -> dict[str, Json]:
        return {
            "passed": self.passed,
            "reason": self.reason,
            "max_drop": self.max_drop,
            "drop": _finite(self.drop),
            "int8_drop": _finite(self.int8_drop),
            "kept": list(self.kept),
            "trials": self.trials,
            "sensitivity": None if self.sensitivity is None else self.sensitivity.json(),
        }


def budget_of(material: Material) -> Budget:
    """What mixed precision is held against.

    Raises:
        SamplesError: no tuning data, or labels that the metric needs are missing.
        UsageError: no metric or no budget.
    """
    if material.metric is None or material.max_drop is None:
        raise UsageError(
            "mixed precision needs a budget to keep",
            found=f"metric {material.metric and material.metric.text}, max-drop {material.max_drop}",
            expected="a metric and how much of it may be lost",
            fix="add --metric and --max-drop; the metric cosine needs no labels",
        )
    if material.tuning is None:
        raise SamplesError(
            "mixed precision needs tuning data, on which it chooses the layers that stay",
            expected="samples apart from the calibration and the evaluation data",
        )
    teacher = material.teacher
    if material.metric.needs_target and material.tuning.target is None:
        raise SamplesError(
            f"{material.tuning.path} has no labels, which {material.metric.text} needs",
            expected="an array named 'target'",
        )
    return Budget(
        metric=material.metric,
        max_drop=material.max_drop,
        tuning=material.tuning,
        baseline=predict_with(teacher.path, material.tuning, batched=teacher.batched, engine=material.engine),
        batched=teacher.batched,
        engine=material.engine,
    )


def choose_mixed(
    write: Write,
    layers: Sequence[Layer],
    prepared: Path,
    folder: Path,
    *,
    budget: Budget,
    say: Say = lambda _: None,
) -> Mixed:
    """Find the few layers that must stay in floating point for the budget to hold.

    `prepared` is the FP32 graph that `write` quantizes. Where no choice holds the budget, the best that was
    tried comes back with `passed` False and the reason; at least one layer is always quantized.

    Raises:
        CompressionError: there is no layer to quantize.
    """
    if not layers:
        raise CompressionError("the model has no layer that could be quantized, so none can be chosen")
    trial = _Trial(write=write, budget=budget, path=folder / "trial.onnx", drops={})
    int8_drop = trial.drop(())
    say(f"all {len(layers)} layers in INT8: {_told(budget, int8_drop)}")
    if budget.holds(int8_drop):
        return _result(trial, (), int8_drop, None, "the budget holds with every layer in INT8")
    float_drop = budget.drop(prepared)
    if not budget.holds(float_drop):
        reason = (
            f"in floating point the model already loses {float_drop:.4g} against the one that the chain "
            "began with; no choice of layers can bring that back"
        )
        say(f"the budget cannot be met: {reason}")
        return _result(trial, (), int8_drop, None, reason)
    sensitivity = measure_sensitivity(
        write,
        layers,
        prepared,
        budget.tuning,
        folder,
        batched=budget.batched,
        engine=budget.engine,
        metric=budget.metric,
        say=say,
    )
    named = {layer.node: layer for layer in layers}
    order = [named[layer.node] for layer in sensitivity.layers]
    kept = _fewest(trial, order, say)
    if kept is None:
        kept = min(trial.drops, key=lambda choice: (trial.drops[choice], len(choice)))
        reason = (
            f"no choice of layers keeps the budget: even with {len(order) - 1} of {len(order)} layers in "
            f"floating point the drop is {trial.drop(tuple(order[:-1])):.4g}; this is the best that was tried"
        )
        say(f"the budget cannot be met: {reason}")
        return _result(trial, kept, int8_drop, sensitivity, reason)
    kept = _take_back(trial, kept, say)
    reason = f"{len(kept)} of {len(order)} layers stay in floating point: {', '.join(x.node for x in kept)}"
    say(f"{reason}; {_told(budget, trial.drop(kept))}")
    return _result(trial, kept, int8_drop, sensitivity, reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """Choices that were written and measured, each once."""

    write: Write
    budget: Budget
    path: Path
    drops: dict[tuple[Layer, ...], float]

    def drop(self, kept: tuple[Layer, ...]) -> float:
        if kept not in self.drops:
            self.write(_nodes(kept), self.path)
            self.drops[kept] = self.budget.drop(self.path)
        return self.drops[kept]


def _fewest(trial: _Trial, order: list[Layer], say: Say) -> tuple[Layer, ...] | None:
    """The shortest head of `order` that keeps the budget, by bisection; None where none does."""
    failing, holding = 0, len(order)
    while holding - failing > 1:
        middle = (failing + holding) // 2
        drop = trial.drop(tuple(order[:middle]))
        say(f"{middle} of {len(order)} layers in floating point: {_told(trial.budget, drop)}")
        if trial.budget.holds(drop):
            holding = middle
        else:
            failing = middle
    return tuple(order[:holding]) if holding < len(order) else None


def _take_back(trial: _Trial, kept: tuple[Layer, ...], say: Say) -> tuple[Layer, ...]:
    """Quantize again, from the least fragile on, what the budget does not need in floating point."""
    for layer in kept[-2::-1][:MOST_RETRIES]:  # without the last one the budget was just seen to break
        fewer = tuple(other for other in kept if other is not layer)
        drop = trial.drop(fewer)
        if trial.budget.holds(drop):
            say(f"{layer.node} can be INT8 after all: {_told(trial.budget, drop)}")
            kept = fewer
    return kept


def _result(
    trial: _Trial,
    kept: tuple[Layer, ...],
    int8_drop: float,
    sensitivity: Sensitivity | None,
    reason: str,
) -> Mixed:
    names = tuple(layer.node for layer in kept)
    drop = trial.drop(kept)
    return Mixed(
        kept=names,
        nodes=_nodes(kept),
        passed=trial.budget.holds(drop),
        drop=drop,
        int8_drop=int8_drop,
        max_drop=trial.budget.max_drop,
        reason=reason,
        trials=len(trial.drops),
        sensitivity=None if sensitivity is None else sensitivity.keeping(frozenset(names)),
    )


def _nodes(kept: tuple[Layer, ...]) -> frozenset[str]:
    return frozenset(name for layer in kept for name in layer.nodes)


def _told(budget: Budget, drop: float) -> str:
    verdict = "within" if budget.holds(drop) else "beyond"
    return f"{budget.metric.text} drops by {drop:.4g}, {verdict} the budget of {budget.max_drop:g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
