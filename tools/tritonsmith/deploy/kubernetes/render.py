"""All files of a deployment to Kubernetes, by path."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tritonsmith.artifact import Json
from tritonsmith.deploy.kubernetes import access, gpu, kserve, scaling
from tritonsmith.deploy.kubernetes.guide import guide
from tritonsmith.deploy.kubernetes.names import IMAGE, Manifest, selector
from tritonsmith.deploy.kubernetes.options import KubernetesOptions, split_image
from tritonsmith.deploy.kubernetes.workload import deployment
from tritonsmith.deploy.measurements import Measurements
from tritonsmith.deploy.measurements_file import (
    check_measurements,
    model_folders,
    text_from_measurements,
)
from tritonsmith.deploy.sizes import (
    Sizes,
    explain_queue_threshold,
    explain_sizes,
    queue_threshold_for,
    sizes_from_measurements,
)
from tritonsmith.deploy.targets import check_target, gpu_target, queue_delays_s
from tritonsmith.errors import DeployError

_HEADER = "# Rendered by tritonsmith deploy kubernetes. Change overlays, or render again.\n"


def render_kubernetes(
    repository: Path, measurements: Measurements, options: KubernetesOptions
) -> dict[str, bytes]:
    """The files of the package's docstring, each by its path below the folder.

    Raises:
        DeployError: measurements of another repository, a target that no model has, two targets of plans to
            choose from, or an object store for a repository that is not built here.
        RepositoryError: a configuration that cannot be parsed.
    """
    check_measurements(measurements, repository)
    check_target(repository, measurements.target)
    if options.claim is None:
        check_built(repository)
    target = gpu_target(repository, options.target)
    sizes = sizes_from_measurements(measurements)
    explanations = explain_sizes(measurements, sizes)
    delays_s = queue_delays_s(repository, measurements.target)
    threshold = scaling.Threshold(
        value=queue_threshold_for(measurements, delays_s), why=explain_queue_threshold(measurements, delays_s)
    )
    objects = {
        **_base(options, measurements, sizes, threshold, explanations, _bytes_of(repository)),
        **_keda(options, measurements, sizes, threshold),
        **_overlays(options, measurements, sizes, threshold, explanations),
        **_gpu_overlay(options, sizes, target),
        "prometheus-adapter.yaml": [scaling.adapter_values(options, measurements)],
    }
    texts = {path: _HEADER + _yaml(manifests) for path, manifests in objects.items()}
    texts["README.md"] = guide(options, measurements, sizes, threshold, target)
    texts["measurements.json"] = text_from_measurements(measurements)
    return {path: text.encode() for path, text in texts.items()}


Files = dict[str, list[Manifest]]


def _base(
    options: KubernetesOptions,
    measurements: Measurements,
    sizes: Sizes,
    threshold: scaling.Threshold,
    explanations: dict[str, str],
    repository_bytes: int,
) -> Files:
    pods = selector(options)
    with_store = options.claim is None
    files: Files = {
        "deployment.yaml": [
            deployment(
                options,
                sizes,
                measurements.target,
                explanations=explanations,
                repository_bytes=repository_bytes,
            )
        ],
        "services.yaml": access.services(options),
        "serviceaccount.yaml": [access.service_account(options)],
        "autoscaler.yaml": [scaling.autoscaler(options, sizes, threshold)],
        "disruptionbudget.yaml": [access.disruption_budget(options, pods)],
        "networkpolicy.yaml": [access.network_policy(options, pods, with_object_store=with_store)],
    }
    kustomization = _kustomization(resources=sorted(files), namespace=options.namespace)
    return {
        f"base/{name}": manifests
        for name, manifests in {"kustomization.yaml": [kustomization], **files}.items()
    }


def _keda(
    options: KubernetesOptions, measurements: Measurements, sizes: Sizes, threshold: scaling.Threshold
) -> Files:
    kustomization: dict[str, Json] = {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "resources": ["scaledobject.yaml"],
        "patches": [{"path": "without-autoscaler.yaml"}],
    }
    return {
        "components/keda/kustomization.yaml": [kustomization],
        "components/keda/scaledobject.yaml": [scaling.scaled_object(options, measurements, sizes, threshold)],
        "components/keda/without-autoscaler.yaml": [scaling.without_autoscaler(options)],
    }


def _overlays(
    options: KubernetesOptions,
    measurements: Measurements,
    sizes: Sizes,
    threshold: scaling.Threshold,
    explanations: dict[str, str],
) -> Files:
    pods = kserve.service_labels(options)
    own: Files = {
        "runtime.yaml": [kserve.serving_runtime(options, sizes, measurements.target)],
        "inferenceservice.yaml": [
            kserve.inference_service(options, measurements, sizes, threshold, explanations=explanations)
        ],
        "serviceaccount.yaml": [kserve.storage_account(options)],
        "disruptionbudget.yaml": [access.disruption_budget(options, pods)],
        # KServe's storage initializer fetches, also where the claim is a volume that needs nothing of it.
        "networkpolicy.yaml": [access.network_policy(options, pods, with_object_store=options.claim is None)],
    }
    namespace = options.namespace
    return {
        "overlays/cpu/kustomization.yaml": [
            _kustomization(resources=["../../base"], namespace=namespace, images=[_image(options.cpu_image)])
        ],
        "overlays/kserve/kustomization.yaml": [_kustomization(resources=sorted(own), namespace=namespace)],
        **{f"overlays/kserve/{name}": manifests for name, manifests in own.items()},
    }


def _gpu_overlay(options: KubernetesOptions, sizes: Sizes, target: str) -> Files:
    """The patches of scalers name what they change by its kind: only one of the two scalers is there."""
    claims: Files = {"plan-cache.yaml": [gpu.cache_claim(options)]} if options.plan_cache == "claim" else {}
    kustomization = _kustomization(
        resources=["../../base", *claims],
        namespace=options.namespace,
        images=[_image(options.gpu_image)],
        patches=[
            {"path": "gpu.yaml"},
            {"path": "autoscaler.yaml", "target": {"kind": "HorizontalPodAutoscaler"}},
            {"path": "scaledobject.yaml", "target": {"kind": "ScaledObject"}},
        ],
    )
    files: Files = {
        "kustomization.yaml": [kustomization],
        "gpu.yaml": [gpu.gpu_patch(options, sizes, target)],
        "autoscaler.yaml": [gpu.autoscaler_patch(options, sizes)],
        "scaledobject.yaml": [gpu.scaled_object_patch(options, sizes)],
        **claims,
    }
    return {f"overlays/gpu/{name}": manifests for name, manifests in files.items()}


def _kustomization(
    *,
    resources: Sequence[str],
    namespace: str,
    images: Sequence[Json] = (),
    patches: Sequence[Json] = (),
) -> Manifest:
    found: dict[str, Json] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace,
        "resources": list(resources),
    }
    if images:
        found["images"] = list(images)
    if patches:
        found["patches"] = list(patches)
    return found


def _image(image: str) -> Json:
    """What stands in the place of the base's image. Kustomize takes a digest or a tag; a digest says more."""
    name, tag, digest = split_image(image)
    found: dict[str, Json] = {"name": IMAGE, "newName": name}
    if digest:
        found["digest"] = digest
    elif tag:
        found["newTag"] = tag
    return found


def check_built(repository: Path) -> None:
    """Raise DeployError where a model has no files here, of which each pod's disk gets its size."""
    from tritonsmith.repository.entry import read_config

    without = [
        folder.name
        for folder in model_folders(repository)
        if not any(path.is_file() for path in folder.glob("[0-9]*/**/*"))
        and not read_config(repository, folder.name).HasField("ensemble_scheduling")
    ]
    if without:
        raise DeployError(
            f"{repository} is not built here, so how large it is in the object store is not known",
            found=f"no file in a version of {', '.join(without)}",
            expected="the repository as the object store has it",
            fix="build it here, then render again",
        )


def _bytes_of(repository: Path) -> int:
    return sum(path.stat().st_size for path in repository.rglob("*") if path.is_file())


def _yaml(manifests: Sequence[Manifest]) -> str:
    import yaml

    # From JSON and back: an anchor would stand where two manifests share a part.
    plain = [json.loads(json.dumps(one)) for one in manifests]
    text = yaml.safe_dump_all(plain, sort_keys=False, width=110, allow_unicode=True)
    return str(text)
