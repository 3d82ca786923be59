"""Every check over a whole repository."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tritonsmith.lint.ensembles import check_ensemble
from tritonsmith.lint.fields import check_fields
from tritonsmith.lint.files import check_files
from tritonsmith.lint.findings import Finding
from tritonsmith.lint.manifests import check_manifests, read_manifests
from tritonsmith.lint.onnx_files import check_onnx_files
from tritonsmith.lint.plans import check_plans
from tritonsmith.lint.releases import check_deployment, check_release
from tritonsmith.lint.scan import Deployment, Model, read_models
from tritonsmith.lint.stages import check_stage
from tritonsmith.lint.variants import check_variant


def lint(
    repository: Path,
    deployment: Deployment | None = None,
    *,
    configs_only: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Finding, ...]:
    """What Triton would refuse, ignore or answer otherwise of this repository, errors before warnings.

    `configs_only` leaves out what needs the built models: files, hashes, ONNX and plans.

    Raises:
        UsageError: no such folder, no model in it, no model with the deployment's target.
    """
    deployment = deployment or Deployment()
    models, findings = read_models(repository, deployment.target)
    found = [*findings, *check_deployment(deployment)]
    by_name = {model.name: model for model in models}
    say(f"reading {len(models)} models of {repository}")
    for model in models:
        found += _check_configs(repository, by_name, model, deployment)
        if not configs_only:
            found += _check_built(model, deployment)
    once = dict.fromkeys(found)  # two configurations may name one missing file
    return tuple(sorted(once, key=lambda finding: (finding.severity, finding.model)))


def _check_configs(
    repository: Path, models: Mapping[str, Model], model: Model, deployment: Deployment
) -> Iterator[Finding]:
    for variant in model.served(deployment.target):
        yield from check_fields(model, variant)
        yield from check_variant(model, variant)
        yield from check_ensemble(repository, models, model, variant)
        yield from check_release(model, variant, deployment)
    yield from check_stage(model, deployment)


def _check_built(model: Model, deployment: Deployment) -> Iterator[Finding]:
    variants = model.served(deployment.target)
    manifests, findings = read_manifests(model)
    yield from findings
    yield from check_manifests(model, manifests)
    for variant in variants:
        yield from check_files(model, variant)
        yield from check_plans(model, variant, manifests, deployment)
    yield from check_onnx_files(model, variants, deployment)
