"""README.md of a rendered folder: what there is, what must be there first, where each number comes from."""

from __future__ import annotations

from urllib.parse import urlsplit

from tritonsmith.deploy.kubernetes.options import KubernetesOptions
from tritonsmith.deploy.kubernetes.scaling import WINDOW, Threshold
from tritonsmith.deploy.measurements import Measurements
from tritonsmith.deploy.sizes import MARGINS, Sizes, explain_sizes


def guide(
    options: KubernetesOptions, measurements: Measurements, sizes: Sizes, threshold: Threshold, target: str
) -> str:
    """Markdown. `target` is what the overlay gpu serves; empty: every model's config.pbtxt."""
    machine = measurements.machine
    measured = (
        f"`{measurements.repository}`, {measurements.runs} runs on {machine.get('cpu')} with "
        f"{machine.get('cpu_count')} cores, Triton {measurements.versions.get('triton')}"
    )
    numbers = "\n".join(f"| {name} | {text} |" for name, text in explain_sizes(measurements, sizes).items())
    margins = "\n".join(f"| {one.name} | {one.value:g} {one.unit} | {one.why} |" for one in MARGINS)
    return f"""# {measurements.repository} on Kubernetes

Rendered by `tritonsmith deploy kubernetes`. Nothing here holds a secret. Choose one overlay:

| overlay | what it is |
|---|---|
| `overlays/cpu` | `{options.cpu_image}`, for development: the Triton in it gets no security fixes |
| `overlays/gpu` | `{options.gpu_image}` on nodes with a GPU: {_gpu_row(target)} |
| `overlays/kserve` | `{options.cpu_image}` under KServe 0.15 or later with KEDA: on CPUs only |

`components/keda` puts a ScaledObject in the place of the HPA: in an overlay's kustomization.yaml, add
`components: [../../components/keda]`.

## Before the first start

1. The images are in a registry that the nodes reach. For an image by its digest, render with
   `--cpu-image NAME@sha256:...` or `--gpu-image NAME@sha256:...`; a tag can be moved.
2. The namespace holds pods to the restricted standard, which all of these meet:

       kubectl create namespace {options.namespace}
       kubectl label namespace {options.namespace} pod-security.kubernetes.io/enforce=restricted

3. {_storage_step(options)}
4. Clients are in namespaces that are allowed in:

       kubectl label namespace NAMESPACE {options.client_label}=true

5. Prometheus is in the namespace `{options.monitoring_namespace}` and follows the annotations
   `prometheus.io/scrape`. For the HPA it gives the metric through the Prometheus adapter:

       helm repo add prometheus-community https://prometheus-community.github.io/helm-charts
       helm upgrade --install prometheus-adapter prometheus-community/prometheus-adapter \\
         --namespace {options.monitoring_namespace} --values prometheus-adapter.yaml

   Without that metric the HPA keeps {options.min_replicas} replicas and says so in its events. It is a rate
   over {WINDOW}, which holds several scrapes at an interval of a minute, Prometheus' own default: at less
   than two scrapes a window there is no rate. Scale-up is about as late as that. Replicas are added above
   {threshold.why}.
   The executions of GPUs are shorter than the measured ones: where models wait for batches there, set more.
{_gpu_steps(options)}{_kserve_step(options)}
## Start

    kubectl apply -k overlays/cpu
    kubectl -n {options.namespace} rollout status deployment/{options.name}

## Clients

- HTTP: `http://{options.name}.{options.namespace}.svc:8000`, which balances by connection.
- gRPC: a connection stays with one pod. Either an L7 gateway in front (a GRPCRoute), or the client balances:
  `dns:///{options.name}-headless.{options.namespace}.svc:8001` with the service config
  `{{"loadBalancingConfig": [{{"round_robin": {{}}}}]}}`. The server ends a connection after
  {sizes.connection_age_s} s, and the client then sees new replicas.

## An update, and the end of a pod

A pod that ends leaves the Services and, at the same moment, begins to wait {sizes.drain_s} s (preStop).
Triton still answers all that comes. Only then comes SIGTERM; what is in flight has {sizes.exit_timeout_s} s.
SIGKILL comes after {sizes.grace_s} s in all. SIGTERM without the wait would lose requests: Triton
unloads its models while it still listens.

New weights: publish a version, bring the repository to its place, then
`kubectl -n {options.namespace} rollout restart deployment/{options.name}`.

## Where the numbers come from

Measured: {measured} (`measurements.json`).
Where the cluster's machines differ much, measure on one of them and render again. In `overlays/gpu`,
the patience of the start and the memory beyond the CPU image's were not measured.

They can be read off the first pods, and put into `overlays/gpu/gpu.yaml`: how long the start took, with and
without built plans, and what memory is in use under load:

    kubectl -n {options.namespace} get pods -w --output-watch-events
    kubectl -n {options.namespace} top pods --containers

| value | derived from |
|---|---|
{numbers}

The margins:

| margin | | why |
|---|---|---|
{margins}
"""


