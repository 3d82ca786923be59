"""Files for Compose: equal to what is committed, derived from measurements, hardened, read by Compose."""

from __future__ import annotations

import ctypes.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tritonsmith.deploy.balancer import buffer_bytes_for
from tritonsmith.deploy.compose import ComposeOptions, render_compose, render_settings
from tritonsmith.deploy.context import context_files
from tritonsmith.deploy.folder import MARK, write_folder
from tritonsmith.deploy.measurements import Measurements
from tritonsmith.deploy.measurements_file import fingerprint_of_repository, read_measurements
from tritonsmith.deploy.tensorrt_library import find_library, version_of_library
from tritonsmith.errors import DeployError, PlanError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
REPOSITORY = ROOT / "model_repository"
OPTIONS = ComposeOptions(repository="../model_repository")
FILES = ("compose.yaml", "compose.cpu.yaml")


@pytest.fixture(scope="module")
def measured() -> Measurements:
    return read_measurements(DOCKER / "measurements.json")


@pytest.fixture(scope="module")
def rendered(measured: Measurements) -> dict[str, str]:
    return render_settings(REPOSITORY, measured, OPTIONS)


def services(texts: dict[str, str], name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(texts[name])["services"]
    return found


def test_committed_files_are_what_is_rendered(rendered: dict[str, str]) -> None:
    for name, text in rendered.items():
        assert (DOCKER / name).read_text() == text, f"docker/{name}: render it again"
    stages = context_files(REPOSITORY)["stages.txt"].decode()
    assert (DOCKER / "stages.txt").read_text() == stages, "docker/stages.txt: make measure renders it"


def test_folder_is_whole(measured: Measurements) -> None:
    """Every file that a Dockerfile copies and that a service mounts is there."""
    own = replace(measured, fingerprint=fingerprint_of_repository(REPOSITORY, None))
    files = render_compose(REPOSITORY, own, ComposeOptions())
    copied = set()
    for name in ("Dockerfile.cpu", "Dockerfile.gpu"):
        for line in re.findall(r"^(?:COPY|ADD) (?!--from)(.*) \S+$", files[name].decode(), re.MULTILINE):
            copied |= {word for word in line.split() if not word.startswith("--")}
    assert "tritonsmith.tar.gz" in copied
    assert copied <= set(files)
    ignored = files[".dockerignore"].decode().splitlines()
    assert {f"!{name}" for name in copied} <= set(ignored)
    for name in FILES:
        for service in yaml.safe_load(files[name])["services"].values():
            for volume in service.get("volumes", ()):
                source = volume["source"].removeprefix("./")
                if volume["type"] == "bind" and not source.startswith("$"):
                    assert any(path == source or path.startswith(f"{source}/") for path in files), source
    assert f"${{MODEL_REPOSITORY:-{REPOSITORY}}}" in files["compose.yaml"].decode()
    assert "pillow>=11" in files["stages.txt"].decode()


@pytest.mark.parametrize("name", FILES)
def test_every_service_is_hardened(rendered: dict[str, str], name: str) -> None:
    for service, content in services(rendered, name).items():
        assert content["read_only"] is True, service
        assert content["cap_drop"] == ["ALL"], service
        assert content["security_opt"] == ["no-new-privileges:true"], service
        assert re.fullmatch(r"(\$\{TRITON_USER:-)?[1-9]\d*:\d+\}?", content["user"]), service
        assert {"mem_limit", "cpus", "pids_limit", "tmpfs"} <= content.keys(), service
        assert not {"privileged", "network_mode", "pid", "cap_add"} & content.keys(), service
        assert all(port.startswith("127.0.0.1:") for port in content.get("ports", ())), service
        binds = [volume for volume in content.get("volumes", ()) if volume["type"] == "bind"]
        assert all(volume["read_only"] for volume in binds), service


@pytest.mark.parametrize("name", FILES)
def test_settings_follow_the_measurements(measured: Measurements, name: str) -> None:
    """Each measured value moves its setting; by hand: 8 instances, 57 MiB of /dev/shm, stop in 5.163 s."""
    mib = 1 << 20
    more = replace(
        measured,
        shm_bytes=400 * mib,
        peak_bytes=4000 * mib,
        stop_s=40.0,
        ready_s=100.0,
        machine={**measured.machine, "cpu_count": 12},
    )
    triton = services(render_settings(REPOSITORY, more, OPTIONS), name)["triton"]
    assert triton["shm_size"] == "512m"  # 400 MiB and a quarter, in steps of 16
    assert triton["environment"]["TRITONSMITH_SHM_MIB"] == "512"
    # 5000, 112 of /dev/shm not in use, 16 of /tmp; in steps of 64. Beside a GPU 4096 more, as on Kubernetes.
    assert triton["mem_limit"] == {"compose.yaml": "9280m", "compose.cpu.yaml": "5184m"}[name]
    assert triton["cpus"] == "${TRITON_CPUS:-12.0}"
    longest = max(model.compute_s or 0 for model in measured.models)
    patience_s = int(triton["command"][0].removeprefix("--exit-timeout-secs="))
    assert patience_s == -int(-(4 * longest + 60.0) // 1)
    assert triton["stop_grace_period"] == f"{patience_s + 5}s"
    start = int(triton["healthcheck"]["start_period"].removesuffix("s"))
    assert start == 3600 if name == "compose.yaml" else start >= 400


def test_head_names_every_derived_setting(rendered: dict[str, str]) -> None:
    for name in FILES:
        head = rendered[name].split("\nservices:")[0]
        assert all(line.startswith("#") for line in head.splitlines())
        for setting in ("shm_size", "mem_limit", "cpus", "stop_grace_period", "start_period"):
            assert f"#   {setting}: " in head
        assert ("4096Mi beside what CPUs need" in " ".join(head.replace("#", "").split())) == (
            name == "compose.yaml"
        )


def test_balancers_buffer_holds_a_largest_request_up_to_a_bound(measured: Measurements) -> None:
    small = tuple(replace(model, request_bytes=20_000) for model in measured.models)
    assert buffer_bytes_for(replace(measured, models=small)) == 32768  # with 4 KiB of headers, in 16 KiB
    assert buffer_bytes_for(measured) == 256 << 10  # images of 4 MB are not sent again
    text = render_settings(REPOSITORY, replace(measured, models=small), OPTIONS)["haproxy.cfg"]
    assert "tune.bufsize 32768" in text


def test_more_replicas_are_balanced_and_scraped(measured: Measurements) -> None:
    texts = render_settings(REPOSITORY, measured, replace(OPTIONS, replicas=3))
    content = services(texts, "compose.cpu.yaml")
    assert content["triton-3"] == content["triton-2"]
    assert "ports" not in content["triton-3"]
    assert content["triton-3"]["profiles"] == ["balanced"]
    assert re.findall(r"server +(\S+) +(\S+) port 8000", texts["haproxy.cfg"]) == [
        (name, f"{name}:{port}") for port in (8001, 8000) for name in ("triton", "triton-2", "triton-3")
    ]
    jobs = yaml.safe_load(texts["prometheus.yml"])["scrape_configs"]
    assert jobs[0]["dns_sd_configs"][0]["names"] == ["triton", "triton-2", "triton-3"]


def test_only_the_gpu_file_reserves_devices(rendered: dict[str, str]) -> None:
    gpu, cpu = (services(rendered, name)["triton"] for name in FILES)
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in cpu
    assert gpu["environment"]["TRITONSMITH_TARGET"] == "${TRITONSMITH_TARGET-gpu}"
    assert cpu["environment"]["TRITONSMITH_TARGET"] == "${TRITONSMITH_TARGET-}"


def test_passwords_come_from_files_and_have_no_default(rendered: dict[str, str]) -> None:
    for name in FILES:
        content = yaml.safe_load(rendered[name])
        assert content["secrets"].keys() == {"triton_admin_key", "grafana_admin_password"}
        grafana = content["services"]["grafana"]
        password = grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD"]
        assert password == "$$__file{/run/secrets/grafana_admin_password}"  # noqa: S105 - a place, no password
        assert grafana["secrets"] == ["grafana_admin_password"]


def test_paths_that_compose_would_change_are_kept_or_refused(measured: Measurements) -> None:
    text = render_settings(REPOSITORY, measured, ComposeOptions(repository="/a $x/m"))["compose.yaml"]
    source = yaml.safe_load(text)["services"]["triton"]["volumes"][0]["source"]
    assert source == "${MODEL_REPOSITORY:-/a $$x/m}"
    with pytest.raises(DeployError, match="cannot name this path"):
        render_settings(REPOSITORY, measured, ComposeOptions(repository="/a}/m"))


def test_keys_survive_a_second_rendering(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_folder(out, {"drain.sh": "#!/bin/sh\n", "old": ""}, force=False)
    (out / "secrets").mkdir(mode=0o700)
    (out / "secrets" / "triton_admin_key").write_text("key")
    (out / ".env").write_text("TRITON_CPUS=3\n")
    write_folder(out, {"new": ""}, force=True)
    assert (out / "secrets" / "triton_admin_key").read_text() == "key"
    assert (out / "secrets").stat().st_mode & 0o777 == 0o700
    assert (out / ".env").read_text() == "TRITON_CPUS=3\n"
    assert sorted(path.name for path in out.iterdir()) == [".env", MARK, "new", "secrets"]


def test_measurements_of_another_repository_are_refused(measured: Measurements) -> None:
    with pytest.raises(DeployError, match="other configurations"):
        render_compose(REPOSITORY, replace(measured, fingerprint="0/0"), OPTIONS)


def test_unknown_target_and_one_replica_are_refused(measured: Measurements) -> None:
    with pytest.raises(DeployError, match="jetson"):
        render_settings(REPOSITORY, measured, replace(OPTIONS, gpu_target="jetson"))
    with pytest.raises(UsageError, match="replicas"):
        ComposeOptions(replicas=1)


@pytest.mark.parametrize(("release", "said"), [("26.99", "no Triton container"), ("25.03", "security")])
def test_releases_that_are_unknown_or_unsafe_are_refused(release: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ComposeOptions(release=release)


def test_requests_above_the_images_bound_raise_it_on_gpus(measured: Measurements) -> None:
    large = tuple(replace(model, request_bytes=100 << 20) for model in measured.models)
    texts = render_settings(REPOSITORY, replace(measured, models=large), OPTIONS)
    flag = f"--http-max-input-size={125 << 20}"
    assert flag in services(texts, "compose.yaml")["triton"]["command"]
    assert "#   --http-max-input-size: " in texts["compose.yaml"]
    assert "--http-max-input-size" not in texts["compose.cpu.yaml"]  # Triton 2.51 exits at it


def test_example_of_settings_changes_no_target(rendered: dict[str, str]) -> None:
    """The two files have different targets, so that no one line could be the default of both."""
    assert "TRITONSMITH_TARGET=" not in rendered[".env.example"]
    assert "compose.yaml serves the target gpu" in rendered[".env.example"]


@pytest.mark.parametrize("name", FILES)
def test_compose_reads_it(name: str) -> None:
    if not shutil.which("docker-compose"):
        pytest.skip("docker-compose is not installed")
    command = [
        "docker-compose",
        "-f",
        name,
        "--profile",
        "balanced",
        "--profile",
        "bench",
        "config",
        "--quiet",
    ]
    done = subprocess.run(command, cwd=DOCKER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_haproxy_reads_it() -> None:
    program = shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")
    if program is None:
        pytest.skip("haproxy is not installed")
    done = subprocess.run([program, "-c", "-f", DOCKER / "haproxy.cfg"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_dashboard_is_well_formed() -> None:
    board = json.loads((DOCKER / "grafana" / "dashboards" / "triton.json").read_text())
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())
    uid = source["datasources"][0]["uid"]
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == uid
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)  # no panel over another
    assert max(x for x, _ in cells) < 24  # Grafana's columns


def test_tools_of_the_image_are_the_packages_own_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "tools/tritonsmith/deploy/tools.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        dependency.replace('"', "'") for dependency in project["dependencies"]
    ]


def test_version_of_tensorrt_is_the_librarys_own(tmp_path: Path) -> None:
    """With a library of a few lines that has the four functions; and one that has none of them."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is here")
    source = tmp_path / "nvinfer.c"
    numbers = {"Major": 11, "Minor": 4, "Patch": 0, "Build": 106}
    source.write_text("".join(f"int getInferLib{k}Version(void){{return {v};}}" for k, v in numbers.items()))
    library = tmp_path / "libnvinfer.so.11"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    (tmp_path / "libnvinfer.so.11.4.0").symlink_to(library)
    assert find_library((str(tmp_path / "none"), str(tmp_path))) == library
    assert version_of_library(library) == "11.4.0.106"
    older = ctypes.util.find_library("c")
    assert older is not None
    with pytest.raises(PlanError, match="does not say its version"):
        version_of_library(Path(older))
    with pytest.raises(PlanError, match="holds no TensorRT"):
        find_library((str(tmp_path / "none"),))
