"""How many replicas: by the time that requests wait over the time that they are worked on.

`nv_inference_queue_duration_us` over `nv_inference_compute_infer_duration_us`, as rates over five
minutes: a rate needs two scrapes, which are a minute apart by Prometheus' own default. Of an
ensemble Triton adds its steps' compute time again, so that ensembles are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from tritonsmith.artifact import Json
from tritonsmith.deploy.kubernetes.names import METRIC, Manifest, metadata
from tritonsmith.deploy.kubernetes.options import KubernetesOptions
from tritonsmith.deploy.measurements import Measurements
from tritonsmith.deploy.sizes import Probe, Sizes

_QUEUE = "nv_inference_queue_duration_us"
_COMPUTE = "nv_inference_compute_infer_duration_us"
WINDOW = "5m"
_LONGEST_PERIOD_S = 1800  # of a scaling policy, in autoscaling/v2


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """The ratio above which there are too few replicas, and what it comes from."""

    value: float
    why: str


def autoscaler(options: KubernetesOptions, sizes: Sizes, threshold: Threshold) -> Manifest:
    """An HPA on the mean of the pods' metric, which prometheus-adapter.yaml tells the adapter to offer."""
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata(options) | {"annotations": {"tritonsmith/queue-over-compute": threshold.why}},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": options.name},
            "minReplicas": options.min_replicas,
            "maxReplicas": options.max_replicas,
            "metrics": [
                {
                    "type": "Pods",
                    "pods": {
                        "metric": {"name": METRIC},
                        "target": {"type": "AverageValue", "averageValue": f"{threshold.value:g}"},
                    },
                }
            ],
            "behavior": behavior(sizes),
        },
    }


def behavior(sizes: Sizes) -> dict[str, Json]:
    """Up at once, by doubling, and no faster than a replica can start; down slowly."""
    return {
        "scaleUp": scale_up(sizes.startup),
        "scaleDown": {
            "stabilizationWindowSeconds": 300,
            "policies": [
                {"type": "Pods", "value": 1, "periodSeconds": min(max(60, sizes.grace_s), _LONGEST_PERIOD_S)}
            ],
        },
    }


def scale_up(startup: Probe) -> dict[str, Json]:
    period_s = min(max(15, startup.patience_s), _LONGEST_PERIOD_S)
    return {
        "stabilizationWindowSeconds": 0,
        "policies": [{"type": "Percent", "value": 100, "periodSeconds": period_s}],
    }


def adapter_values(options: KubernetesOptions, measurements: Measurements) -> Manifest:
    """Values for the Helm chart prometheus-community/prometheus-adapter."""
    matchers = ",".join(["<<.LabelMatchers>>", *_without_ensembles(measurements)])
    query = ratio_query(matchers, by="<<.GroupBy>>")
    found = {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}
    return {
        "prometheus": _parts_of(options.prometheus_url),
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


def scaled_object(
    options: KubernetesOptions, measurements: Measurements, sizes: Sizes, threshold: Threshold
) -> Manifest:
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
                        "threshold": f"{threshold.value:g}",
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
    queue = f"sum(rate({_QUEUE}{{{matchers}}}[{WINDOW}])){grouped}"
    compute = f"sum(rate({_COMPUTE}{{{matchers}}}[{WINDOW}])){grouped}"
    return f"{queue} / clamp_min({compute}, 1)"


def _without_ensembles(measurements: Measurements) -> list[str]:
    ensembles = [re.escape(model.name) for model in measurements.models if model.instances == 0]
    return [f"model!~{_string('|'.join(ensembles))}"] if ensembles else []


def _string(text: str) -> str:
    """A string of PromQL in double quotes, in which backslashes escape as in Go."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _parts_of(url: str) -> dict[str, Json]:
    """The chart puts the three together again."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return {"url": f"{parts.scheme}://{host}", "port": port, "path": parts.path.rstrip("/")}
