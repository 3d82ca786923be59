"""How many replicas: by the time that requests wait over the time that they are worked on.

`nv_inference_queue_duration_us` over `nv_inference_compute_infer_duration_us`, as rates over a minute. Of an
ensemble Triton adds its steps' compute time again, so that ensembles are left out.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from tritonsmith.artifact import Json
from tritonsmith.deploy.kubernetes.names import METRIC, Manifest, metadata
from tritonsmith.deploy.kubernetes.options import KubernetesOptions
from tritonsmith.deploy.measurements import Measurements
from tritonsmith.deploy.sizes import QUEUE_OVER_COMPUTE, Sizes

_QUEUE = "nv_inference_queue_duration_us"
_COMPUTE = "nv_inference_compute_infer_duration_us"
_WINDOW = "1m"
_LONGEST_PERIOD_S = 1800  # of a scaling policy, in autoscaling/v2


def autoscaler(options: KubernetesOptions, sizes: Sizes) -> Manifest:
    """An HPA on the mean of the pods' metric, which prometheus-adapter.yaml tells the adapter to offer."""
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata(options),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": options.name},
            "minReplicas": options.min_replicas,
            "maxReplicas": options.max_replicas,
            "metrics": [
                {
                    "type": "Pods",
                    "pods": {
                        "metric": {"name": METRIC},
                        "target": {"type": "AverageValue", "averageValue": f"{QUEUE_OVER_COMPUTE.value:g}"},
                    },
                }
            ],
            "behavior": behavior(sizes),
        },
    }


def behavior(sizes: Sizes) -> dict[str, Json]:
    """Up at once, by doubling, and no faster than a replica can start; down slowly."""
    return {
        "scaleUp": {
            "stabilizationWindowSeconds": 0,
            "policies": [
                {
                    "type": "Percent",
                    "value": 100,
                    "periodSeconds": min(max(15, sizes.startup.patience_s), _LONGEST_PERIOD_S),
                }
            ],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": 300,
            "policies": [
                {"type": "Pods", "value": 1, "periodSeconds": min(max(60, sizes.grace_s), _LONGEST_PERIOD_S)}
            ],
        },
    }


def adapter_values(options: KubernetesOptions, measurements: Measurements) -> Manifest:
    """Values for the Helm chart prometheus-community/prometheus-adapter."""
    matchers = ",".join(["<<.LabelMatchers>>", *_without_ensembles(measurements)])
    query = ratio_query(matchers, by="<<.GroupBy>>")
    found = {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}
    return {
        "prometheus": {"url": _without_port(options.prometheus_url), "port": _port(options.prometheus_url)},
        "rules": {
            "custom": [
                {
                    "seriesQuery": f'{_QUEUE}{{namespace!="",pod!=""}}',
                    "resources": {"overrides": found},
                    "name": {"as": METRIC},
                    "metricsQuery": query,
                }
            ]
        },
    }


def scaled_object(options: KubernetesOptions, measurements: Measurements, sizes: Sizes) -> Manifest:
    """For KEDA: the same ratio over all pods, asked of Prometheus without an adapter."""
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": metadata(options),
        "spec": {
            "scaleTargetRef": {"name": options.name},
            "minReplicaCount": options.min_replicas,
            "maxReplicaCount": options.max_replicas,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior(sizes)}},
            "triggers": [
                {
                    "type": "prometheus",
                    "metricType": "Value",
                    "metadata": {
                        "serverAddress": options.prometheus_url,
                        "query": pods_query(options, measurements, f"{options.name}-.*"),
                        "threshold": f"{QUEUE_OVER_COMPUTE.value:g}",
                    },
                }
            ],
        },
    }


def without_autoscaler(options: KubernetesOptions) -> Manifest:
    """A patch that takes the HPA away: KEDA makes its own."""
    return {
        "$patch": "delete",
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": options.name},
    }


def pods_query(options: KubernetesOptions, measurements: Measurements, pods: str) -> str:
    """The ratio over all pods of the namespace whose names match `pods`."""
    matchers = [f'namespace="{options.namespace}"', f'pod=~"{pods}"', *_without_ensembles(measurements)]
    return ratio_query(",".join(matchers))


def ratio_query(matchers: str, *, by: str | None = None) -> str:
    """PromQL. Below a microsecond of work a second nothing waits either: the bound keeps 0 / 0 away."""
    grouped = f" by ({by})" if by else ""
    queue = f"sum(rate({_QUEUE}{{{matchers}}}[{_WINDOW}])){grouped}"
    compute = f"sum(rate({_COMPUTE}{{{matchers}}}[{_WINDOW}])){grouped}"
    return f"{queue} / clamp_min({compute}, 1)"


def _without_ensembles(measurements: Measurements) -> list[str]:
    ensembles = [re.escape(model.name) for model in measurements.models if model.instances == 0]
    return [f'model!~"{"|".join(ensembles)}"'] if ensembles else []


def _without_port(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0].partition(':')[0]}"


def _port(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)
