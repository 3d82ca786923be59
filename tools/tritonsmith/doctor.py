"""What works on this machine, what does not, and what to install. Loads no framework."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from tritonsmith.errors import ProvisionError, ServerError
from tritonsmith.server.environment import find_environment
from tritonsmith.server.interpreter import survey, what_lacks
from tritonsmith.server.options import ServerOptions
from tritonsmith.server.ports import refuse_used_port
from tritonsmith.server.proof import prove_inference
from tritonsmith.server.provision import CACHE_VARIABLE, cache_folder, run_pip

if TYPE_CHECKING:
    from tritonsmith.engines.tensorrt.facts import Device

Status = Literal["ok", "info", "warn", "fail"]

GLIBC = (2, 35)  # of the wheel that holds tritonserver: manylinux_2_35
_SHM_BYTES = 128 << 20
_DISK_BYTES = 2 << 30
_SHM = Path("/dev/shm")  # noqa: S108 - where Triton's stub keeps its segments

# Extra -> what a reader or engine imports.
_EXTRAS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "keras": ("tensorflow-cpu|tensorflow", "keras", "tf-keras", "tf2onnx"),
        "torch": ("torch", "onnxscript"),
        "train": ("torch", "torch-pruning", "onnxscript"),
        "huggingface": ("transformers", "tokenizers", "safetensors", "torch"),
        "openvino": ("openvino",),
        "report": ("matplotlib",),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at. `info` is an absence that nothing here needs; `fix` says what to do."""

    name: str
    status: Status
    detail: str
    fix: str | None = None


def diagnose(*, index: bool = False) -> tuple[Finding, ...]:
    """Look at this machine. An installed server proves an inference; only `index` asks the network."""
    return (
        _look_at_system(),
        _look_at_cpu(),
        _look_at_python(),
        _look_at_server_python(),
        _look_at_pip(),
        _look_at_cache(),
        _look_at_shared_memory(),
        *_look_at_ports(),
        _look_at_server(),
        _look_at_perf_analyzer(),
        *(_look_at_extra(extra, packages) for extra, packages in _EXTRAS.items()),
        *_look_at_tensorrt(),
        _look_at_containers(),
        *((_look_at_index(),) if index else ()),
    )


def _look_at_system() -> Finding:
    library, version = platform.libc_ver()
    system = f"{platform.system()} {platform.machine()}, {library or 'no glibc'} {version}"
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64") or library != "glibc":
        fix = "use Linux with glibc on x86-64, for example Debian 12 or Ubuntu 22.04"
        return Finding(name="system", status="fail", detail=system, fix=fix)
    if tuple(map(int, version.split(".")[:2])) < GLIBC:
        fix = "use glibc 2.35 or newer: Debian 12, Ubuntu 22.04 or later"
        return Finding(name="system", status="fail", detail=system, fix=fix)
    if platform.machine() != "x86_64":
        fix = "the server was tried on x86-64 only; the wheel may lack this machine"
        return Finding(name="system", status="warn", detail=system, fix=fix)
    return Finding(name="system", status="ok", detail=system)


def _look_at_cpu() -> Finding:
    if platform.system() != "Linux":  # said above; what follows is Linux's own
        return Finding(name="cpu", status="info", detail=f"{os.cpu_count()} cores")
    flags = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            flags = set(line.split(":", 1)[1].split())
            break
    known = [
        flag
        for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp")
        if flag in flags
    ]
    detail = f"{len(os.sched_getaffinity(0))} cores, {' '.join(known) or 'no vector extensions'}"
    if not {"avx512_vnni", "avx_vnni", "asimddp"} & flags:
        fix = "measure on the target: INT8 is slower and a little less accurate without VNNI"
        return Finding(name="cpu", status="warn", detail=detail, fix=fix)
    return Finding(name="cpu", status="ok", detail=detail)


def _look_at_python() -> Finding:
    detail = f"{platform.python_version()} at {sys.executable}"
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Finding(name="python", status="fail", detail=detail, fix="use Python 3.10 to 3.13")
    return Finding(name="python", status="ok", detail=detail)


def _look_at_server_python() -> Finding:
    """The Python that the server's environment is made from, with its libpython."""
    name = "server python"
    probes = survey()
    for probe in probes:
        if what_lacks(probe) is None:
            return Finding(
                name=name, status="ok", detail=f"{probe.version} at {probe.python}, with {probe.library}"
            )
    reasons = "; ".join(f"{probe.python}: {what_lacks(probe)}" for probe in probes)
    fix = "apt-get install python3-venv libpython3.X (X as in python3 --version), or: uv python install 3.12"
    return Finding(name=name, status="warn", detail=reasons or "none", fix=fix)


def _look_at_pip() -> Finding:
    modules = [name for name in ("pip", "ensurepip", "venv") if importlib.util.find_spec(name) is not None]
    detail = f"{', '.join(modules) or 'none'} of pip, ensurepip, venv"
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    if "venv" not in modules or not {"pip", "ensurepip"} & set(modules):
        fix = f"apt-get install python3-pip python{minor}-venv"
        return Finding(name="pip and venv", status="fail", detail=detail, fix=fix)
    return Finding(name="pip and venv", status="ok", detail=detail)


