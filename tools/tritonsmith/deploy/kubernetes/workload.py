"""The Deployment: one hardened container, its volumes, its probes and its end, from measurements."""

from __future__ import annotations

from tritonsmith.artifact import Json
from tritonsmith.deploy.flags import GRPC_PORT, HTTP_PORT, METRICS_PORT
from tritonsmith.deploy.kubernetes.names import (
    CONTAINER,
    CREDENTIALS,
    IMAGE,
    MODELS,
    USER,
    Manifest,
    labels,
    mebibytes,
    metadata,
    millicores,
    selector,
)
from tritonsmith.deploy.kubernetes.options import KubernetesOptions
from tritonsmith.deploy.sizes import MIB, TMP, Probe, Sizes

_FETCH_MEMORY = "256Mi"


def deployment(
    options: KubernetesOptions,
    sizes: Sizes,
    target: str | None,
    *,
    explanations: dict[str, str],
    repository_bytes: int,
) -> Manifest:
    """The HPA counts the replicas, so none are written here; it keeps its minimum without any metric too."""
    annotations = {f"tritonsmith/{name}": text for name, text in explanations.items()}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(options) | {"annotations": annotations},
        "spec": {
            "selector": {"matchLabels": selector(options)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "progressDeadlineSeconds": sizes.startup.patience_s + 600,
            "template": {
                "metadata": {"labels": labels(options), "annotations": scrape_annotations()},
                "spec": {
                    "serviceAccountName": options.name,
                    "automountServiceAccountToken": False,
                    "enableServiceLinks": False,
                    "terminationGracePeriodSeconds": sizes.grace_s,
                    "securityContext": pod_security(),
                    "topologySpreadConstraints": topology_spread(options),
                    **_init_containers(options),
                    "containers": [server_container(options, sizes, target, repository_bytes)],
                    "volumes": [
                        _models_volume(options, repository_bytes),
                        *credentials_volumes(options),
                        *scratch_volumes(sizes),
                    ],
                },
            },
        },
    }


def server_container(
    options: KubernetesOptions, sizes: Sizes, target: str | None, repository_bytes: int
) -> dict[str, Json]:
    mount: dict[str, Json] = {"name": "models", "mountPath": MODELS, "readOnly": True}
    if options.claim_path:
        mount["subPath"] = options.claim_path
    return {
        "name": CONTAINER,
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "args": server_arguments(sizes),
        "env": server_environment(sizes, target),
        "ports": [
            {"name": "http", "containerPort": HTTP_PORT},
            {"name": "grpc", "containerPort": GRPC_PORT},
            {"name": "metrics", "containerPort": METRICS_PORT},
        ],
        "resources": _with_disk(resources(sizes), options, repository_bytes),
        **probes(sizes),
        "lifecycle": drain(sizes),
        "securityContext": container_security(),
        "volumeMounts": [mount, *scratch_mounts()],
    }


def server_arguments(sizes: Sizes) -> list[Json]:
    """Beside the image's own flags (deploy/flags.py); Triton takes the last of a flag that is given twice.

    Connections must end within the drain: Triton still answers, and NOT_FOUND, once it unloads its models.
    """
    return [
        f"--exit-timeout-secs={sizes.exit_timeout_s}",
        f"--grpc-max-connection-age={sizes.connection_age_s * 1000}",
    ]


