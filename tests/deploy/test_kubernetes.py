"""Rendered manifests: what selects what, and where each number comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from measured import MEASURED, write_measured_repository
from rendered import DIGEST, IMAGES, Render, load, rendering
from tritonsmith import __version__
from tritonsmith.deploy.kubernetes import KubernetesOptions, render_kubernetes
from tritonsmith.deploy.kubernetes.options import split_image
from tritonsmith.deploy.measurements_file import fingerprint_of_repository
from tritonsmith.deploy.sizes import sizes_from_measurements
from tritonsmith.errors import DeployError

SIZES = sizes_from_measurements(MEASURED)


@pytest.fixture
def render(tmp_path: Path) -> Render:
    return rendering(tmp_path / "two")


def pod_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    pod: dict[str, Any] = load(files, "base/deployment.yaml")["spec"]["template"]
    return pod


def container_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    (container,) = pod_of(files)["spec"]["containers"]
    found: dict[str, Any] = container
    return found


# --- what selects what --------------------------------------------------------------------------------


def test_every_selector_finds_the_pods(render: Render) -> None:
    files = render(name="mine")
    labels = pod_of(files)["metadata"]["labels"].items()
    selectors = [
        load(files, "base/deployment.yaml")["spec"]["selector"]["matchLabels"],
        load(files, "base/disruptionbudget.yaml")["spec"]["selector"]["matchLabels"],
        load(files, "base/networkpolicy.yaml")["spec"]["podSelector"]["matchLabels"],
        *(one["spec"]["selector"] for one in yaml.safe_load_all(files["base/services.yaml"])),
        *(one["labelSelector"]["matchLabels"] for one in pod_of(files)["spec"]["topologySpreadConstraints"]),
    ]
    assert len(selectors) == 7
    for selector in selectors:
        assert selector
        assert selector.items() <= labels


def test_services_reach_ports_of_the_container(render: Render) -> None:
    files = render(name="mine")
    ports = {port["name"]: port["containerPort"] for port in container_of(files)["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    one, headless = yaml.safe_load_all(files["base/services.yaml"])
    for service in (one, headless):
        assert all(ports[port["targetPort"]] == port["port"] for port in service["spec"]["ports"])
    assert (one["metadata"]["name"], one["spec"]["type"]) == ("mine", "ClusterIP")
    assert (headless["metadata"]["name"], headless["spec"]["clusterIP"]) == ("mine-headless", "None")


def test_scalers_name_the_deployment(render: Render) -> None:
    files = render(name="mine", min_replicas=3, max_replicas=9)
    name = load(files, "base/deployment.yaml")["metadata"]["name"]
    spec = load(files, "base/autoscaler.yaml")["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    assert (spec["minReplicas"], spec["maxReplicas"]) == (3, 9)
    keda = load(files, "components/keda/scaledobject.yaml")["spec"]
    assert keda["scaleTargetRef"]["name"] == name
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (3, 9)
    removed = load(files, "components/keda/without-autoscaler.yaml")
    assert (removed["$patch"], removed["metadata"]["name"]) == ("delete", name)
    assert "replicas" not in load(files, "base/deployment.yaml")["spec"]  # the scaler counts them


def test_kustomizations_name_every_file(render: Render) -> None:
    files = render()
    named = {"README.md", "measurements.json", "prometheus-adapter.yaml"}
    for path in files:
        if path.endswith("kustomization.yaml"):
            folder = path.rpartition("/")[0]
            own = load(files, path)
            listed = [*own["resources"], *(patch["path"] for patch in own.get("patches", ()))]
            named |= {path, *(f"{folder}/{name}" for name in listed if not name.startswith(".."))}
    assert named == files.keys()


def test_metric_of_the_scaler_is_what_the_adapter_offers(render: Render) -> None:
    files = render()
    (rule,) = load(files, "prometheus-adapter.yaml")["rules"]["custom"]
    (metric,) = load(files, "base/autoscaler.yaml")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "1"}
    query = rule["metricsQuery"]
    queue, _, compute = query.partition(" / ")
    assert "rate(nv_inference_queue_duration_us{<<.LabelMatchers>>" in queue
    assert "rate(nv_inference_compute_infer_duration_us{<<.LabelMatchers>>" in compute
    assert query.count('model!~"both"') == 2  # the ensemble


# --- where numbers come from --------------------------------------------------------------------------


def test_probes_are_the_measured_ones(render: Render) -> None:
    container = container_of(render())
    startup = container["startupProbe"]
    assert startup["httpGet"] == {"path": "/v2/health/ready", "port": 8000}
    assert startup["periodSeconds"] * startup["failureThreshold"] == 4 * 20  # ready after 20 s
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert container["livenessProbe"]["timeoutSeconds"] == SIZES.liveness.timeout_s


def test_memory_processor_and_shared_memory(render: Render) -> None:
    files = render()
    container = container_of(files)
    assert container["resources"] == {
        "requests": {"cpu": "1300m", "memory": "1344Mi"},  # as test_sizes.py derives them
        "limits": {"cpu": "2000m", "memory": "1344Mi"},
    }
    volumes = {volume["name"]: volume for volume in pod_of(files)["spec"]["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "96Mi"}
    assert {"name": "TRITONSMITH_SHM_MIB", "value": "96"} in container["env"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"models": "/models", "shm": "/dev/shm", "tmp": "/tmp"}  # noqa: S108


def test_end_of_a_pod(render: Render) -> None:
    files = render()
    container = container_of(files)
    assert "--exit-timeout-secs=17" in container["args"]
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["/bin/sleep", "15"]
    assert pod_of(files)["spec"]["terminationGracePeriodSeconds"] == 15 + 17 + 5
    (age_ms,) = [
        int(one.partition("=")[2]) for one in container["args"] if "--grpc-max-connection-age=" in one
    ]
    assert age_ms < 15_000  # connections end before the drain does


def test_annotations_say_where_numbers_come_from(render: Render) -> None:
    annotations = load(render(), "base/deployment.yaml")["metadata"]["annotations"]
    assert "peak of 1000Mi" in annotations["tritonsmith/memory"]
    assert "ready after 20 s" in annotations["tritonsmith/startup-probe"]


def test_other_measurements_give_other_numbers(tmp_path: Path) -> None:
    repository, measurements = write_measured_repository(tmp_path / "two")
    slow = replace(measurements, ready_s=200.0, peak_bytes=4000 << 20)
    container = container_of(render_kubernetes(repository, slow, KubernetesOptions()))
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 800
    assert container["resources"]["limits"]["memory"] == "5120Mi"  # 5000 + 46 + 16 in steps of 64


def test_measurements_of_another_repository_are_refused(tmp_path: Path) -> None:
    repository, measurements = write_measured_repository(tmp_path / "two")
    (repository / "big" / "config.pbtxt").write_text("max_batch_size: 8")
    with pytest.raises(DeployError, match="other configurations"):
        render_kubernetes(repository, measurements, KubernetesOptions())


# --- hardening ----------------------------------------------------------------------------------------


def test_pods_are_hardened(render: Render) -> None:
    files = render(storage="s3://bucket/models")
    spec = pod_of(files)["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert load(files, "base/serviceaccount.yaml")["automountServiceAccountToken"] is False
    for container in (*spec["initContainers"], *spec["containers"]):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert set(container["resources"]) == {"requests", "limits"}


def test_network_policy(render: Render) -> None:
    spec = load(render(), "base/networkpolicy.yaml")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    clients, monitoring = spec["ingress"]
    assert [port["port"] for port in clients["ports"]] == [8000, 8001]
    assert [port["port"] for port in monitoring["ports"]] == [8002]
    assert all(rule["from"] for rule in spec["ingress"])  # an empty one would let everybody in
    (names,) = spec["egress"]
    assert {port["port"] for port in names["ports"]} == {53}


# --- storage ------------------------------------------------------------------------------------------


def test_repository_in_a_volume(render: Render) -> None:
    files = render(storage="pvc:weights/production/v1")
    volume = pod_of(files)["spec"]["volumes"][0]
    assert volume["persistentVolumeClaim"] == {"claimName": "weights", "readOnly": True}
    mount = container_of(files)["volumeMounts"][0]
    assert (mount["readOnly"], mount["subPath"]) == (True, "production/v1")
    assert "initContainers" not in pod_of(files)["spec"]
    isvc = load(files, "overlays/kserve/inferenceservice.yaml")
    assert isvc["spec"]["predictor"]["model"]["storageUri"] == "pvc://weights/production/v1"


def test_repository_in_an_object_store(render: Render) -> None:
    files = render(
        storage="s3://bucket/models",
        object_store_endpoint="http://minio.store:9000",
        object_store_secret="way",  # noqa: S106 - a name
    )
    (fetch,) = pod_of(files)["spec"]["initContainers"]
    assert fetch["args"][:3] == ["copy", "store:bucket/models", "/models"]
    variables = {one["name"]: one["value"] for one in fetch["env"]}
    assert variables["RCLONE_CONFIG_STORE_ENDPOINT"] == "http://minio.store:9000"
    volumes = {volume["name"]: volume for volume in pod_of(files)["spec"]["volumes"]}
    assert volumes["object-store"]["secret"]["secretName"] == "way"
    assert "emptyDir" in volumes["models"]
    assert container_of(files)["volumeMounts"][0]["readOnly"] is True  # the server itself never writes
    ports = [
        port["port"]
        for rule in load(files, "base/networkpolicy.yaml")["spec"]["egress"]
        for port in rule["ports"]
    ]
    assert 9000 in ports
    assert load(files, "overlays/kserve/serviceaccount.yaml")["secrets"] == [{"name": "way"}]
    assert not any(b"kind: Secret" in content for content in files.values())


def test_disk_for_a_copy_is_asked_for(render: Render) -> None:
    """Twice the three models of a MiB and their configurations."""
    files = render(storage="s3://bucket/models")
    (models,) = [one for one in pod_of(files)["spec"]["volumes"] if one["name"] == "models"]
    assert models["emptyDir"]["sizeLimit"] == "7Mi"
    assert container_of(files)["resources"]["requests"]["ephemeral-storage"] == "7Mi"
    assert "ephemeral-storage" not in container_of(render())["resources"]["requests"]


def test_an_object_store_of_a_repository_that_is_not_built_here_is_refused(tmp_path: Path) -> None:
    repository, measurements = write_measured_repository(tmp_path / "two")
    (repository / "small" / "1" / "model").unlink()
    render_kubernetes(repository, measurements, KubernetesOptions())
    with pytest.raises(DeployError, match="not built here"):
        render_kubernetes(repository, measurements, KubernetesOptions(storage="s3://bucket/models"))


def test_object_store_that_knows_the_pods(render: Render) -> None:
    files = render(storage="s3://bucket/models", object_store_secret="")
    (fetch,) = pod_of(files)["spec"]["initContainers"]
    assert "AWS_SHARED_CREDENTIALS_FILE" not in {one["name"] for one in fetch["env"]}
    assert {one["name"] for one in fetch["volumeMounts"]} == {"models", "tmp"}
    assert {one["name"] for one in pod_of(files)["spec"]["volumes"]} == {"models", "shm", "tmp"}
    assert "secrets" not in load(files, "overlays/kserve/serviceaccount.yaml")
    assert "create secret" not in files["README.md"].decode()


def test_guide_says_what_kserve_reads_of_a_store(render: Render) -> None:
    text = render(storage="s3://b/m", object_store_endpoint="http://minio.store:9000")["README.md"].decode()
    for part in (
        "AWS_SECRET_ACCESS_KEY",
        "s3-endpoint=minio.store:9000",
        "s3-usehttps=0",
        "on CPUs only",
        "helm repo add",
    ):
        assert part in text
    assert "AWS_SECRET_ACCESS_KEY" not in render()["README.md"].decode()
    assert "lost+found" in render()["README.md"].decode()


# --- overlays -----------------------------------------------------------------------------------------


def test_gpu_overlay(render: Render, tmp_path: Path) -> None:
    repository, measurements = write_measured_repository(tmp_path / "with target")
    (repository / "big" / "configs").mkdir()
    (repository / "big" / "configs" / "trt.pbtxt").write_text('name: "big"\n')
    options = KubernetesOptions(target="trt", gpu_product="NVIDIA-L4", **IMAGES)
    files = render_kubernetes(repository, measurements, options)
    patch = load(files, "overlays/gpu/gpu.yaml")
    spec = patch["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert {"name": "TRITONSMITH_TARGET", "value": "trt"} in container["env"]
    assert container["name"] == container_of(files)["name"]  # else a second container would be added
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 3600 + 80
    assert "NOT MEASURED" in patch["metadata"]["annotations"]["tritonsmith/startup-probe"]
    (terms,) = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert terms["matchExpressions"][0]["values"] == ["NVIDIA-L4"]
    with pytest.raises(DeployError, match="'trt'"):
        render(target="trt")


def test_the_only_target_with_plans_is_served_on_gpus(tmp_path: Path) -> None:
    repository, measurements = write_measured_repository(tmp_path / "two")
    for model, target, backend in (
        ("big", "trt", "tensorrt"),
        ("small", "trt", "tensorrt"),
        ("big", "quick", "openvino"),
    ):
        (repository / model / "configs").mkdir(exist_ok=True)
        (repository / model / "configs" / f"{target}.pbtxt").write_text(f'backend: "{backend}"')

    def target_of(options: KubernetesOptions) -> list[str]:
        patch = load(render_kubernetes(repository, measurements, options), "overlays/gpu/gpu.yaml")
        (container,) = patch["spec"]["template"]["spec"]["containers"]
        return [one["value"] for one in container["env"] if one["name"] == "TRITONSMITH_TARGET"]

    assert target_of(KubernetesOptions()) == ["trt"]
    assert target_of(KubernetesOptions(target="quick")) == ["quick"]
    (repository / "big" / "configs" / "more.pbtxt").write_text('backend: "tensorrt"')
    with pytest.raises(DeployError, match="plans for several targets"):
        target_of(KubernetesOptions())
    assert target_of(KubernetesOptions(target="more")) == ["more"]


def test_cpu_pods_serve_the_target_that_was_measured(tmp_path: Path, render: Render) -> None:
    repository, measurements = write_measured_repository(tmp_path / "measured target")
    (repository / "big" / "configs").mkdir()
    (repository / "big" / "configs" / "quick.pbtxt").write_text('backend: "openvino"')
    own = replace(measurements, target="quick", fingerprint=fingerprint_of_repository(repository, "quick"))
    files = render_kubernetes(repository, own, KubernetesOptions())
    (kserve,) = load(files, "overlays/kserve/runtime.yaml")["spec"]["containers"]
    for container in (container_of(files), kserve):
        assert {"name": "TRITONSMITH_TARGET", "value": "quick"} in container["env"]
    assert "TRITONSMITH_TARGET" not in {one["name"] for one in container_of(render())["env"]}


def test_plans_are_kept_by_each_pod_or_in_a_claim(render: Render) -> None:
    def volume_of(files: Mapping[str, bytes]) -> Any:
        return load(files, "overlays/gpu/gpu.yaml")["spec"]["template"]["spec"]["volumes"][0]

    own = render(plan_cache_size="3Gi")
    assert volume_of(own) == {"name": "cache", "emptyDir": {"sizeLimit": "3Gi"}}
    assert not any(b"PersistentVolumeClaim" in own[path] for path in own if path != "README.md")
    shared = render(plan_cache="claim", storage_class="fast")
    claim = load(shared, "overlays/gpu/plan-cache.yaml")
    assert volume_of(shared)["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert (claim["spec"]["storageClassName"], claim["spec"]["accessModes"]) == ("fast", ["ReadWriteMany"])
    guide = " ".join(shared["README.md"].decode().split())
    assert "`fast`, must give ReadWriteMany" in guide
    assert "ignore fsGroup" in guide


def test_gpus_scale_up_no_faster_than_plans_are_built(render: Render) -> None:
    """At most half an hour: autoscaling/v2 takes no longer period."""
    files = render()
    (policy,) = load(files, "base/autoscaler.yaml")["spec"]["behavior"]["scaleUp"]["policies"]
    assert policy["periodSeconds"] == 80
    patches = load(files, "overlays/gpu/kustomization.yaml")["patches"]
    assert {patch["target"]["kind"] for patch in patches if "target" in patch} == {
        *("HorizontalPodAutoscaler", "ScaledObject")
    }
    hpa = load(files, "overlays/gpu/autoscaler.yaml")["spec"]["behavior"]
    keda = load(files, "overlays/gpu/scaledobject.yaml")["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
    for behavior in (hpa, keda["behavior"]):
        assert [one["periodSeconds"] for one in behavior["scaleUp"]["policies"]] == [1800]


def test_requests_above_the_images_bound_raise_it_on_gpus(tmp_path: Path) -> None:
    repository, measurements = write_measured_repository(tmp_path / "two")
    big = replace(measurements.models[0], request_bytes=100 << 20)
    files = render_kubernetes(repository, replace(measurements, models=(big,)), KubernetesOptions())
    (container,) = load(files, "overlays/gpu/gpu.yaml")["spec"]["template"]["spec"]["containers"]
    assert container["args"] == [*container_of(files)["args"], f"--http-max-input-size={125 << 20}"]


def test_waiting_for_batches_raises_the_threshold(tmp_path: Path) -> None:
    """small waits 0.25 s for what takes 0.1 s, big 0.5 s for what takes 2.5 s."""
    repository, _ = write_measured_repository(tmp_path / "two")
    for model, delay_us in (("small", 250_000), ("big", 500_000)):
        text = f'backend: "python" dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}'
        (repository / model / "config.pbtxt").write_text(text)
    own = replace(MEASURED, fingerprint=fingerprint_of_repository(repository, None))
    files = render_kubernetes(repository, own, KubernetesOptions())
    autoscaler = load(files, "base/autoscaler.yaml")
    (metric,) = autoscaler["spec"]["metrics"]
    assert metric["pods"]["target"]["averageValue"] == "3.5"  # 1 + 0.25 / 0.1
    assert "small waits 0.25 s" in autoscaler["metadata"]["annotations"]["tritonsmith/queue-over-compute"]
    (trigger,) = load(files, "components/keda/scaledobject.yaml")["spec"]["triggers"]
    assert trigger["metadata"]["threshold"] == "3.5"


def test_names_of_ensembles_survive_promql_and_its_regular_expressions(tmp_path: Path) -> None:
    repository, measurements = write_measured_repository(tmp_path / "two")
    both = replace(measurements.models[1], name='a-b.c"d')
    files = render_kubernetes(repository, replace(measurements, models=(both,)), KubernetesOptions())
    (rule,) = load(files, "prometheus-adapter.yaml")["rules"]["custom"]
    assert r'''model!~"a\\-b\\.c\"d"''' in rule["metricsQuery"]
    (text,) = set(re.findall(r'model!~("(?:[^"\\]|\\.)*")', rule["metricsQuery"]))
    pattern = json.loads(text)  # Go and JSON escape quotes and backslashes alike
    assert re.fullmatch(pattern, both.name)
    assert not re.fullmatch(pattern, both.name.replace(".", "x"))


def test_a_rate_needs_two_scrapes_of_the_default_interval(render: Render) -> None:
    (rule,) = load(render(), "prometheus-adapter.yaml")["rules"]["custom"]
    assert rule["metricsQuery"].count("[5m]") == 2  # a minute apart by default


def test_prometheus_below_a_path(render: Render) -> None:
    files = render(prometheus_url="https://prometheus.example/select/0/")
    assert load(files, "prometheus-adapter.yaml")["prometheus"] == {
        "url": "https://prometheus.example",
        "port": 443,
        "path": "/select/0",
    }


def test_images_of_overlays(render: Render) -> None:
    (image,) = load(render(**IMAGES), "overlays/gpu/kustomization.yaml")["images"]
    base = container_of(render())["image"]
    assert image == {
        "name": base,
        "newName": "registry.example:5000/team/tritonsmith-gpu",
        "digest": DIGEST.removeprefix("@"),
    }
    (image,) = load(render(), "overlays/cpu/kustomization.yaml")["images"]
    assert image == {"name": base, "newName": "tritonsmith-cpu", "newTag": __version__}


def test_a_registry_port_is_no_tag() -> None:
    assert split_image("host:5000/a/b") == ("host:5000/a/b", None, None)
    assert split_image("host:5000/a/b:1.0") == ("host:5000/a/b", "1.0", None)
    assert split_image(f"a:1{DIGEST}") == ("a", "1", DIGEST[1:])


def test_kserve_overlay(render: Render) -> None:
    files = render(name="mine", **IMAGES)
    runtime = load(files, "overlays/kserve/runtime.yaml")
    service = load(files, "overlays/kserve/inferenceservice.yaml")
    predictor = service["spec"]["predictor"]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
    assert predictor["model"]["modelFormat"]["name"] == runtime["spec"]["supportedModelFormats"][0]["name"]
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"
    assert container["image"] == IMAGES["cpu_image"]
    assert {"name": "TRITONSMITH_MODELS", "value": "/mnt/models"} in container["env"]
    assert container["startupProbe"] == container_of(files)["startupProbe"]
    assert predictor["terminationGracePeriodSeconds"] == SIZES.grace_s
    assert (
        predictor["serviceAccountName"]
        == load(files, "overlays/kserve/serviceaccount.yaml")["metadata"]["name"]
    )
    annotations = service["metadata"]["annotations"]
    assert annotations["serving.kserve.io/autoscalerClass"] == "keda"
    selected = {"serving.kserve.io/inferenceservice": "mine"}
    assert load(files, "overlays/kserve/networkpolicy.yaml")["spec"]["podSelector"]["matchLabels"] == selected
    assert load(files, "overlays/kserve/disruptionbudget.yaml")["spec"]["selector"]["matchLabels"] == selected
    (metric,) = predictor["autoScaling"]["metrics"]
    assert 'pod=~"mine-predictor-.*"' in metric["external"]["metric"]["query"]
