"""Where a finished plan goes: into its published version, or into a view of the repository."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tritonclient.grpc import model_config_pb2

from tritonsmith.artifact import Json
from tritonsmith.engines.tensorrt.facts import Device, PlanFacts
from tritonsmith.engines.tensorrt.fit import sm_name
from tritonsmith.errors import PlanError
from tritonsmith.repository.amend import amend
from tritonsmith.repository.config import text_from_config
from tritonsmith.repository.entry import config_name, read_config, read_entry
from tritonsmith.targets.config import config_for_fallback, with_plans
from tritonsmith.targets.found import FoundOrder
from tritonsmith.targets.order_file import facts_from_json, json_from_facts
from tritonsmith.targets.view import ViewedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What became of one order."""

    found: FoundOrder
    outcome: str  # "built", "cached", "published" (before, by an equal machine) or "fallback"
    path: Path  # of the plan, or of the fallback's ONNX file
    duration_s: float
    facts: PlanFacts | None = None  # None: no plan, the fallback is served
    candidates: tuple[Mapping[str, Json], ...] = ()
    reason: str | None = None  # for the fallback

    def json(self) -> dict[str, Json]:
        return {
            "model": self.found.model,
            "version": self.found.version,
            "target": self.found.target,
            "outcome": self.outcome,
            "path": str(self.path),
            "duration_s": round(self.duration_s, 3),
            "plan": None if self.facts is None else json_from_facts(self.facts),
            "candidates": list(self.candidates),
            "reason": self.reason,
        }


def plan_name(target: str, device: Device) -> str:
    """The file name of a plan in the version's folder, such as `gpu.sm90.plan`."""
    return f"{target}.{sm_name(device.compute_capability)}.plan"


def publish_plan(report: PlanReport, repository: Path, *, force: bool) -> PlanReport:
    """Add the plan to its version: file, configuration and manifest in one rename.

    Raises:
        PlanError: a plan of another GPU with the same compute capability is there, and not `force`.
    """
    found, facts = report.found, report.facts
    assert facts is not None  # noqa: S101 - a plan was built
    facts = replace(facts, file=plan_name(found.target, facts.device))
    while not _amended(found, facts, report.path, repository, force=force):
        pass  # another machine was faster, with a plan of its own
    return replace(report, path=found.folder / facts.file, facts=facts)


def _amended(found: FoundOrder, facts: PlanFacts, plan: Path, repository: Path, *, force: bool) -> bool:
    entry = read_entry(repository, found.model, found.version)
    target = next((target for target in entry.manifest.targets if target.name == found.target), None)
    if target is None:
        raise PlanError(f"the manifest of {found} names no such target", fix="build the model again")
    before = [facts_from_json(record) for record in target.plans]
    _refuse_other_gpu(facts, before, found, force=force)
    plans = sorted([*(item for item in before if item.file != facts.file), facts], key=lambda item: item.file)
    config = with_plans(
        read_config(repository, found.model, found.target),
        {item.device.compute_capability: item.file for item in plans},
        newest=facts.file,
    )
    amended = replace(
        target,
        precision=facts.precision,
        files=tuple(dict.fromkeys((*target.files, facts.file))),
        plans=tuple(json_from_facts(item) for item in plans),
    )
    targets = tuple(amended if other.name == target.name else other for other in entry.manifest.targets)
    return amend(entry, files={facts.file: plan}, targets=targets, configs={target.name: config}) is not None


def _refuse_other_gpu(
    facts: PlanFacts, before: Sequence[PlanFacts], found: FoundOrder, *, force: bool
) -> None:
    other = next((plan for plan in before if plan.file == facts.file), None)
    if other is not None and other.device.gpu != facts.device.gpu and not force:
        raise PlanError(
            f"{found} has a plan of another GPU with compute capability {facts.device.compute_capability}",
            found=f"{other.device.gpu}, and this is {facts.device.gpu}",
            expected="one kind of GPU for each compute capability: Triton chooses by that alone",
            fix="serve a --view on each machine, or replace the plan with --force",
        )


def viewed_models(
    reports: Sequence[PlanReport], repository: Path, *, cache: Path, gpu: bool
) -> tuple[ViewedModel, ...]:
    """For each model what its plans change: configurations, and links beside the versions' own files."""
    by_model: dict[str, dict[str, list[PlanReport]]] = defaultdict(lambda: defaultdict(list))
    for report in reports:
        by_model[report.found.model][report.found.target].append(report)
    models = []
    for name, targets in by_model.items():
        texts: dict[str, str] = {}
        links: dict[str, Path] = {}
        for target, own in targets.items():
            config = read_config(repository, name, target)
            if any(report.facts is None for report in own):
                config = _fallback_config(config, own, cache, gpu=gpu)
            else:
                config = _view_config(config, own)
                links |= {
                    f"{report.found.version}/{config.default_model_filename}": report.path for report in own
                }
            texts[config_name(target)] = text_from_config(config)
        models.append(ViewedModel(name=name, texts=texts, links=links))
    return tuple(models)


def _view_config(
    config: model_config_pb2.ModelConfig, reports: Sequence[PlanReport]
) -> model_config_pb2.ModelConfig:
    """The plans of this machine, whatever is published for others."""
    facts = reports[0].facts
    assert facts is not None  # noqa: S101 - asked for plans alone
    file = plan_name(reports[0].found.target, facts.device)
    return with_plans(config, {facts.device.compute_capability: file}, newest=file)


def _fallback_config(
    config: model_config_pb2.ModelConfig, reports: Sequence[PlanReport], cache: Path, *, gpu: bool
) -> model_config_pb2.ModelConfig:
    """One configuration serves all versions, so where one has no plan all fall back, to files of one name."""
    orders = {report.found.order.fallback: report.found.order for report in reports}
    if len(orders) != 1 or None in orders:
        raise PlanError(
            f"the served versions of {reports[0].found.model} cannot fall back together",
            found=", ".join(str(name) for name in orders),
            expected="one file name for all of them",
            fix="serve one version, or build all of them with the same fallback",
        )
    engines = cache.absolute() / "engines"
    fallback = config_for_fallback(config, *orders.values(), engine_cache=str(engines))
    if gpu:
        engines.mkdir(parents=True, exist_ok=True)
        return fallback
    fallback.ClearField("optimization")
    for group in fallback.instance_group:
        group.kind = model_config_pb2.ModelInstanceGroup.KIND_CPU
        group.ClearField("gpus")
    return fallback
