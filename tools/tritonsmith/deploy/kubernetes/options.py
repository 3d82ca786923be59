"""What a cluster's owner chooses; checked before anything is measured or written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from tritonsmith import __version__
from tritonsmith.errors import UsageError

OVERLAYS = ("cpu", "gpu", "kserve")
# RFC 1123: what may name a namespace or a Service.
_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._/:-]*[a-z0-9](:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?")
_QUANTITY = re.compile(r"[1-9][0-9]*(Mi|Gi|Ti)")
_BUCKET_PATH = re.compile(r"[A-Za-z0-9._/=-]*")
_CLASS = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")  # RFC 1123: a name of several labels
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_URL = re.compile(
    r"https?://[A-Za-z0-9.:/_%~\[\]-]+"
)  # no user, no query, nothing that a file would have to quote
_LONGEST_NAME = 40  # names of objects add to it, and 63 is the end


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesOptions:
    """Raises UsageError for what Kubernetes would refuse, or an address that cannot be read."""

    name: str = "triton"  # of the Deployment, and the beginning of every other name
    namespace: str = "triton"
    cpu_image: str = f"tritonsmith-cpu:{__version__}"  # NAME[:TAG][@sha256:DIGEST]
    gpu_image: str = f"tritonsmith-gpu:{__version__}"
    min_replicas: int = 2
    max_replicas: int = 4
    target: str | None = None  # what the overlay gpu serves; None: the only one with plans
    storage: str | None = None  # pvc:CLAIM[/PATH] or s3://BUCKET/PREFIX; None: pvc:<name>-models
    object_store_endpoint: str | None = None  # of a store that is not AWS
    # The name of a Secret, its key `credentials`; empty: the store knows the pods by their own identity.
    object_store_secret: str = "object-store"  # noqa: S105
    fetch_image: str = "docker.io/rclone/rclone:1.71.2"  # copies the repository from the object store
    gpu_product: str | None = None  # of the node label nvidia.com/gpu.product
    plan_cache: Literal["pod", "claim"] = "pod"  # each pod's own disk, or a claim that all pods share
    plan_cache_size: str = "10Gi"
    storage_class: str | None = None  # of that claim; None: the cluster's default
    client_label: str = "tritonsmith/client"  # namespaces with this label "true" may ask
    monitoring_namespace: str = "monitoring"
    prometheus_url: str = "http://prometheus-server.monitoring.svc:80"

    def __post_init__(self) -> None:
        for what, name in (
            ("--name", self.name),
            ("--namespace", self.namespace),
            ("--monitoring-namespace", self.monitoring_namespace),
            *([("--object-store-secret", self.object_store_secret)] if self.object_store_secret else []),
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
        _check_url("--prometheus", self.prometheus_url)
        if self.object_store_endpoint is not None:
            _check_url("--endpoint", self.object_store_endpoint)
        self._check_plan_cache()
        if self.gpu_product is not None:
            _check("--gpu-product", self.gpu_product, _LABEL_VALUE, "a label's value, such as NVIDIA-L4")
        self._check_storage()

    def _check_plan_cache(self) -> None:
        if self.plan_cache not in ("pod", "claim"):
            raise UsageError(f"--plan-cache {self.plan_cache}", expected="pod or claim")
        if self.storage_class is not None:
            _check("--storage-class", self.storage_class, _CLASS, "the name of a StorageClass")
            if self.plan_cache != "claim":
                raise UsageError(
                    "--storage-class is of the claim of built plans, and there is none",
                    fix="add --plan-cache claim, or leave it out",
                )

    def _check_storage(self) -> None:
        storage = self.storage_or_default
        place = self.bucket_path
        if self.claim is not None:
            _check("--storage", self.claim, _LABEL, "pvc:CLAIM or pvc:CLAIM/PATH")
            place = self.claim_path
        elif not storage.startswith("s3://") or not place:
            raise UsageError(
                f"--storage {storage}", expected="pvc:CLAIM, pvc:CLAIM/PATH or s3://BUCKET/PREFIX"
            )
        _check("--storage", place, _BUCKET_PATH, "a path of letters, digits and . _ = / -")
        if place and {"", ".", ".."} & set(place.split("/")):
            raise UsageError(f"--storage {storage}", expected="a path without empty parts, . and ..")

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


def _check_url(what: str, url: str) -> None:
    """http or https, a host, a port where there is one, a path; a user would show in rendered files."""
    try:
        parts = urlsplit(url)
        usable = bool(_URL.fullmatch(url) and parts.hostname and parts.port != 0)
    except ValueError:  # a port that is none, a bracket without its other
        usable = False
    if not usable:
        shown = re.sub(r"//[^/]*@", "//...@", url)  # a password is not for a log
        raise UsageError(f"{what} cannot be used", found=shown, expected="http[s]://HOST[:PORT][/PATH]")


def _check(what: str, value: str | None, pattern: re.Pattern[str], expected: str) -> None:
    if value is None or not pattern.fullmatch(value):
        raise UsageError(f"{what} cannot be used", found=value, expected=expected)