def server_environment(sizes: Sizes, target: str | None) -> list[Json]:
    """The least /dev/shm that entrypoint.sh accepts, and the target that was measured.

    A cluster that ignores the size of the volume at /dev/shm is found out at once.
    """
    env: list[Json] = [{"name": "TRITONSMITH_SHM_MIB", "value": str(sizes.shm_bytes // MIB)}]
    if target:
        env.append({"name": "TRITONSMITH_TARGET", "value": target})
    return env


def resources(sizes: Sizes) -> dict[str, dict[str, Json]]:
    """Memory is asked for in full: a node that is short of it kills, it does not slow down."""
    memory = mebibytes(sizes.memory_bytes)
    return {
        "requests": {"cpu": millicores(sizes.cpu_request_milli), "memory": memory},
        "limits": {"cpu": millicores(sizes.cpu_limit_milli), "memory": memory},
    }


def probes(sizes: Sizes) -> dict[str, Json]:
    """Startup and readiness ask whether all models are ready, liveness whether the server answers at all."""
    return {
        "startupProbe": probe(sizes.startup, "/v2/health/ready"),
        "readinessProbe": probe(sizes.readiness, "/v2/health/ready"),
        "livenessProbe": probe(sizes.liveness, "/v2/health/live"),
    }


def probe(times: Probe, path: str) -> dict[str, Json]:
    return {
        "httpGet": {"path": path, "port": HTTP_PORT},
        "periodSeconds": times.period_s,
        "timeoutSeconds": times.timeout_s,
        "failureThreshold": times.failure_threshold,
    }


def drain(sizes: Sizes) -> dict[str, Json]:
    """Wait while the address leaves every balancer; SIGTERM comes after.

    A command and no `sleep` action: that needs Kubernetes 1.30, and both images have /bin/sleep.
    """
    return {"preStop": {"exec": {"command": ["/bin/sleep", str(sizes.drain_s)]}}}


def pod_security() -> dict[str, Json]:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> dict[str, Json]:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def scratch_volumes(sizes: Sizes) -> list[Json]:
    """Shared memory for Python-based backends, and /tmp; what they hold is charged to the container."""
    return [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": mebibytes(sizes.shm_bytes)}},
        {"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": f"{TMP.value:g}Mi"}},
    ]


def scratch_mounts() -> list[Json]:
    return [
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - a mount in a container
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
    ]


def topology_spread(options: KubernetesOptions) -> list[Json]:
    """Replicas in different zones and on different nodes where there are any; never a pod less for it."""
    return [
        {
            "maxSkew": 1,
            "topologyKey": key,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": selector(options)},
        }
        for key in ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
    ]


def scrape_annotations() -> dict[str, Json]:
    return {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(METRICS_PORT),
        "prometheus.io/path": "/metrics",
    }


def _models_volume(options: KubernetesOptions, repository_bytes: int) -> dict[str, Json]:
    if options.claim:
        claim: dict[str, Json] = {"claimName": options.claim, "readOnly": True}
        return {"name": "models", "persistentVolumeClaim": claim}
    return {"name": "models", "emptyDir": {"sizeLimit": mebibytes(_disk_bytes_for(repository_bytes))}}


def _disk_bytes_for(repository_bytes: int) -> int:
    """Twice the repository as it is now: the next version's files have room."""
    return max(1, -(-2 * repository_bytes // MIB)) * MIB


def _with_disk(
    found: dict[str, dict[str, Json]], options: KubernetesOptions, repository_bytes: int
) -> dict[str, Json]:
    """A copy of the repository needs a node with so much free disk; a claim brings its own."""
    if options.claim:
        return {**found}
    disk: dict[str, Json] = {"ephemeral-storage": mebibytes(_disk_bytes_for(repository_bytes))}
    return {**found, "requests": {**found["requests"], **disk}}


def _init_containers(options: KubernetesOptions) -> dict[str, Json]:
    """Where the repository lies in an object store: a copy on the pod's disk, made before the server starts.

    Triton's own s3:// would copy at every load into /tmp, with credentials in the server's environment, and
    the embedded build lacks it.
    """
    if options.claim:
        return {}
    settings: dict[str, str] = {
        "RCLONE_CONFIG_STORE_TYPE": "s3",
        "RCLONE_CONFIG_STORE_PROVIDER": "Other" if options.object_store_endpoint else "AWS",
        "RCLONE_CONFIG_STORE_ENV_AUTH": "true",
        "XDG_CONFIG_HOME": "/tmp",  # noqa: S108 - a tmpfs of the pod
    }
    if options.object_store_secret:
        settings["AWS_SHARED_CREDENTIALS_FILE"] = f"{CREDENTIALS}/credentials"
    if options.object_store_endpoint:
        settings["RCLONE_CONFIG_STORE_ENDPOINT"] = options.object_store_endpoint
    env: list[Json] = [{"name": name, "value": value} for name, value in settings.items()]
    container: dict[str, Json] = {
        "name": "fetch",
        "image": options.fetch_image,
        "imagePullPolicy": "IfNotPresent",
        "args": ["copy", f"store:{options.bucket_path}", MODELS, "--checksum"],
        "env": env,
        "resources": {
            "requests": {"cpu": "100m", "memory": _FETCH_MEMORY},
            "limits": {"cpu": "1", "memory": _FETCH_MEMORY},
        },
        "securityContext": container_security(),
        "volumeMounts": [
            {"name": "models", "mountPath": MODELS},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
            *_credentials_mounts(options),
        ],
    }
    return {"initContainers": [container]}


def _credentials_mounts(options: KubernetesOptions) -> list[Json]:
    if not options.object_store_secret:
        return []
    return [{"name": "object-store", "mountPath": CREDENTIALS, "readOnly": True}]


def credentials_volumes(options: KubernetesOptions) -> list[Json]:
    """The Secret with the key `credentials`, a file as the AWS tools write it; never its content.

    Without a Secret, the pods' own identity is what the object store knows.
    """
    if options.claim or not options.object_store_secret:
        return []
    secret: dict[str, Json] = {"secretName": options.object_store_secret, "defaultMode": 0o440}
    return [{"name": "object-store", "secret": secret}]
