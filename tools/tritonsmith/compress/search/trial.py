"""One candidate of a search: a chain of steps, what it made, and how that compares with FP32.

Measurements are kept beside the models, by content: `<store>/measured/<hash>.json`. Their key holds the
model, what it is compared with, the data, the metric, the engine, the tools and the processor; for a speed
the machine as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json, sha256_of
from tritonsmith.compress.cost import cost_of, lengths_in
from tritonsmith.compress.search.pareto import Point, point_of
from tritonsmith.compress.step_text import json_from_spec, text_from_spec
from tritonsmith.compress.steps import StepSpec
from tritonsmith.compress.store import key_of
from tritonsmith.engines import open_session
from tritonsmith.errors import RepositoryError, UsageError
from tritonsmith.files import write_text_atomically
from tritonsmith.gate import GateReport, WorstClass, judge, predict
from tritonsmith.machine import describe_machine
from tritonsmith.measure import THREADS, SpeedRatio, compare_speed
from tritonsmith.metrics import Metric, metric_module
from tritonsmith.samples import Samples
from tritonsmith.user_code import files_of_module

MEASURED = "measured"
UNCHANGED = "fp32"

Outputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A candidate that was made and measured; `evaluation` only where it came to the final judgement."""

    specs: tuple[StepSpec, ...]
    artifact: Artifact
    size_bytes: int
    graph_bytes: int  # of these, what is no weight
    parameters: int
    flops: int  # of one sample
    tuning: GateReport  # on the data that choices are made on
    speed: SpeedRatio
    evaluation: GateReport | None = None

    @property
    def name(self) -> str:
        return name_of(self.specs)

    @property
    def drop(self) -> float:
        return self.tuning.drop

    def point(self) -> Point:
        """Its place among the others, on the tuning data."""
        return point_of(self.name, size_bytes=self.size_bytes, speed=self.speed.ratio, drop=self.drop)

    def json(self) -> dict[str, Json]:
        return {
            "name": self.name,
            "steps": [json_from_spec(spec) for spec in self.specs],
            "path": str(self.artifact.path),
            "bytes": self.size_bytes,
            "parameters": self.parameters,
            "flops": self.flops,
            "tuning": self.tuning.json(),
            "speed": self.speed.json(),
            "evaluation": None if self.evaluation is None else self.evaluation.json(),
        }


def name_of(specs: tuple[StepSpec, ...]) -> str:
    """A chain as text: each step as a command line writes it."""
    return " | ".join(text_from_spec(spec) for spec in specs) or UNCHANGED


class Yardstick:
    """The FP32 model on one set of samples, and how candidates compare with it; its answers are made once."""

    def __init__(
        self,
        teacher: Artifact,
        samples: Samples,
        metric: Metric,
        *,
        engine: str,
        store: Path,
        batch_size: int,
    ) -> None:
        self.teacher, self.samples, self.metric = teacher, samples, metric
        self._engine, self._batch_size = engine, batch_size
        self._folder = store / MEASURED
        self._answers: Outputs | None = None
        self._common = {
            "teacher": onnx_model.model_sha256(teacher.path),
            "samples": samples.sha256,
            "engine": engine,
        }
        self.machine: Mapping[str, Json] = describe_machine()

    def measure(self, specs: tuple[StepSpec, ...], artifact: Artifact) -> Trial:
        """Size, cost, drop and speed of a candidate.

        Raises:
            EngineError: the engine refuses it.
        """
        cost = cost_of(artifact.path, lengths=lengths_in(self.samples, artifact))
        return Trial(
            specs=specs,
            artifact=artifact,
            size_bytes=onnx_model.model_bytes(artifact.path),
            graph_bytes=_graph_bytes(artifact.path),
            parameters=cost.parameters,
            flops=cost.flops,
            tuning=self.judge(artifact, max_drop=None),
            speed=self.time(artifact),
        )

    def judge(self, artifact: Artifact, *, max_drop: float | None) -> GateReport:
        """The gate's report on the samples; without a budget it is recorded only."""
        parts: dict[str, Json] = {
            **self._common,
            "what": "gate",
            "model": onnx_model.model_sha256(artifact.path),
            "metric": [self.metric.text, *_code_of(self.metric)],
            "batch_size": self._batch_size,
            "max_drop": max_drop,
        }
        return gate_from_json(self._kept(parts, lambda: self._judge(artifact, max_drop).json()))

    def time(self, artifact: Artifact) -> SpeedRatio:
        """The speed of one sample on one thread, beside FP32 in the same rounds."""
        parts: dict[str, Json] = {
            **self._common,
            "what": "speed",
            "model": onnx_model.model_sha256(artifact.path),
            "machine": dict(self.machine),
            "threads": THREADS,
        }
        return speed_from_json(self._kept(parts, lambda: self._time(artifact).json()))

    def _judge(self, artifact: Artifact, max_drop: float | None) -> GateReport:
        if self._answers is None:
            self._answers = self._predict(self.teacher)
        same = artifact.path == self.teacher.path
        return judge(
            self.metric,
            baseline=self._answers,
            candidate=self._answers if same else self._predict(artifact),
            target=self.samples.target,
            max_drop=max_drop,
        )

    def _predict(self, artifact: Artifact) -> Outputs:
        session = open_session(artifact.path, engine=self._engine)
        return predict(session, self.samples, batched=artifact.batched, batch_size=self._batch_size)

    def _time(self, artifact: Artifact) -> SpeedRatio:
        pair = [
            open_session(path, engine=self._engine, threads=THREADS)
            for path in (self.teacher.path, artifact.path)
        ]
        batched = artifact.batched
        inputs = {name: array[:1] if batched else array[0] for name, array in self.samples.arrays.items()}
        speed = compare_speed(pair[0], pair[1], inputs, batch_size=1)
        if artifact.path == self.teacher.path:  # timed for its latency; what differs is noise
            return replace(speed, ratio=1.0, low=1.0, high=1.0)
        return speed

    def _kept(self, parts: dict[str, Json], make: Callable[[], dict[str, Json]]) -> dict[str, Any]:
        path = self._folder / f"{key_of(parts)}.json"
        if not path.is_file():
            write_text_atomically(path, json.dumps(make(), indent=1) + "\n")
        try:
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RepositoryError(
                f"{path} is damaged", found=error, fix="remove it, and it is measured again"
            ) from error
        return kept


def gate_from_json(record: Mapping[str, Any]) -> GateReport:
    """What `GateReport.json` wrote; a number that could not be computed is NaN again."""
    values = {field.name: record[field.name] for field in fields(GateReport)}
    for name in ("baseline", "candidate", "drop"):
        values[name] = math.nan if values[name] is None else values[name]
    worst = values["worst_class"]
    values["worst_class"] = None if worst is None else WorstClass(**worst)
    return GateReport(**values)


def speed_from_json(record: Mapping[str, Any]) -> SpeedRatio:
    """What `SpeedRatio.json` wrote."""
    return SpeedRatio(**{field.name: record[field.name] for field in fields(SpeedRatio)})


def _graph_bytes(path: Path) -> int:
    graph = onnx_model.load_model(path, with_weights=False).graph  # weights outside are not read
    return path.stat().st_size - sum(len(tensor.raw_data) for tensor in graph.initializer)


def _code_of(metric: Metric) -> list[str]:
    module = metric_module(metric.text)
    if module is None:
        return []
    return [sha256_of(file) for file in files_of_module(module, f"the metric {metric.text}", UsageError)]