def _look_at_cache() -> Finding:
    try:
        folder = cache_folder()
    except ProvisionError as error:
        return Finding(name="cache", status="fail", detail=error.what, fix=error.fix)
    free = shutil.disk_usage(folder).free
    detail = f"{folder}, {free / 2**30:.1f} GiB free"
    if free < _DISK_BYTES and find_environment() is None:
        fix = f"free 2 GiB, or set {CACHE_VARIABLE} to a folder with more room"
        return Finding(name="cache", status="warn", detail=detail, fix=fix)
    return Finding(name="cache", status="ok", detail=detail)


def _look_at_shared_memory() -> Finding:
    name = "shared memory"
    if not os.access(_SHM, os.W_OK):
        return Finding(
            name=name, status="fail", detail=f"{_SHM} cannot be written", fix="mount a tmpfs there"
        )
    free = shutil.disk_usage(_SHM).free
    detail = f"{_SHM}, {free / 2**20:.0f} MiB free"
    if free < _SHM_BYTES:
        fix = "give the container more, for example --shm-size=1g: Triton passes tensors through it"
        return Finding(name=name, status="warn", detail=detail, fix=fix)
    return Finding(name=name, status="ok", detail=detail)


def _look_at_ports() -> tuple[Finding, ...]:
    defaults = ServerOptions()
    findings = []
    ports = {"http": defaults.http_port, "grpc": defaults.grpc_port, "metrics": defaults.metrics_port}
    for name, port in ports.items():
        try:
            refuse_used_port(port, name)
        except ServerError as error:
            findings.append(
                Finding(name=f"port {port}", status="warn", detail=str(error.found), fix=error.fix)
            )
        else:
            findings.append(Finding(name=f"port {port}", status="ok", detail=f"free for {name}"))
    return tuple(findings)


def _look_at_server() -> Finding:
    try:
        environment = find_environment()
    except ProvisionError as error:
        return Finding(name="server", status="fail", detail=error.what, fix=error.fix)
    if environment is None:
        detail = "not set up yet: the first `tritonsmith serve` downloads and installs it"
        return Finding(name="server", status="info", detail=detail)
    try:
        prove_inference(environment)
    except (ProvisionError, ServerError) as error:
        return Finding(name="server", status="fail", detail=str(error), fix=error.fix)
    detail = f"Triton 2.51 on Python {environment.python_version} answers rightly, in {environment.folder}"
    return Finding(name="server", status="ok", detail=detail)


def _look_at_perf_analyzer() -> Finding:
    from tritonsmith.bench.perf_analyzer import find_perf_analyzer

    try:
        found = find_perf_analyzer()
    except ProvisionError as error:
        return Finding(name="perf_analyzer", status="fail", detail=error.what, fix=error.fix)
    if found is None:
        detail = "not installed yet: the first `tritonsmith bench` downloads it"
        return Finding(name="perf_analyzer", status="info", detail=detail)
    return Finding(name="perf_analyzer", status="ok", detail=str(found.path))


def _look_at_extra(extra: str, packages: tuple[str, ...]) -> Finding:
    versions = {names: _find_version(names) for names in packages}
    missing = [names.split("|")[0] for names, version in versions.items() if version is None]
    if missing:
        detail = f"not installed: {', '.join(missing)}"
        return Finding(name=extra, status="info", detail=detail, fix=f"pip install 'tritonsmith[{extra}]'")
    return Finding(name=extra, status="ok", detail=", ".join(v for v in versions.values() if v is not None))


def _find_version(names: str) -> str | None:
    for name in names.split("|"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _look_at_tensorrt() -> tuple[Finding, ...]:
    """What `build --target tensorrt` and `plans` need: a GPU, its driver, and TensorRT."""
    from tritonsmith.engines.tensorrt.versions import device, import_tensorrt
    from tritonsmith.errors import PlanError

    looks: dict[str, Callable[[], str]] = {
        "gpu": lambda: _gpu_text(device()),
        "tensorrt": lambda: f"TensorRT {import_tensorrt().__version__}",
    }
    findings = []
    for name, look in looks.items():
        try:
            findings.append(Finding(name=name, status="ok", detail=look()))
        except PlanError as error:
            findings.append(Finding(name=name, status="info", detail=f"{error.reason}; only plans need it"))
    return tuple(findings)


def _gpu_text(gpu: Device) -> str:
    return f"{gpu.gpu}, compute capability {gpu.compute_capability}, driver {gpu.driver}"


def _look_at_containers() -> Finding:
    name = "containers"
    client = shutil.which("docker") or shutil.which("podman")
    if client is None:
        return Finding(name=name, status="info", detail="neither docker nor podman, and none needed")
    command = [client, "version", "--format", "{{.Server.Version}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name=name, status="info", detail=f"{client} does not answer: {error}")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Finding(name=name, status="info", detail=f"{client} reaches no engine: {reason}")
    return Finding(name=name, status="ok", detail=f"{client}, engine {done.stdout.strip()}")


def _look_at_index() -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["download", "--no-deps", "--no-cache-dir", "--dest", folder, "iniconfig"]
        try:
            run_pip(Path(sys.executable), arguments, scratch=Path(folder), what="no package can be had")
        except ProvisionError as error:
            return Finding(name="package index", status="fail", detail=str(error.found), fix=error.fix)
    return Finding(name="package index", status="ok", detail="answers")
