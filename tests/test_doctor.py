"""The doctor looks at the real machine; what cannot be broken here is broken through its variables."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tritonsmith.doctor import Finding, diagnose
from tritonsmith.server.environment import ServerEnvironment


def by_name(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_this_machine_can_serve(server_environment: ServerEnvironment) -> None:
    found = by_name(diagnose())
    for name in ("system", "python", "server python", "pip and venv", "cache", "server"):
        assert found[name].status == "ok", found[name]
    assert str(server_environment.folder) in found["server"].detail
    assert "perf_analyzer" in found
    for finding in found.values():
        if finding.status in ("warn", "fail"):
            assert finding.fix, finding
    assert found["gpu"].status != "fail"  # none is needed


def test_what_is_broken_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITONSMITH_CACHE", str(tmp_path / "file" / "cache"))
    with socket.socket() as holder:
        with contextlib.suppress(OSError):  # used by another already
            holder.bind(("127.0.0.1", 8001))
            holder.listen()
        found = by_name(diagnose())
    assert found["cache"].status == "fail"
    assert "TRITONSMITH_CACHE" in str(found["cache"].fix)
    assert found["server"].status == "fail"
    assert found["port 8001"].status == "warn"
    assert "--grpc-port" in str(found["port 8001"].fix)


def test_a_machine_without_the_server_is_not_ill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONSMITH_CACHE", str(tmp_path))
    assert by_name(diagnose())["server"].status == "info"
    assert not (tmp_path / "environments").exists()  # looking builds nothing


def test_the_index_is_asked_only_when_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITONSMITH_CACHE", str(tmp_path))
    assert "package index" not in by_name(diagnose())
    assert by_name(diagnose(index=True))["package index"].status == "ok"


def test_no_framework_is_loaded() -> None:
    code = (
        "import sys; from tritonsmith.doctor import diagnose; diagnose(); "
        "print([name for name in ('tensorflow', 'torch', 'keras', 'openvino', 'onnxruntime', 'transformers', "
        "'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_what_plans_lack_is_named_and_is_no_illness() -> None:
    from tritonsmith.engines.tensorrt.versions import why_unavailable

    reason = why_unavailable()
    if reason is None:
        pytest.skip("this machine builds plans")
    found = by_name(diagnose())
    lacking = [found[name] for name in ("gpu", "tensorrt") if found[name].status != "ok"]
    assert lacking
    for finding in lacking:
        assert finding.status == "info"
        assert finding.detail.removesuffix("; only plans need it") in reason


def test_a_client_without_an_engine_is_no_container_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = tmp_path / "docker"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TRITONSMITH_CACHE", str(tmp_path / "cache"))  # no server is there to be proved
    client.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2\nexit 1\n")
    client.chmod(0o755)
    found = by_name(diagnose())["containers"]
    assert found.status == "info"
    assert "reaches no engine: Cannot connect" in found.detail
    client.write_text("#!/bin/sh\necho 20.10.24\n")
    assert by_name(diagnose())["containers"].detail == f"{client}, engine 20.10.24"
