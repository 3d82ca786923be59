"""What a GPU adds to the base: a patch of the Deployment, and the volume of built plans.

Nothing here was measured on a GPU; what stands in for a measurement says so.
"""

from __future__ import annotations

from tritonsmith.artifact import Json
from tritonsmith.deploy.kubernetes.names import CACHE, CONTAINER, Manifest, mebibytes, metadata, millicores
from tritonsmith.deploy.kubernetes.options import KubernetesOptions
from tritonsmith.deploy.kubernetes.scaling import scale_up
from tritonsmith.deploy.kubernetes.workload import probe, server_arguments
from tritonsmith.deploy.sizes import GPU_HOST, PLAN_BUILD, Probe, Sizes

PRODUCT_LABEL = "nvidia.com/gpu.product"  # written by NVIDIA's GPU feature discovery
_GPU = "nvidia.com/gpu"
_BUILD_PERIOD_S = 10


def gpu_patch(options: KubernetesOptions, sizes: Sizes, target: str) -> Manifest:
    """A strategic merge patch: lists merge by name, so that only differences stand here."""
    container: dict[str, Json] = {
        "name": CONTAINER,
        "env": [{"name": "TRITONSMITH_TARGET", "value": target}],
        **_http_arguments(sizes),
        "resources": gpu_resources(sizes),
        "startupProbe": probe(build_probe(sizes), "/v2/health/ready"),
        "volumeMounts": [{"name": "cache", "mountPath": CACHE}],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": options.name,
            "annotations": {
                "tritonsmith/startup-probe": f"{build_probe(sizes).patience_s} s: {PLAN_BUILD.why}",
                "tritonsmith/memory": f"{mebibytes(sizes.gpu_memory_bytes)}: the CPU's and "
                f"{GPU_HOST.value:g} MiB. {GPU_HOST.why}",
            },
        },
        "spec": {
            # A surge would need one more free GPU; without it an update takes a replica away first.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}},
            "progressDeadlineSeconds": build_probe(sizes).patience_s + 600,
            "template": {
                "spec": {
                    **gpu_placement(options),
                    "containers": [container],
                    "volumes": [cache_volume(options)],
                }
            },
        },
    }


def gpu_resources(sizes: Sizes) -> dict[str, Json]:
    memory = mebibytes(sizes.gpu_memory_bytes)
    return {
        "requests": {"cpu": millicores(sizes.cpu_request_milli), "memory": memory, _GPU: "1"},
        "limits": {"cpu": millicores(sizes.cpu_limit_milli), "memory": memory, _GPU: "1"},
    }


def _http_arguments(sizes: Sizes) -> dict[str, Json]:
    """All arguments again: a list without names is replaced. Every release with the fixes has this flag."""
    if sizes.http_max_input_bytes is None:
        return {}
    return {"args": [*server_arguments(sizes), f"--http-max-input-size={sizes.http_max_input_bytes}"]}


def autoscaler_patch(options: KubernetesOptions, sizes: Sizes) -> Manifest:
    """No faster than a replica can start, plans and all."""
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": options.name},
        "spec": {"behavior": {"scaleUp": scale_up(build_probe(sizes))}},
    }


def scaled_object_patch(options: KubernetesOptions, sizes: Sizes) -> Manifest:
    """The same, where the component keda has put a ScaledObject in the HPA's place."""
    behavior: dict[str, Json] = {"behavior": {"scaleUp": scale_up(build_probe(sizes))}}
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": options.name},
        "spec": {"advanced": {"horizontalPodAutoscalerConfig": behavior}},
    }


def build_probe(sizes: Sizes) -> Probe:
    """Patient for the first build of plans, and then for the start that was measured."""
    patience_s = int(PLAN_BUILD.value) + sizes.startup.patience_s
    return Probe(
        period_s=_BUILD_PERIOD_S,
        timeout_s=sizes.startup.timeout_s,
        failure_threshold=-(-patience_s // _BUILD_PERIOD_S),
    )


def gpu_placement(options: KubernetesOptions) -> dict[str, Json]:
    """A plan is of one kind of GPU; so are the nodes, where one is named."""
    placement: dict[str, Json] = {
        "tolerations": [{"key": _GPU, "operator": "Exists", "effect": "NoSchedule"}],
    }
    if options.gpu_product is not None:
        expression: Json = {"key": PRODUCT_LABEL, "operator": "In", "values": [options.gpu_product]}
        placement["affinity"] = {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [expression]}]
                }
            }
        }
    return placement


def cache_volume(options: KubernetesOptions) -> dict[str, Json]:
    """Of the pod alone, which every cluster can give; or a claim that all pods share."""
    if options.plan_cache == "pod":
        return {"name": "cache", "emptyDir": {"sizeLimit": options.plan_cache_size}}
    return {"name": "cache", "persistentVolumeClaim": {"claimName": cache_claim_name(options)}}


def cache_claim_name(options: KubernetesOptions) -> str:
    return f"{options.name}-plan-cache"


def cache_claim(options: KubernetesOptions) -> Manifest:
    """Shared by all replicas, so that a plan is built once for each kind of GPU."""
    spec: dict[str, Json] = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": options.plan_cache_size}},
    }
    if options.storage_class is not None:
        spec["storageClassName"] = options.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata(options, cache_claim_name(options)),
        "spec": spec,
    }
