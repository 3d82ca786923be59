"""A trained model to a published version: convert, compress, judge, publish."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tritonsmith.artifact import Artifact, Json, Manifest
from tritonsmith.compress.int8.arithmetic import detect_arithmetic
from tritonsmith.errors import GateRefused, MissingExtraError, RecipeError, RepositoryError, UsageError
from tritonsmith.fingerprint import fingerprint_of
from tritonsmith.ingest import convert, source_sha256
from tritonsmith.recipe import BACKENDS, PRECISIONS, BuildRequest, Recipe, load_recipe
from tritonsmith.repository.config import check_config_table, served_precision
from tritonsmith.repository.entry import Entry, check_repository, config_name, find_entry, publish
from tritonsmith.repository.names import check_name, check_version, versions_of
from tritonsmith.samples import check_npz
from tritonsmith.server.provision import plan_cache, step_store
from tritonsmith.targets.check import check_targets, compiled_here, plan_options_of
from tritonsmith.targets.table import pick_targets

if TYPE_CHECKING:
    from tritonclient.grpc import model_config_pb2

    from tritonsmith.candidates import Candidate, Goal
    from tritonsmith.chain_build import Chain
    from tritonsmith.compress.chain import Material
    from tritonsmith.compress.ledger import Ledger
    from tritonsmith.compress.search.outcome import SearchResult
    from tritonsmith.compress.steps import StepSpec
    from tritonsmith.engines.tensorrt.options import PlanOptions
    from tritonsmith.metrics import Metric
    from tritonsmith.repository.labels import Labels
    from tritonsmith.repository.warmup import Warmup
    from tritonsmith.samples import Samples
    from tritonsmith.targets.build import BuiltTarget

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What was published, or found unchanged; everything else stands in the manifest."""

    entry: Entry
    unchanged: bool
    duration_s: float

    @property
    def manifest(self) -> Manifest:
        return self.entry.manifest

    def json(self) -> dict[str, Json]:
        manifest = self.manifest
        return {
            "name": manifest.name,
            "version": self.entry.version,
            "path": str(self.entry.version_folder),
            "unchanged": self.unchanged,
            "duration_s": round(self.duration_s, 3),
            "source": manifest.source,
            "precision": manifest.precision,
            "backend": manifest.backend,
            "fingerprint": manifest.fingerprint,
            "gate": manifest.gate,
            "candidates": list(manifest.candidates),
            "ledger": manifest.ledger,
            "search": manifest.search,
            "steps": [
                {
                    "name": step.name,
                    "bytes_before": step.bytes_before,
                    "bytes_after": step.bytes_after,
                    "duration_s": step.duration_s,
                    "measured": dict(step.measured),
                }
                for step in manifest.steps
            ],
            "files": dict(manifest.files),
            "targets": [
                {**asdict(target), "config": config_name(target.name), "deferred": target.deferred}
                for target in manifest.targets
            ],
        }


def build(request: BuildRequest, *, say: Say = lambda _: None) -> BuildReport:
    """Publish `request.source` as a new version, or answer from the manifest where nothing changed.

    Raises:
        UsageError: options that do not fit together.
        GateRefused: the precision asked for loses more than the budget; nothing is published.
        PlanError: a target's plan cannot be built on this machine, which is found before the long work.
        SourceError, SamplesError, CompressionError, RepositoryError, RecipeError: what their names say.
    """
    began_s = time.perf_counter()
    check_request(request)
    fingerprint = fingerprint_of(request, arithmetic=detect_arithmetic().options())
    if not request.force:
        entry = find_entry(request.repository, request.name, fingerprint, request.version)
        if entry is not None:
            return BuildReport(entry=entry, unchanged=True, duration_s=time.perf_counter() - began_s)
        _refuse_published(request)
    compiled = compiled_here(request)

    metric = _metric(request)
    with TemporaryDirectory(prefix="tritonsmith-build-") as temporary:
        folder = Path(temporary)
        fp32 = convert(request.source, folder / "fp32" / "model.onnx", request.convert, say=say)
        goal, data, config = _goal(request, fp32, metric)
        options = plan_options_of(request.targets, config, fp32)
        made = _make(request, fp32, goal, data, folder, say)
        model = _model_from(request, made.chosen)
        targets = _build_targets(request, fp32, goal, made, model.config, options, compiled, folder, say)
        entry = _publish(request, made, model, targets, fingerprint, say)
    return BuildReport(entry=entry, unchanged=False, duration_s=time.perf_counter() - began_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """The candidates of the default, one of them chosen, and what they were made by."""

    candidates: list[Candidate]
    specs: tuple[StepSpec, ...] = ()
    material: Material | None = None  # where nothing needs it
    ledger: Ledger | None = None
    search: SearchResult | None = None

    @property
    def chosen(self) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.chosen)


def _make(
    request: BuildRequest,
    fp32: Artifact,
    goal: Goal,
    data: Mapping[str, Samples | None],
    folder: Path,
    say: Say,
) -> _Made:
    from tritonsmith.candidates import choose, judge_candidates, make_candidates
    from tritonsmith.chain_build import material_from

    material = None
    if request.chained or request.targets:
        material = material_from(
            fp32,
            data,
            engine=request.backend,
            metric=goal.metric,
            max_drop=request.max_drop,
            source=request.source,
            convert=request.convert,
        )
    if material is None or not request.chained:
        candidates = make_candidates(fp32, goal, folder, say=say)
        candidates = choose(judge_candidates(candidates, goal, say=say), goal)
        return _Made(candidates=candidates, material=material)
    chain, search = _chain(request, material, goal, data, folder, say)
    return _Made(
        candidates=choose(list(chain.candidates), goal),
        specs=chain.specs,
        material=chain.material,
        ledger=chain.ledger,
        search=search,
    )


def _chain(
    request: BuildRequest,
    material: Material,
    goal: Goal,
    data: Mapping[str, Samples | None],
    folder: Path,
    say: Say,
) -> tuple[Chain, SearchResult | None]:
    from tritonsmith.chain_build import choose_steps, make_chain

    store = step_store()
    specs, material, found = choose_steps(
        request.steps, request.search, material, data["evaluation"], store=store, say=say
    )
    if found is not None and not found.passed:
        raise GateRefused(
            "no candidate keeps all bounds; nothing was published",
            found="; ".join(found.missed) + f" ({found.best.name} is nearest)",
            expected=found.goal.text(),
            fix="; or ".join(found.next_steps) or None,
        )
    return make_chain(specs, material, goal, folder, store=store, say=say), found


def build_recipe(
    path: Path,
    *,
    repository: Path,
    force: bool = False,
    allow_code: bool = False,
    targets: tuple[str, ...] = (),
    defer: bool = False,
    say: Say = lambda _: None,
) -> tuple[BuildReport, ...]:
    """Build every model of a recipe, then its ensembles, in the order in which they are written.

    `targets` names those of the recipe's further targets that are built, `()` all; `defer` leaves their
    plans to the GPU machine.
    """
    recipe = load_recipe(path, repository=repository, force=force, allow_code=allow_code)
    recipe = with_targets(recipe, targets, defer=defer)
    try:
        return _build_all(recipe, force=force, say=say)
    except RecipeError as error:  # one that only the model itself shows
        raise RecipeError(
            f"{path}: {error.what}", found=error.found, expected=error.expected, fix=error.fix
        ) from error


def _build_all(recipe: Recipe, *, force: bool, say: Say) -> tuple[BuildReport, ...]:
    from tritonsmith.repository.ensemble import publish_ensemble

    reports = [build(request, say=say) for request in recipe.builds]
    for ensemble in recipe.ensembles:
        say(f"publishing the ensemble {ensemble.name}")
        began_s = time.perf_counter()
        before = versions_of(ensemble.repository / ensemble.name)
        entry = publish_ensemble(ensemble, say=say)
        unchanged = entry.version in before and not force
        reports.append(
            BuildReport(entry=entry, unchanged=unchanged, duration_s=time.perf_counter() - began_s)
        )
    return tuple(reports)


