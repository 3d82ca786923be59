"""What is measured beside each other, how its samples become numbers, and what they say of INT8."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MODELS = ("resnet50", "minilm")
# In this order: where time runs out, a few batches of everything are worth more than all of one.
BATCHES = (1, 8, 128, 32, 2, 64, 4, 16)
ALSO_COMPARED = (3,)  # batches of which the answers are compared, and no more
ALIKE = 0.02  # a ratio within this of 1 is no difference that anyone would notice


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A way to run a model."""

    engine: str  # "tensorrt" or "pytorch"
    precision: str  # "fp32" with TF32 allowed, "fp16", "int8"
    mode: str  # "stream", "eager", "compile", "graph"


SUBJECTS = (
    *(
        Subject(engine="tensorrt", precision=p, mode=m)
        for p in ("fp32", "fp16", "int8")
        for m in ("stream", "graph")
    ),
    *(
        Subject(engine="pytorch", precision=p, mode=m)
        for p in ("fp32", "fp16")
        for m in ("eager", "compile", "graph")
    ),
)


@dataclass(slots=True, kw_only=True)
class Row:
    """One subject on one model at one batch, as it fills up."""

    subject: Subject
    model: str
    batch: int
    agreement: Mapping[str, Any] | None = None  # with ONNX Runtime's FP32, by output
    prepare_s: float | None = None
    unmeasured: str | None = "not reached"  # the reason, where there are no samples
    rounds_ns: dict[str, list[list[int]]] = field(default_factory=lambda: {"gpu": [], "call": []})

    def json(self) -> dict[str, Any]:
        """Percentiles over all samples, the median of each round, and the samples themselves."""
        record: dict[str, Any] = {
            "model": self.model,
            "engine": self.subject.engine,
            "precision": self.subject.precision,
            "mode": self.subject.mode,
            "batch": self.batch,
            "unmeasured": self.unmeasured,
            "agreement": self.agreement,
            "prepare_s": self.prepare_s,
        }
        for clock, rounds in self.rounds_ns.items():
            record |= {f"{clock}_{name}": value for name, value in summary_of(rounds, self.batch).items()}
        return record


def summary_of(rounds_ns: Sequence[Sequence[int]], batch: int) -> dict[str, Any]:
    """Median, 99th percentile, throughput, the rounds' medians and their spread; None without samples."""
    samples = sorted(ns for one in rounds_ns for ns in one)
    if not samples:
        return {
            "p50_us": None,
            "p99_us": None,
            "per_s": None,
            "rounds_p50_us": [],
            "spread": None,
            "rounds_ns": [],
        }
    medians = [statistics.median(one) / 1000 for one in rounds_ns]
    p50_us = statistics.median(samples) / 1000
    return {
        "p50_us": p50_us,
        "p99_us": samples[max(0, math.ceil(0.99 * len(samples)) - 1)] / 1000,
        "per_s": batch * 1e6 / p50_us,
        "rounds_p50_us": medians,
        "spread": (max(medians) - min(medians)) / statistics.median(medians),
        "rounds_ns": [list(one) for one in rounds_ns],
    }


def int8_verdicts(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """INT8 beside FP16, both as CUDA graphs, round by round; `faster` is False where nobody would notice."""
    found = {
        (row.model, row.batch, row.subject.precision): row.rounds_ns["gpu"]
        for row in rows
        if row.subject.engine == "tensorrt" and row.subject.mode == "graph"
    }
    verdicts = []
    for (model, batch, precision), int8 in sorted(found.items()):
        fp16 = found.get((model, batch, "fp16"), [])
        if precision != "int8" or not int8 or not fp16:
            continue
        ratios = [
            statistics.median(slow) / statistics.median(fast) for slow, fast in zip(fp16, int8, strict=False)
        ]
        ratio = statistics.median(ratios)
        verdicts.append(
            {
                "model": model,
                "batch": batch,
                "int8_as_fast_as_fp16": ratio,
                "low": min(ratios),
                "high": max(ratios),
                "faster": min(ratios) > 1.0 and ratio > 1.0 + ALIKE,
            }
        )
    return verdicts
