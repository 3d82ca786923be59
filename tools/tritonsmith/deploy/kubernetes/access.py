"""Who reaches the pods, what they reach, and how many of them may be gone at once."""

from __future__ import annotations

from urllib.parse import urlsplit

from tritonsmith.artifact import Json
from tritonsmith.deploy.flags import GRPC_PORT, HTTP_PORT, METRICS_PORT
from tritonsmith.deploy.kubernetes.names import Manifest, metadata, selector
from tritonsmith.deploy.kubernetes.options import KubernetesOptions

_HTTPS_PORT = 443


def service_account(options: KubernetesOptions) -> Manifest:
    """Without a token: Triton asks nothing of the cluster."""
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(options),
        "automountServiceAccountToken": False,
    }


def services(options: KubernetesOptions) -> list[Manifest]:
    """One address for HTTP and for L7 gateways, and a headless one for gRPC clients that balance themselves.

    A gRPC connection through a ClusterIP stays with one pod for as long as it lives.
    """
    ports: list[Json] = [
        {"name": "http", "port": HTTP_PORT, "targetPort": "http", "appProtocol": "http"},
        {"name": "grpc", "port": GRPC_PORT, "targetPort": "grpc", "appProtocol": "kubernetes.io/h2c"},
    ]
    headless: list[Json] = [{"name": "grpc", "port": GRPC_PORT, "targetPort": "grpc"}]
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata(options),
            "spec": {"type": "ClusterIP", "selector": selector(options), "ports": ports},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata(options, f"{options.name}-headless"),
            "spec": {"clusterIP": "None", "selector": selector(options), "ports": headless},
        },
    ]


def disruption_budget(options: KubernetesOptions, pods: dict[str, Json]) -> Manifest:
    """Drained nodes take one replica after the other, and a single replica blocks no drain."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(options),
        "spec": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": pods},
        },
    }


def network_policy(options: KubernetesOptions, pods: dict[str, Json], *, with_object_store: bool) -> Manifest:
    """In: inference from labelled namespaces, metrics from monitoring. Out: names and the object store."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(options),
        "spec": {
            "podSelector": {"matchLabels": pods},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {
                    "from": [{"namespaceSelector": {"matchLabels": {options.client_label: "true"}}}],
                    "ports": [_tcp(HTTP_PORT), _tcp(GRPC_PORT)],
                },
                {
                    "from": [_namespace(options.monitoring_namespace)],
                    "ports": [_tcp(METRICS_PORT)],
                },
            ],
            "egress": [_to_names(), *([_to_object_store(options)] if with_object_store else [])],
        },
    }


def _to_names() -> Json:
    return {
        "to": [{**_namespace("kube-system"), "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}],
        "ports": [{"protocol": "UDP", "port": 53}, _tcp(53)],
    }


def _to_object_store(options: KubernetesOptions) -> Json:
    """Its addresses are not known here: any, at its port."""
    url = urlsplit(options.object_store_endpoint or "")
    port = url.port or (80 if url.scheme == "http" else _HTTPS_PORT)
    return {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}, {"ipBlock": {"cidr": "::/0"}}], "ports": [_tcp(port)]}


def _namespace(name: str) -> dict[str, Json]:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _tcp(port: int) -> Json:
    return {"protocol": "TCP", "port": port}
