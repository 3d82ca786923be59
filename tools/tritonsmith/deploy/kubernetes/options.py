"""What a cluster's owner chooses; checked before anything is measured or written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from tritonsmith.errors import UsageError

OVERLAYS = ("cpu", "gpu", "kserve")
# RFC 1123: what may name a namespace or a Service.
_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._/:-]*[a-z0-9](:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?")
_QUANTITY = re.compile(r"[1-9][0-9]*(Mi|Gi|Ti)")
_BUCKET_PATH = re.compile(r"[A-Za-z0-9._/=-]*")
_LONGEST_NAME = 40  # names of objects add to it, and 63 is the end


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesOptions:
    """Raises UsageError for what Kubernetes would refuse, or an address that cannot be read."""

    name: str = "triton"  # of the Deployment, and the beginning of every other name
    namespace: str = "triton"
    cpu_image: str = "tritonsmith-cpu:0.1.0"  # NAME[:TAG][@sha256:DIGEST]
    gpu_image: str = "tritonsmith-gpu:0.1.0"
    min_replicas: int = 2
    max_replicas: int = 4
    target: str | None = None  # the configuration that the overlay gpu chooses; None: the default's
    storage: str | None = None  # pvc:CLAIM[/PATH] or s3://BUCKET/PREFIX; None: pvc:<name>-models
    object_store_endpoint: str | None = None  # of a store that is not AWS
    object_store_secret: str = "object-store"  # noqa: S105 - the name of a Secret: its key `credentials`
    fetch_image: str = "docker.io/rclone/rclone:1.71.2"  # copies the repository from the object store
    gpu_product: str | None = None  # of the node label nvidia.com/gpu.product
    plan_cache_size: str = "10Gi"
    storage_class: str | None = None  # of the plan cache's claim; None: the cluster's default
    client_label: str = "tritonsmith/client"  # namespaces with this label "true" may ask
    monitoring_namespace: str = "monitoring"
    prometheus_url: str = "http://prometheus-server.monitoring.svc:80"

    def __post_init__(self) -> None:
        for what, name in (
            ("--name", self.name),
            ("--namespace", self.namespace),
            ("--monitoring-namespace", self.monitoring_namespace),
            ("--object-store-secret", self.object_store_secret),
        ):
            _check(what, name, _LABEL, "lower-case letters, digits and hyphens, a letter first")
        if len(self.name) > _LONGEST_NAME:
            raise UsageError("--name is too long", found=self.name, expected=f"{_LONGEST_NAME} characters")
        for image in (self.cpu_image, self.gpu_image, self.fetch_image):
            _check("the image", image, _IMAGE, "NAME[:TAG][@sha256:DIGEST]")
        _check("--plan-cache-size", self.plan_cache_size, _QUANTITY, "a size such as 10Gi or 500Mi")
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise UsageError(
                "the replicas are out of range",
                found=f"{self.min_replicas} to {self.max_replicas}",
                expected="1 <= --min-replicas <= --max-replicas",
            )
        for what, url in (("--prometheus", self.prometheus_url), ("--endpoint", self.object_store_endpoint)):
            if url is not None and (
                urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc
            ):
                raise UsageError(f"{what} {url}", expected="http://HOST:PORT or https://HOST:PORT")
        storage = self.storage_or_default
        if storage.startswith("pvc:"):
            _check("--storage", self.claim, _LABEL, "pvc:CLAIM or pvc:CLAIM/PATH")
            _check("--storage", self.claim_path, _BUCKET_PATH, "a path of letters, digits and . _ = / -")
        elif storage.startswith("s3://") and urlsplit(storage).netloc:
            _check("--storage", storage.removeprefix("s3://"), _BUCKET_PATH, "s3://BUCKET/PREFIX")
        else:
            raise UsageError(
                f"--storage {storage}", expected="pvc:CLAIM, pvc:CLAIM/PATH or s3://BUCKET/PREFIX"
            )

    @property
    def storage_or_default(self) -> str:
        return self.storage or f"pvc:{self.name}-models"

    @property
    def claim(self) -> str | None:
        """Of the volume that holds the repository; None where it lies in an object store."""
        scheme, _, rest = self.storage_or_default.partition(":")
        return rest.partition("/")[0] if scheme == "pvc" else None

    @property
    def claim_path(self) -> str:
        """The folder in that volume; empty: the volume itself."""
        return self.storage_or_default.partition(":")[2].partition("/")[2].strip("/") if self.claim else ""

    @property
    def bucket_path(self) -> str:
        """BUCKET/PREFIX, where the repository lies in an object store."""
        return "" if self.claim else self.storage_or_default.removeprefix("s3://").strip("/")


def split_image(image: str) -> tuple[str, str | None, str | None]:
    """Name, tag and digest of an image; a port is no tag."""
    name, _, digest = image.partition("@")
    head, colon, tag = name.rpartition(":")
    if colon and "/" not in tag:
        return head, tag, digest or None
    return name, None, digest or None


def _check(what: str, value: str | None, pattern: re.Pattern[str], expected: str) -> None:
    if value is None or not pattern.fullmatch(value):
        raise UsageError(f"{what} cannot be used", found=value, expected=expected)
