"""A trained model to a smaller ONNX file with its evidence, without a repository: `tritonsmith compress`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress.search.goal import SearchGoal
from tritonsmith.compress.steps import StepSpec
from tritonsmith.errors import UsageError
from tritonsmith.files import existing_parent, refuse_overwrite, staging_folder, write_text_atomically
from tritonsmith.gate import GateReport, check_budget
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.metrics import Metric, parse_metric
from tritonsmith.recipe import BACKENDS, BuildRequest
from tritonsmith.samples import Samples, check_npz

if TYPE_CHECKING:
    from tritonsmith.candidates import Goal
    from tritonsmith.chain_build import Chain
    from tritonsmith.compress.search.goal import Progress
    from tritonsmith.compress.search.outcome import SearchResult

Say = Callable[[str], None]
Show = Callable[["Progress"], None]

BATCH_SIZE = 8  # of the largest batch that candidates are tried with; nothing is served here


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressRequest:
    """A trained model to compress into `out`, by `steps` or by what `search` finds."""

    source: str
    out: Path
    steps: tuple[StepSpec, ...] = ()
    search: SearchGoal | None = None
    backend: str = "onnxruntime"  # the engine that candidates are judged and timed on
    calibration: Path | None = None
    training: Path | None = None
    tuning: Path | None = None
    evaluation: Path | None = None
    metric: str | None = None
    max_drop: float | None = None
    convert: ConvertOptions = field(default_factory=ConvertOptions)
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressReport:
    """What was written, and how it was found; `passed` is None where there was nothing to judge with."""

    artifact: Artifact
    record: Path  # the JSON beside it
    chain: Chain
    search: SearchResult | None
    passed: bool | None
    duration_s: float

    @property
    def gate(self) -> GateReport | None:
        return self.chain.candidates[-1].gate

    def json(self) -> dict[str, Json]:
        return {
            "path": str(self.artifact.path),
            "precision": self.artifact.precision,
            "bytes": onnx_model.model_bytes(self.artifact.path),
            "passed": self.passed,
            "duration_s": round(self.duration_s, 3),
            "gate": None if self.gate is None else self.gate.json(),
            "ledger": self.chain.ledger.json(),
            "candidates": [candidate.json() for candidate in self.chain.candidates],
            "search": None if self.search is None else self.search.json(),
            "steps": [asdict(step) for step in self.artifact.steps],
        }


def compress(
    request: CompressRequest, *, say: Say = lambda _: None, show: Show = lambda _: None
) -> CompressReport:
    """Compress, judge and write the model, whether it passes or not, and a record of it beside it.

    A model that fails the gate is written too: what was paid for is not thrown away. `passed` says it.

    Raises:
        UsageError: options that do not fit together, or a file that exists.
        SourceError, SamplesError, CompressionError: what their names say.
    """
    from tritonsmith.chain_build import ROLES, choose_steps, load_roles, make_chain, material_from
    from tritonsmith.compress.chain import convert_once
    from tritonsmith.server.provision import step_store

    began_s = time.perf_counter()
    metric = check_compress_request(request)
    store = step_store()
    with TemporaryDirectory(prefix="tritonsmith-compress-") as temporary:
        folder = Path(temporary)
        fp32 = convert_once(request.source, request.convert, store=store, folder=folder, say=say)
        data = load_roles({role: getattr(request, role) for role in ROLES}, fp32)
        goal = _goal(request, fp32, data, metric)  # missing labels are found before the long work
        material = material_from(
            fp32,
            data,
            engine=request.backend,
            metric=metric,
            max_drop=request.max_drop,
            source=request.source,
            convert=request.convert,
        )
        specs, material, found = choose_steps(
            request.steps, request.search, material, data["evaluation"], store=store, say=say, show=show
        )
        chain = make_chain(specs, material, goal, folder, store=store, say=say)
        artifact = _write(chain.artifacts[-1], request.out)
    gate = chain.candidates[-1].gate
    passed = None if gate is None else gate.passed
    if found is not None:
        passed = found.passed
    report = CompressReport(
        artifact=artifact,
        record=request.out.with_suffix(".json"),
        chain=chain,
        search=found,
        passed=passed,
        duration_s=time.perf_counter() - began_s,
    )
    write_text_atomically(report.record, json.dumps(report.json(), indent=1) + "\n")
    return report


def request_from_build(build: BuildRequest, out: Path, *, force: bool) -> CompressRequest:
    """What a recipe's [model] asks for, without the repository."""
    return CompressRequest(
        source=build.source,
        out=out,
        steps=build.steps,
        search=build.search,
        backend=build.backend,
        calibration=build.calibration,
        training=build.training,
        tuning=build.tuning,
        evaluation=build.evaluation,
        metric=build.metric,
        max_drop=build.max_drop,
        convert=build.convert,
        force=force,
    )


def check_compress_request(request: CompressRequest) -> Metric | None:
    """Raise for what is wrong whatever the model is; the metric, read."""
    if bool(request.steps) == (request.search is not None):
        raise UsageError(
            "compress needs to know what to do" if not request.steps else "steps beside bounds for a search",
            expected="--step, as often as there are steps; or --size-at-most, --speed-at-least or --search",
        )
    if request.backend not in BACKENDS:
        raise UsageError(f"no backend is named {request.backend!r}", expected=", ".join(BACKENDS))
    if request.out.suffix != ".onnx":
        raise UsageError(f"--out {request.out}", expected="the name of an .onnx file")
    existing_parent(request.out)
    refuse_overwrite(request.out, force=request.force)
    for samples in (request.calibration, request.training, request.tuning, request.evaluation):
        if samples is not None:
            check_npz(samples)
    if request.evaluation is None and (request.search is not None or request.metric is not None):
        raise UsageError(
            "nothing can be judged without --evaluation", expected="samples that nothing else has seen"
        )
    if request.evaluation is not None and request.metric is None:
        raise UsageError(
            "--evaluation needs --metric", expected="what to measure, such as accuracy or cosine"
        )
    if request.metric is None:
        return None
    metric = parse_metric(request.metric)
    check_budget(metric, request.max_drop)
    return metric


def _goal(
    request: CompressRequest, fp32: Artifact, data: dict[str, Samples | None], metric: Metric | None
) -> Goal:
    from tritonsmith.candidates import Goal, check_labels

    if metric is not None and data["evaluation"] is not None:
        check_labels(data["evaluation"], metric)
    return Goal(
        precision="chain",
        engine=request.backend,
        max_batch_size=BATCH_SIZE if fp32.batched else 0,
        inference_precision="f32",
        calibration=data["calibration"],
        evaluation=data["evaluation"],
        metric=metric,
        max_drop=request.max_drop,
    )


def _write(artifact: Artifact, out: Path) -> Artifact:
    with staging_folder(out) as folder:
        staged = folder / out.name
        # Data files are named after the model, so that two models in a folder do not share one.
        model = onnx_model.load_editable(artifact.path)
        onnx_model.save_model(model, staged, weights_from=artifact.path.parent)
        for file in reversed(onnx_model.model_files(staged)):
            file.replace(out.parent / file.name)
    return replace(artifact, path=out)
