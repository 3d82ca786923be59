"""The same image under KServe: a ServingRuntime, and an InferenceService in its Standard mode.

KServe makes the Deployment, the Service and the scaler; it fetches the repository to /mnt/models.
Fields by the CRDs of serving.kserve.io, v1alpha1 and v1beta1.
"""

from __future__ import annotations

from tritonsmith.artifact import Json
from tritonsmith.deploy.flags import GRPC_PORT, HTTP_PORT
from tritonsmith.deploy.kubernetes.names import Manifest, metadata
from tritonsmith.deploy.kubernetes.options import KubernetesOptions
from tritonsmith.deploy.kubernetes.scaling import Threshold, pods_query
from tritonsmith.deploy.kubernetes.workload import (
    container_security,
    drain,
    pod_security,
    probes,
    resources,
    scrape_annotations,
    scratch_mounts,
    scratch_volumes,
    server_arguments,
    server_environment,
)
from tritonsmith.deploy.measurements import Measurements
from tritonsmith.deploy.sizes import Sizes

MODELS = "/mnt/models"
FORMAT = "triton-repository"


def service_labels(options: KubernetesOptions) -> dict[str, Json]:
    """What KServe labels an InferenceService's pods with."""
    return {"serving.kserve.io/inferenceservice": options.name}


def serving_runtime(options: KubernetesOptions, sizes: Sizes, target: str | None) -> Manifest:
    container: dict[str, Json] = {
        "name": "kserve-container",  # the name that KServe looks for
        "image": options.cpu_image,
        "imagePullPolicy": "IfNotPresent",
        "args": server_arguments(sizes),
        "env": [*server_environment(sizes, target), {"name": "TRITONSMITH_MODELS", "value": MODELS}],
        "ports": [
            {"name": "http1", "containerPort": HTTP_PORT, "protocol": "TCP"},
            {"name": "h2c", "containerPort": GRPC_PORT, "protocol": "TCP"},
        ],
        "resources": resources(sizes),
        **probes(sizes),
        "lifecycle": drain(sizes),
        "securityContext": container_security(),
        "volumeMounts": scratch_mounts(),
    }
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": metadata(options, runtime_name(options)),
        "spec": {
            "annotations": scrape_annotations(),
            "multiModel": False,
            "protocolVersions": ["v2", "grpc-v2"],
            "supportedModelFormats": [{"name": FORMAT, "version": "1", "autoSelect": False}],
            "containers": [container],
            "volumes": scratch_volumes(sizes),
        },
    }


def runtime_name(options: KubernetesOptions) -> str:
    return f"{options.name}-tritonsmith"


def inference_service(
    options: KubernetesOptions,
    measurements: Measurements,
    sizes: Sizes,
    threshold: Threshold,
    *,
    explanations: dict[str, str],
) -> Manifest:
    """Scaled by KEDA on queue over compute; RawDeployment is what Standard was called before."""
    annotations = {
        "serving.kserve.io/deploymentMode": "RawDeployment",
        "serving.kserve.io/autoscalerClass": "keda",
        **{f"tritonsmith/{name}": text for name, text in explanations.items()},
        "tritonsmith/queue-over-compute": threshold.why,
    }
    query = pods_query(options, measurements, f"{options.name}-predictor-.*")
    metric: dict[str, Json] = {
        "backend": "prometheus",
        "serverAddress": options.prometheus_url,
        "query": query,
    }
    target: dict[str, Json] = {"type": "Value", "value": f"{threshold.value:g}"}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": metadata(options) | {"annotations": dict(annotations)},
        "spec": {
            "predictor": {
                "minReplicas": options.min_replicas,
                "maxReplicas": options.max_replicas,
                "serviceAccountName": options.name,
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "terminationGracePeriodSeconds": sizes.grace_s,
                "securityContext": pod_security(),
                "autoScaling": {
                    "metrics": [{"type": "External", "external": {"metric": metric, "target": target}}]
                },
                "topologySpreadConstraints": _spread(options),
                "model": {
                    "modelFormat": {"name": FORMAT, "version": "1"},
                    "runtime": runtime_name(options),
                    "protocolVersion": "v2",
                    "storageUri": storage_uri(options),
                    "resources": resources(sizes),
                },
            }
        },
    }


def storage_uri(options: KubernetesOptions) -> str:
    if options.claim:
        return f"pvc://{options.claim}/{options.claim_path}"
    return f"s3://{options.bucket_path}"


def storage_account(options: KubernetesOptions) -> Manifest:
    """KServe reads an object store's credentials from the Secrets of the account; the pod gets no token."""
    account: dict[str, Json] = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(options),
        "automountServiceAccountToken": False,
    }
    if not options.claim and options.object_store_secret:
        account["secrets"] = [{"name": options.object_store_secret}]
    return account


def _spread(options: KubernetesOptions) -> list[Json]:
    return [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": service_labels(options)},
        }
    ]
