"""Names, labels and numbers that several manifests share."""

from __future__ import annotations

from collections.abc import Mapping

from tritonsmith.artifact import Json
from tritonsmith.deploy.kubernetes.options import KubernetesOptions
from tritonsmith.deploy.sizes import MIB

CONTAINER = "triton"
MODELS = "/models"  # where entrypoint.sh reads the repository
CACHE = "/var/cache/tritonsmith"
CREDENTIALS = "/var/run/secrets/object-store"
IMAGE = "tritonsmith"  # in the base; each overlay puts its own in its place
USER = 10001
METRIC = "triton_queue_over_compute"
Manifest = Mapping[str, Json]


def selector(options: KubernetesOptions) -> dict[str, Json]:
    """The labels that find the pods; a Deployment's may never change."""
    return {"app.kubernetes.io/name": "tritonsmith", "app.kubernetes.io/instance": options.name}


def labels(options: KubernetesOptions) -> dict[str, Json]:
    return {**selector(options), "app.kubernetes.io/component": "inference-server"}


def metadata(options: KubernetesOptions, name: str | None = None, **annotations: str) -> dict[str, Json]:
    """Of an object: `name`, or the deployment's own."""
    found: dict[str, Json] = {"name": name or options.name, "labels": labels(options)}
    if annotations:
        found["annotations"] = dict(annotations)
    return found


def mebibytes(count: int) -> str:
    """A quantity of Kubernetes; all sizes here are whole MiB."""
    return f"{count // MIB}Mi"


def millicores(count: int) -> str:
    return f"{count}m"
