"""Manifests for Kubernetes as a test wants them: of a small repository, as parsed YAML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from measured import write_measured_repository
from tritonsmith.deploy.kubernetes import KubernetesOptions, render_kubernetes

DIGEST = "@sha256:" + "0a" * 32
IMAGES = {
    "cpu_image": f"registry.example:5000/team/tritonsmith-cpu:1.0{DIGEST}",
    "gpu_image": f"registry.example:5000/team/tritonsmith-gpu:1.0{DIGEST}",
    "fetch_image": f"registry.example:5000/rclone:1{DIGEST}",
}
Render = Callable[..., dict[str, bytes]]


def rendering(repository: Path) -> Render:
    """A function from options to files, of a repository that is written to `repository`."""
    repository, measurements = write_measured_repository(repository)

    def render_with(**options: Any) -> dict[str, bytes]:
        return render_kubernetes(repository, measurements, KubernetesOptions(**options))

    return render_with


def load(files: Mapping[str, bytes], path: str) -> dict[str, Any]:
    """The one manifest of a file."""
    found = [one for one in yaml.safe_load_all(files[path]) if one is not None]
    assert len(found) == 1
    manifest: dict[str, Any] = found[0]
    return manifest