def with_targets(recipe: Recipe, names: tuple[str, ...], *, defer: bool) -> Recipe:
    """The recipe with those of its targets that `names` names, or all of them."""
    builds = tuple(
        replace(
            request,
            targets=pick_targets(request.targets, names, place=str(recipe.path)),
            defer=defer,
        )
        for request in recipe.builds
    )
    if not builds and (names or defer):
        raise UsageError(f"{recipe.path} has no [model], and so no targets")
    return replace(recipe, builds=builds)


def check_request(request: BuildRequest) -> None:
    """Raise for what is wrong whatever the model is, before anything long begins."""
    check_name(request.name)
    check_version(request.version)
    check_repository(request.repository)
    for samples in (request.calibration, request.training, request.tuning, request.evaluation):
        if samples is not None:
            check_npz(samples)
    check_config_table(request.config)
    if request.precision not in PRECISIONS:
        raise UsageError(f"no precision is named {request.precision!r}", expected=", ".join(PRECISIONS))
    if request.backend not in BACKENDS:
        raise UsageError(f"no backend is named {request.backend!r}", expected=", ".join(BACKENDS))
    check_targets(request)
    backends = {request.backend, *(target.backend for target in request.targets)}
    if "openvino" in backends and importlib.util.find_spec("openvino") is None:
        raise MissingExtraError("the backend openvino cannot be used", package="openvino", extra="openvino")
    if request.chained and (request.precision != "fp32" or (request.steps and request.search)):
        raise UsageError(
            "more than one wish at once",
            expected="one of --precision, --step ... or a search with its bounds",
        )
    if request.max_batch_size is not None and request.max_batch_size < 0:
        raise UsageError(f"--max-batch-size {request.max_batch_size} is negative", expected="0 or more")
    if request.evaluation is None:
        _check_without_evaluation(request)
    elif request.metric is None:
        raise UsageError(
            "--evaluation needs --metric", expected="what to measure, such as accuracy or cosine"
        )
    elif (request.chained or request.precision != "fp32") and request.max_drop is None:
        raise UsageError(
            f"{_wish(request)} needs --max-drop",
            expected="how much worse the metric may become; 0.01 of accuracy is one percentage point",
        )


def _check_without_evaluation(request: BuildRequest) -> None:
    if request.metric is not None or request.max_drop is not None:
        raise UsageError("--metric and --max-drop need --evaluation", expected="samples to measure on")
    if request.chained or request.precision in ("int8", "auto"):
        raise UsageError(
            f"{_wish(request)} needs an accuracy budget",
            expected="--evaluation X.npz --metric M --max-drop D",
            fix="where there are no labels, --metric cosine compares with the FP32 model",
        )


def _wish(request: BuildRequest) -> str:
    return "a chain of steps" if request.chained else f"--precision {request.precision}"


def _refuse_published(request: BuildRequest) -> None:
    """The check that publishing makes again, made before the work instead of after it."""
    if request.version in versions_of(request.repository / request.name):
        raise RepositoryError(
            f"version {request.version} of {request.name!r} is published, from another build",
            fix="leave --version out for the next one, or add --force to replace it",
        )


def _metric(request: BuildRequest) -> Metric | None:
    from tritonsmith.gate import check_budget
    from tritonsmith.metrics import parse_metric

    if request.metric is None:
        return None
    metric = parse_metric(request.metric)
    check_budget(metric, request.max_drop)
    return metric


