"""docker/entrypoint.sh outside of a container: which command line tritonserver would get."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ENTRYPOINT = Path(__file__).resolve().parents[2] / "docker" / "entrypoint.sh"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    model = tmp_path / "models" / "m"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text('backend: "onnxruntime"\n')
    (tmp_path / "flags").write_text("--model-control-mode=none\n")
    return tmp_path / "models"


def command_line(repository: Path, **variables: str) -> list[str]:
    environment = {
        **os.environ,
        "TRITONSMITH_MODELS": str(repository),
        "TRITONSMITH_FLAGS": str(repository.parent / "flags"),
        "TRITONSMITH_TRITONSERVER": "/bin/echo",
        **variables,
    }
    done = subprocess.run([ENTRYPOINT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_version_compatible_plan_is_allowed_only_where_its_order_asks(repository: Path) -> None:
    """Triton's TensorRT backend refuses such plans without the flag (its loader.cc, LoadPlan)."""
    allowed = "--backend-config=tensorrt,version-compatible=true"
    order = repository / "m" / "1" / "gpu.order.json"
    order.write_text('{\n  "plan": {\n    "version_compatible": false\n  }\n}\n')
    assert allowed not in command_line(repository, TRITONSMITH_TARGET="gpu")
    order.write_text(order.read_text().replace("false", "true"))
    assert allowed in command_line(repository, TRITONSMITH_TARGET="gpu")
    assert allowed not in command_line(repository, TRITONSMITH_TARGET="other")
    assert allowed not in command_line(repository)


def test_a_start_up_file_of_bash_is_not_read(repository: Path, tmp_path: Path) -> None:
    """NVIDIA's images set BASH_ENV to one that takes seconds."""
    (tmp_path / "start").write_text("echo it was read\n")
    assert "read" not in command_line(repository, BASH_ENV=str(tmp_path / "start"))
