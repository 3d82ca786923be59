"""README.md of a rendered folder: what there is, what must be there first, where each number comes from."""

from __future__ import annotations

from tritonsmith.deploy.kubernetes.options import KubernetesOptions
from tritonsmith.deploy.measurements import Measurements
from tritonsmith.deploy.sizes import MARGINS, Sizes, explain_sizes


def guide(options: KubernetesOptions, measurements: Measurements, sizes: Sizes) -> str:
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
| `overlays/gpu` | `{options.gpu_image}` on nodes with a GPU; plans are built at the first start and kept |
| `overlays/kserve` | a ServingRuntime and an InferenceService, where KServe 0.15 or later and KEDA run |

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

       helm upgrade --install prometheus-adapter prometheus-community/prometheus-adapter \\
         --namespace {options.monitoring_namespace} --values prometheus-adapter.yaml

   Without that metric the HPA keeps {options.min_replicas} replicas and says so in its events.

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
            "   many can read (ReadOnlyMany or ReadWriteMany)."
        )
    return (
        f"`s3://{options.bucket_path}` holds the model repository, and a Secret the way to it: the key\n"
        "   `credentials` is a file as the AWS tools write it. Before each start the container `fetch`\n"
        "   copies the repository to the pod's disk.\n\n"
        f"       kubectl -n {options.namespace} create secret generic {options.object_store_secret} "
        "--from-file=credentials=FILE"
    )
