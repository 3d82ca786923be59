"""What the public tools say of rendered manifests and of the Dockerfiles: make test-manifests.

Each tool is also shown something wrong, which it must refuse.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rendered import DIGEST, IMAGES, Render, load, rendering

pytestmark = pytest.mark.manifests
OVERLAYS = ("cpu", "gpu", "kserve")
ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
KSERVE_KINDS = {"ServingRuntime", "InferenceService"}
KUBERNETES = "1.32"
# Where an image has no digest, as one that was built on this machine; shown below to be all that is left.
WITHOUT_DIGEST = {"CKV_K8S_15", "CKV_K8S_43"}
# Of Dockerfiles: `FROM ${BASE}` has its tag in the ARG above it, and ADD unpacks the archive of this package.
DOCKERFILE_SKIPS = "CKV_DOCKER_4,CKV_DOCKER_7"


@pytest.fixture
def render(tmp_path: Path) -> Render:
    return rendering(tmp_path / "two")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """Runs a tool; its exit code and all that it printed."""

    folder: Path

    def __call__(self, name: str, *arguments: str | Path) -> tuple[int, str]:
        done = subprocess.run(
            [self.folder / name, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def tools() -> Tools:
    folder = os.environ.get("TRITONSMITH_MANIFEST_TOOLS")
    if not folder:
        pytest.skip("the tools are not here: make test-manifests")
    return Tools(folder=Path(folder))


def kustomize(folder: Path) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine, whose kustomize merges an overlay with its base")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def validate_strictly(tools: Tools, file: Path) -> tuple[int, str]:
    """As kubernetes-validate, and a warning fails too."""
    code, text = tools("kubernetes-validate", "--strict", "-k", KUBERNETES, file)
    return code or int("WARN" in text), text


def failed_checks(tools: Tools, *files: Path, framework: str = "kubernetes", skip: str = "") -> set[str]:
    listed = [argument for file in files for argument in ("-f", str(file))]
    skipped = ["--skip-check", skip] if skip else []
    _, text = tools(
        "checkov", "--skip-download", "--quiet", "-o", "json", "--framework", framework, *listed, *skipped
    )
    report = json.loads(text[text.index("{") :])
    assert report["summary"]["passed"] > 0, text
    return {check["check_id"] for check in report["results"]["failed_checks"]}


STORAGES = (
    {},
    {
        "storage": "s3://bucket/models",
        "gpu_product": "NVIDIA-L4",
        "plan_cache": "claim",
        "storage_class": "fast",
    },
)


def test_overlays_pass_the_tools(tools: Tools, render: Render, tmp_path: Path) -> None:
    rendered = []
    for index, options in enumerate(STORAGES):
        folder = write_files(tmp_path / str(index), render(**IMAGES, **options))
        keda = folder / "overlays" / "cpu-keda" / "kustomization.yaml"
        keda.parent.mkdir()
        keda.write_text("resources: [../cpu]\ncomponents: [../../components/keda]\n")
        for overlay in (*OVERLAYS, "cpu-keda"):
            merged = list(yaml.safe_load_all(kustomize(folder / "overlays" / overlay)))
            known = [one for one in merged if one["kind"] not in KSERVE_KINDS | {"ScaledObject"}]
            assert ("HorizontalPodAutoscaler" in {one["kind"] for one in known}) == (
                overlay in ("cpu", "gpu")
            )
            file = tmp_path / f"{index}-{overlay}.yaml"
            file.write_text(yaml.safe_dump_all(known))
            code, text = validate_strictly(tools, file)
            assert code == 0, text
            rendered.append(file)
    assert failed_checks(tools, *rendered) == set()


def test_merged_gpu_overlay(tools: Tools, render: Render, tmp_path: Path) -> None:
    folder = write_files(tmp_path, render(**IMAGES))
    merged = list(yaml.safe_load_all(kustomize(folder / "overlays" / "gpu")))
    (deployment,) = [one for one in merged if one["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"registry.example:5000/team/tritonsmith-gpu{DIGEST}"
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {
        *("/models", "/dev/shm", "/tmp", "/var/cache/tritonsmith"),  # noqa: S108
    }
    assert {one["name"] for one in container["env"]} == {"TRITONSMITH_SHM_MIB", "TRITONSMITH_TARGET"}
    assert all(one["metadata"]["namespace"] == "triton" for one in merged)
    (scaler,) = [one for one in merged if one["kind"] == "HorizontalPodAutoscaler"]
    (policy,) = scaler["spec"]["behavior"]["scaleUp"]["policies"]
    assert policy["periodSeconds"] == 1800
    assert scaler["spec"]["behavior"]["scaleDown"]["policies"]
    kustomization = folder / "overlays" / "gpu" / "kustomization.yaml"
    kustomization.write_text(kustomization.read_text() + "components: [../../components/keda]\n")
    kinds = {one["kind"]: one for one in yaml.safe_load_all(kustomize(folder / "overlays" / "gpu"))}
    assert "HorizontalPodAutoscaler" not in kinds
    behavior = kinds["ScaledObject"]["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert [one["periodSeconds"] for one in behavior["scaleUp"]["policies"]] == [1800]


def test_images_without_digest_fail_for_that_alone(tools: Tools, render: Render, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "plain", render())
    file = tmp_path / "cpu.yaml"
    file.write_text(kustomize(folder / "overlays" / "cpu"))
    assert failed_checks(tools, file) == WITHOUT_DIGEST


def change_field(deployment: dict[str, Any]) -> None:
    deployment["spec"]["replica"] = 2


def change_version(deployment: dict[str, Any]) -> None:
    deployment["apiVersion"] = "apps/v9"


def change_probe(deployment: dict[str, Any]) -> None:
    deployment["spec"]["template"]["spec"]["containers"][0]["startupProbe"]["periodSeconds"] = "often"


@pytest.mark.parametrize("change", [change_field, change_version, change_probe])
def test_a_wrong_field_fails(
    tools: Tools, render: Render, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    deployment = load(render(), "base/deployment.yaml")
    file = tmp_path / "deployment.yaml"
    file.write_text(yaml.safe_dump(deployment))
    assert validate_strictly(tools, file)[0] == 0
    change(deployment)
    file.write_text(yaml.safe_dump(deployment))
    assert validate_strictly(tools, file)[0] != 0


def test_insecure_manifests_fail(tools: Tools, render: Render, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "good", render(**IMAGES))
    merged = list(yaml.safe_load_all(kustomize(folder / "overlays" / "cpu")))
    kinds = {one["kind"]: one for one in merged}
    file = tmp_path / "bad.yaml"
    security = kinds["Deployment"]["spec"]["template"]["spec"]["containers"][0]["securityContext"]
    security["privileged"] = True
    file.write_text(yaml.safe_dump_all(merged))
    assert failed_checks(tools, file) == {"CKV_K8S_16"}
    del security["privileged"]
    kinds["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] = {"app": "misses"}
    file.write_text(yaml.safe_dump_all(merged))
    assert failed_checks(tools, file) == {"CKV2_K8S_6"}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_pass(tools: Tools, dockerfile: Path) -> None:
    assert tools("hadolint", dockerfile) == (0, "")
    assert failed_checks(tools, dockerfile, framework="dockerfile", skip=DOCKERFILE_SKIPS) == set()


def test_a_wrong_dockerfile_fails(tools: Tools, tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM debian:latest\nRUN cd /tmp && apt-get install curl\n")
    code, text = tools("hadolint", file)
    assert code == 1
    assert "DL3007" in text  # the tag
    assert "CKV_DOCKER_3" in failed_checks(tools, file, framework="dockerfile")  # no user


def test_custom_resources_fit_their_definitions(tools: Tools, render: Render, tmp_path: Path) -> None:
    """Against CRDs of KServe and KEDA in a folder of one's own: no package holds them."""
    if not (crds := os.environ.get("TRITONSMITH_CRDS")):
        pytest.skip("TRITONSMITH_CRDS names no folder with the CRDs of KServe and KEDA")
    files = render(**IMAGES)
    schemas = {}
    for path in Path(crds).glob("*.yaml"):
        for crd in yaml.safe_load_all(path.read_text()):
            for version in crd["spec"]["versions"]:
                key = (f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"])
                schemas[key] = version["schema"]["openAPIV3Schema"]
    for path in (
        "overlays/kserve/runtime.yaml",
        "overlays/kserve/inferenceservice.yaml",
        "components/keda/scaledobject.yaml",
    ):
        manifest = load(files, path)
        schema = close_objects(schemas[manifest["apiVersion"], manifest["kind"]])
        (tmp_path / "schema.json").write_text(json.dumps(schema))
        (tmp_path / "instance.json").write_text(json.dumps(manifest))
        code, text = tools("jsonschema", "-i", tmp_path / "instance.json", tmp_path / "schema.json")
        assert code == 0, f"{path}: {text}"


def close_objects(schema: Any) -> Any:
    """The schema with unknown fields refused, which an API server would drop in silence."""
    if isinstance(schema, list):
        return [close_objects(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: close_objects(one) for name, one in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed
