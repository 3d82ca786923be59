"""The TensorRT side: builds, checks and times plans, as it is asked to on stdin. Needs numpy and the binding.

plans.py MODELS PLANS     prepared models; where plans are kept between runs
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from reference import agreement, first_rows, read_description, read_rows
from worker import answer_requests

from tritonsmith.artifact import TensorSpec, sha256_of
from tritonsmith.engines.tensorrt.builder import build_plan
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions, Profile
from tritonsmith.engines.tensorrt.profiles import filled_profiles
from tritonsmith.engines.tensorrt.session import PlanSession, open_plan
from tritonsmith.engines.tensorrt.versions import device, import_tensorrt, why_unavailable
from tritonsmith.errors import TritonsmithError
from tritonsmith.files import write_text_atomically

# Both take every batch; one is tuned for small ones, one for the largest.
BEST_BATCHES = (8, 128)
LARGEST = max(BEST_BATCHES)


class Plans:
    """What one process has loaded."""

    def __init__(self, models: Path, kept: Path) -> None:
        self.models, self.kept = models, kept
        self._sessions: dict[tuple[str, str, int], PlanSession] = {}
        self._rows: dict[str, tuple[Any, Any]] = {}

    def facts(self) -> dict[str, Any]:
        """Versions and the GPU, or why there is none."""
        if (reason := why_unavailable()) is not None:
            return {"unavailable": reason}
        return {
            "tensorrt": str(import_tensorrt().__version__),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "gpu": asdict(device()),
        }

    def build(self, model: str, precision: str) -> dict[str, Any]:
        """The facts of a plan, built now or in an earlier run on this GPU with these options."""
        source = self.models / model / f"{precision}.onnx"
        plan = self._plan(model, precision)
        record = plan.with_suffix(".json")
        options = self._options(model)
        key = {"source": sha256_of(source), "options": repr(options), "facts": self.facts()}
        if plan.is_file() and record.is_file():
            known = json.loads(record.read_text(encoding="utf-8"))
            if known["key"] == key:
                return {**known["plan"], "kept": True}
        plan.parent.mkdir(parents=True, exist_ok=True)
        facts = build_plan(
            source,
            plan,
            inputs=self._inputs(model),
            options=options,
            precision=precision,
            timing_cache=self.kept / "timing",
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        built = asdict(facts)
        layers = built["measured"].get("layers")
        if isinstance(layers, dict):  # every layer is some hundred lines; the counts say what is asked
            built["measured"]["layers"] = {k: v for k, v in layers.items() if not isinstance(v, list)}
        write_text_atomically(record, json.dumps({"key": key, "plan": built}, default=str) + "\n")
        return {**json.loads(json.dumps(built, default=str)), "kept": False}

    def prepare(self, model: str, precision: str, mode: str, batch: int) -> dict[str, Any]:
        """Load the plan, run it on the first `batch` rows, and compare with ONNX Runtime's FP32."""
        began_s = time.perf_counter()
        inputs, expected = self._first(model, batch)
        found = self._session(model, precision, batch).run(inputs)
        return {"agreement": agreement(expected, found), "prepare_s": time.perf_counter() - began_s}

    def time(
        self, model: str, precision: str, mode: str, batch: int, *, clock: str, runs: int, warmup: int
    ) -> dict[str, Any]:
        """ns of each of `runs` executions; `clock` "gpu" by CUDA events, "call" from numpy to numpy."""
        inputs, _ = self._first(model, batch)
        session = self._session(model, precision, batch)
        if clock == "call":
            return {"ns": session.time_runs(inputs, runs=runs, warmup=warmup, clock="wall")}
        return {"ns": session.time_runs(inputs, runs=runs, warmup=warmup, graph=mode == "graph")}

    def _plan(self, model: str, precision: str) -> Path:
        return self.kept / "plans" / f"{model}.{precision}.plan"

    def _inputs(self, model: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name=spec["name"], dtype=spec["dtype"], shape=tuple(spec["shape"]))
            for spec in read_description(self.models / model)["inputs"]
        )

    def _options(self, model: str) -> PlanOptions:
        inputs = self._inputs(model)
        rows, _ = self._all(model)
        fixed = {
            axis: AxisRange(minimum=length, best=length, maximum=length)
            for spec in inputs
            for axis, length in zip(spec.shape[1:], rows[spec.name].shape[1:], strict=True)
            if isinstance(axis, str)
        }
        profiles = tuple(
            Profile(axes={"batch": AxisRange(minimum=1, best=best, maximum=LARGEST), **fixed})
            for best in BEST_BATCHES
        )
        return filled_profiles(PlanOptions(profiles=profiles), inputs, LARGEST)

    def _session(self, model: str, precision: str, batch: int) -> PlanSession:
        profile = 0 if batch <= 2 * BEST_BATCHES[0] else 1
        key = (model, precision, profile)
        if key not in self._sessions:
            self._sessions[key] = open_plan(self._plan(model, precision), profile=profile)
        return self._sessions[key]

    def _all(self, model: str) -> tuple[Any, Any]:
        if model not in self._rows:
            self._rows[model] = read_rows(self.models / model)
        return self._rows[model]

    def _first(self, model: str, batch: int) -> tuple[Any, Any]:
        rows, answers = self._all(model)
        return first_rows(rows, batch), first_rows(answers, batch)


def main() -> None:
    plans = Plans(Path(sys.argv[1]), Path(sys.argv[2]))
    answer_requests(
        {"facts": plans.facts, "build": plans.build, "prepare": plans.prepare, "time": plans.time},
        (TritonsmithError,),
    )


if __name__ == "__main__":
    main()