def _storage_step(options: KubernetesOptions) -> str:
    if options.claim:
        place = f"`{options.claim_path}` in it" if options.claim_path else "its root"
        return (
            f"A PersistentVolumeClaim `{options.claim}` holds the model repository ({place}), readable by\n"
            "   any user (`chmod -R a+rX`). Every pod mounts it read-only: several nodes need a volume that\n"
            "   many can read (ReadOnlyMany or ReadWriteMany). The root of a block volume has a folder\n"
            "   `lost+found`, which nobody may read and Triton takes for a model: there, put the repository\n"
            "   into a folder of the volume and render with `--storage pvc:CLAIM/PATH`."
        )
    copied = (
        "Before each start the container `fetch`\n   copies the repository to the pod's disk, for which "
        "each pod asks for twice the repository's size\n   as it was when this was rendered."
    )
    if not options.object_store_secret:
        return (
            f"`s3://{options.bucket_path}` holds the model repository, and the store knows the pods by\n"
            f"   their own identity: annotate the ServiceAccount `{options.name}` as your cloud asks, in an\n"
            "   overlay. The NetworkPolicy lets out names and the store's port alone: let out what gives\n"
            f"   the identity too. {copied}"
        )
    return (
        f"`s3://{options.bucket_path}` holds the model repository, and a Secret the way to it: the key\n"
        f"   `credentials` is a file as the AWS tools write it. {copied}\n\n"
        f"       kubectl -n {options.namespace} create secret generic {options.object_store_secret} "
        "--from-file=credentials=FILE"
    )


def _gpu_row(target: str) -> str:
    if not target:
        return "every model's `config.pbtxt`, for no target has plans"
    return f"the target `{target}`, whose plans are built before the start"


def _gpu_steps(options: KubernetesOptions) -> str:
    if options.plan_cache == "pod":
        return f"""6. For `overlays/gpu`: each new pod builds its plans on its own disk, up to
   {options.plan_cache_size}, for minutes before it is ready; a container that restarts in its pod has them
   still. Where a storage class gives volumes that many nodes write, render with `--plan-cache claim`: plans
   are then built once.
"""
    chosen = f"`{options.storage_class}`" if options.storage_class else "the cluster's default"
    return f"""6. For `overlays/gpu`: plans are built once into the claim `{options.name}-plan-cache`,
   which all pods share. Its storage class, {chosen}, must give ReadWriteMany: NFS, CephFS, EFS,
   Filestore and Azure Files do. Block volumes (EBS, Persistent Disk, Azure Disk) do not: the claim then stays
   Pending, and so do the pods. `--storage-class NAME` names another. Pods write as user and group 10001
   (fsGroup); NFS and EFS ignore fsGroup, so that there the volume's root must belong to 10001 already (an
   access point of EFS says so).
"""


def _kserve_step(options: KubernetesOptions) -> str:
    """What the storage initializer reads, by KServe's documentation of S3."""
    if options.claim or not options.object_store_secret:
        return ""
    url = urlsplit(options.object_store_endpoint or "https://s3.amazonaws.com")
    secret = options.object_store_secret
    return f"""7. For `overlays/kserve`: KServe's own storage initializer copies the repository. In the place
   of the Secret above it wants one with its own keys, and where the store is as annotations:

       kubectl -n {options.namespace} create secret generic {secret} \\
         --from-literal=AWS_ACCESS_KEY_ID=... --from-literal=AWS_SECRET_ACCESS_KEY=...
       kubectl -n {options.namespace} annotate secret {secret} \\
         serving.kserve.io/s3-endpoint={url.netloc} \\
         serving.kserve.io/s3-usehttps={int(url.scheme == "https")} serving.kserve.io/s3-region=REGION
"""