def _goal(
    request: BuildRequest, fp32: Artifact, metric: Metric | None
) -> tuple[Goal, dict[str, Samples | None], model_config_pb2.ModelConfig]:
    from tritonsmith.candidates import Goal, check_labels
    from tritonsmith.chain_build import ROLES, load_roles
    from tritonsmith.repository.config import config_from_artifact
    from tritonsmith.repository.labels import labels_from_files

    # A configuration that Triton would refuse is found before the long work.
    labels = labels_from_files(request.labels, fp32.outputs)
    config = config_from_artifact(
        fp32,
        name=request.name,
        backend=request.backend,
        max_batch_size=request.max_batch_size,
        extra=request.config,
        labels=labels.names,
    )
    data = load_roles({role: getattr(request, role) for role in ROLES}, fp32)
    evaluation = data["evaluation"]
    if metric is not None and evaluation is not None:
        check_labels(evaluation, metric)
    goal = Goal(
        precision="chain" if request.chained else request.precision,
        engine=request.backend,
        max_batch_size=config.max_batch_size if fp32.batched else 0,
        inference_precision=served_precision(request.backend, config),
        calibration=data["calibration"],
        evaluation=evaluation,
        metric=metric,
        max_drop=request.max_drop,
    )
    return goal, data, config


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """The default target, ready to be published."""

    artifact: Artifact
    config: model_config_pb2.ModelConfig
    labels: Labels
    warmup: Warmup | None


def _model_from(request: BuildRequest, chosen: Candidate) -> _Model:
    from tritonsmith.repository.config import config_from_artifact
    from tritonsmith.repository.labels import labels_from_files
    from tritonsmith.repository.warmup import warmup_from_samples

    artifact = chosen.artifact
    assert artifact is not None  # noqa: S101 - only a candidate that was made is chosen
    labels = labels_from_files(request.labels, artifact.outputs)
    warmup = None if request.warmup is None else warmup_from_samples(request.warmup, artifact)
    config = config_from_artifact(
        artifact,
        name=request.name,
        backend=request.backend,
        max_batch_size=request.max_batch_size,
        extra=request.config,
        labels=labels.names,
        warmup=warmup,
    )
    return _Model(artifact=artifact, config=config, labels=labels, warmup=warmup)


def _build_targets(
    request: BuildRequest,
    fp32: Artifact,
    goal: Goal,
    made: _Made,
    config: model_config_pb2.ModelConfig,
    options: Mapping[str, PlanOptions],
    compiled: frozenset[str],
    folder: Path,
    say: Say,
) -> tuple[BuiltTarget, ...]:
    from tritonsmith.targets.build import TargetSource, build_targets

    if made.material is None:
        return ()
    source = TargetSource(
        fp32=fp32,
        specs=made.specs,
        material=made.material,
        goal=goal,
        chosen=made.chosen,
        store=step_store(),
        plan_cache=plan_cache(),
    )
    return build_targets(request.targets, source, config, options, compiled, folder, say=say)


def _publish(
    request: BuildRequest,
    made: _Made,
    model: _Model,
    targets: tuple[BuiltTarget, ...],
    fingerprint: str,
    say: Say,
) -> Entry:
    artifact, chosen = model.artifact, made.chosen
    manifest = Manifest(
        name=request.name,
        version=0,  # set by publish
        fingerprint=fingerprint,
        source=request.source,
        source_sha256=source_sha256(request.source),
        inputs=artifact.inputs,
        outputs=artifact.outputs,
        batched=artifact.batched,
        precision=artifact.precision,
        backend=request.backend,
        files={},
        steps=artifact.steps,
        gate=None if chosen.gate is None else chosen.gate.json(),
        candidates=tuple(candidate.json() for candidate in made.candidates),
        ledger=None if made.ledger is None else made.ledger.json(),
        search=None if made.search is None else made.search.json(),
        targets=tuple(target.record for target in targets),
    )
    say(f"publishing {chosen.name} as {request.name}")
    for target in targets:
        for name, file in target.files.items():
            shutil.copyfile(file, artifact.path.parent / name)
    return publish(
        artifact.path.parent,
        model.config,
        request.repository,
        manifest=manifest,
        version=request.version,
        force=request.force,
        labels=model.labels.files,
        warmup=None if model.warmup is None else model.warmup.files,
        targets={target.record.name: target.config for target in targets},
    )
