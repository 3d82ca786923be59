"""Plans of the prepared models (run.sh pack made them): built, compared with ONNX Runtime, timed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tritonsmith.artifact import TensorSpec, sha256_of
from tritonsmith.engines.tensorrt.builder import build_plan
from tritonsmith.engines.tensorrt.facts import PlanFacts
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions, Profile
from tritonsmith.engines.tensorrt.profiles import filled_profiles
from tritonsmith.engines.tensorrt.session import PlanSession, open_plan
from tritonsmith.errors import PlanError

MODELS = os.environ.get("TRITONSMITH_GPU_MODELS")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not MODELS, reason="run.sh run prepares models, and names them in TRITONSMITH_GPU_MODELS"
    ),
    pytest.mark.timeout(900),
]

LARGEST = 8
BATCHES = (1, 2, 3, LARGEST)
# Smallest cosine of a row with FP32's answer. TF32 keeps 10 bits of a product's operands, FP16 as many.
LEAST_COSINE = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.95}


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A plan of a prepared model, loaded."""

    precision: str
    onnx: Path
    plan: Path
    facts: PlanFacts
    session: PlanSession
    inputs: dict[str, np.ndarray[Any, Any]]
    expected: dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module", params=[(m, p) for m in ("resnet50", "minilm") for p in LEAST_COSINE])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    name, precision = request.param
    assert MODELS is not None
    folder = Path(MODELS) / name
    description = json.loads((folder / "model.json").read_text())
    inputs = tuple(
        TensorSpec(name=spec["name"], dtype=spec["dtype"], shape=tuple(spec["shape"]))
        for spec in description["inputs"]
    )
    with np.load(folder / "reference.npz") as stored:
        arrays = {kind: stored[kind] for kind in stored.files}
    rows, answers = (
        {key.partition(".")[2]: array for key, array in arrays.items() if key.startswith(kind)}
        for kind in ("input.", "output.")
    )
    axes = {"batch": AxisRange(minimum=1, best=LARGEST, maximum=LARGEST)}
    for spec in inputs:
        for axis, length in zip(spec.shape, rows[spec.name].shape, strict=True):
            if isinstance(axis, str) and axis != "batch":
                axes[axis] = AxisRange(minimum=length, best=length, maximum=length)
    options = filled_profiles(PlanOptions(profiles=(Profile(axes=axes),)), inputs, LARGEST)
    out = tmp_path_factory.mktemp("plans") / f"{name}.{precision}.plan"
    onnx = folder / f"{precision}.onnx"
    timing = os.environ.get("TRITONSMITH_GPU_TIMING")  # the benchmark's, which then builds faster
    facts = build_plan(
        onnx,
        out,
        inputs=inputs,
        options=options,
        precision=precision,
        timing_cache=None if timing is None else Path(timing),
    )
    with open_plan(out) as session:
        yield Built(
            precision=precision,
            onnx=onnx,
            plan=out,
            facts=facts,
            session=session,
            inputs=rows,
            expected=answers,
        )


@pytest.mark.parametrize("batch", BATCHES)
def test_plan_answers_as_onnx_runtime_does(built: Built, batch: int) -> None:
    found = built.session.run({name: array[:batch] for name, array in built.inputs.items()})
    assert sorted(found) == sorted(built.expected)
    for name, answers in built.expected.items():
        assert found[name].shape == answers[:batch].shape
        assert found[name].dtype == answers.dtype
        a, b = (part.reshape(batch, -1).astype(np.float64) for part in (answers[:batch], found[name]))
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        assert cosine.min() > LEAST_COSINE[built.precision]


def test_facts_are_those_of_the_files(built: Built) -> None:
    assert built.facts.sha256 == sha256_of(built.plan)
    assert built.facts.size_bytes == built.plan.stat().st_size
    assert built.facts.source_sha256 == sha256_of(built.onnx)
    assert built.facts.precision == built.precision


def test_a_batch_beyond_the_profile_is_refused(built: Built) -> None:
    with pytest.raises(PlanError):
        built.session.run({name: array[: LARGEST + 1] for name, array in built.inputs.items()})


def test_layers_really_run_in_the_precision(built: Built) -> None:
    layers: Any = built.facts.measured["layers"]
    assert layers["count"] > 0
    if any(layer["kind"] == "Myelin" for layer in layers["layers"]):
        pytest.skip("compiled as whole blocks, which do not say what they compute in")
    assert layers["products_by_precision"].get(built.precision, 0) > layers["products"] / 2


@pytest.mark.parametrize("graph", [False, True])
def test_time_is_measured(built: Built, graph: bool) -> None:
    times = built.session.time_runs(
        {name: array[:1] for name, array in built.inputs.items()}, runs=20, graph=graph
    )
    assert len(times) == 20
    assert 0 < min(times) < 1_000_000_000
