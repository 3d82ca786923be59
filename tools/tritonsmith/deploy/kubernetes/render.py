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
from tritonsmith.deploy.sizes import Sizes, explain_sizes, sizes_from_measurements
from tritonsmith.errors import DeployError

_HEADER = "# Rendered by tritonsmith deploy kubernetes. Change overlays, or render again.\n"


def render_kubernetes(
    repository: Path, measurements: Measurements, options: KubernetesOptions
) -> dict[str, bytes]:
    """The files of the package's docstring, each by its path below the folder.

    Raises:
        DeployError: measurements of another repository, or a target that no model has.
    """
    check_measurements(measurements, repository)
    check_target(repository, options.target)
    sizes = sizes_from_measurements(measurements)
    explanations = explain_sizes(measurements, sizes)
    objects = {
        **_base(options, measurements, sizes, explanations, _bytes_of(repository)),
        **_keda(options, measurements, sizes),
        **_overlays(options, measurements, sizes, explanations),
        "prometheus-adapter.yaml": [scaling.adapter_values(options, measurements)],
    }
    texts = {path: _HEADER + _yaml(manifests) for path, manifests in objects.items()}
    texts["README.md"] = guide(options, measurements, sizes)
    texts["measurements.json"] = text_from_measurements(measurements)
    return {path: text.encode() for path, text in texts.items()}


Files = dict[str, list[Manifest]]


def _base(
    options: KubernetesOptions,
    measurements: Measurements,
    sizes: Sizes,
    explanations: dict[str, str],
    repository_bytes: int,
) -> Files:
    pods = selector(options)
    with_store = options.claim is None
    files: Files = {
        "deployment.yaml": [
            deployment(options, sizes, explanations=explanations, repository_bytes=repository_bytes)
        ],
        "services.yaml": access.services(options),
        "serviceaccount.yaml": [access.service_account(options)],
        "autoscaler.yaml": [scaling.autoscaler(options, sizes)],
        "disruptionbudget.yaml": [access.disruption_budget(options, pods)],
        "networkpolicy.yaml": [access.network_policy(options, pods, with_object_store=with_store)],
    }
    kustomization = _kustomization(resources=sorted(files), namespace=options.namespace)
    return {
        f"base/{name}": manifests
        for name, manifests in {"kustomization.yaml": [kustomization], **files}.items()
    }


def _keda(options: KubernetesOptions, measurements: Measurements, sizes: Sizes) -> Files:
    kustomization: dict[str, Json] = {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "resources": ["scaledobject.yaml"],
        "patches": [{"path": "without-autoscaler.yaml"}],
    }
    return {
        "components/keda/kustomization.yaml": [kustomization],
        "components/keda/scaledobject.yaml": [scaling.scaled_object(options, measurements, sizes)],
        "components/keda/without-autoscaler.yaml": [scaling.without_autoscaler(options)],
    }


def _overlays(
    options: KubernetesOptions, measurements: Measurements, sizes: Sizes, explanations: dict[str, str]
) -> Files:
    pods = kserve.service_labels(options)
    own: Files = {
        "runtime.yaml": [kserve.serving_runtime(options, sizes)],
        "inferenceservice.yaml": [
            kserve.inference_service(options, measurements, sizes, explanations=explanations)
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
        "overlays/gpu/kustomization.yaml": [
            _kustomization(
                resources=["../../base", "plan-cache.yaml"],
                namespace=namespace,
                images=[_image(options.gpu_image)],
                patches=[{"path": "gpu.yaml"}],
            )
        ],
        "overlays/gpu/gpu.yaml": [gpu.gpu_patch(options, sizes)],
        "overlays/gpu/plan-cache.yaml": [gpu.cache_claim(options)],
        "overlays/kserve/kustomization.yaml": [_kustomization(resources=sorted(own), namespace=namespace)],
        **{f"overlays/kserve/{name}": manifests for name, manifests in own.items()},
    }


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


def check_target(repository: Path, target: str | None) -> None:
    """Raise DeployError where no model of the repository has a configuration for `target`."""
    if target is None:
        return
    folders = model_folders(repository)
    known = sorted({path.stem for folder in folders for path in folder.glob("configs/*.pbtxt")})
    if target not in known:
        raise DeployError(
            f"no model of {repository} has a configuration for the target {target!r}",
            found=f"configurations for {', '.join(known)}" if known else "no <model>/configs/<target>.pbtxt",
            fix="add [target.<name>] to the recipe and build, or leave --target out",
        )


def _bytes_of(repository: Path) -> int:
    return sum(path.stat().st_size for path in repository.rglob("*") if path.is_file())


def _yaml(manifests: Sequence[Manifest]) -> str:
    import yaml

    # From JSON and back: an anchor would stand where two manifests share a part.
    plain = [json.loads(json.dumps(one)) for one in manifests]
    text = yaml.safe_dump_all(plain, sort_keys=False, width=110, allow_unicode=True)
    return str(text)
