"""Options of deploy kubernetes, wrong ones of every kind, and the folder that the command writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from measured import write_measured_repository
from tritonsmith.cli import main
from tritonsmith.deploy.folder import MARK
from tritonsmith.deploy.kubernetes import KubernetesOptions
from tritonsmith.deploy.measurements_file import write_measurements
from tritonsmith.errors import UsageError


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "Upper"}, "--name"),
        ({"name": "a" * 41}, "too long"),
        ({"namespace": "under_score"}, "--namespace"),
        ({"cpu_image": "UPPER/image"}, "image"),
        ({"min_replicas": 0}, "replicas"),
        ({"min_replicas": 5, "max_replicas": 4}, "replicas"),
        ({"storage": "s3://"}, "--storage"),
        ({"storage": "gs://bucket"}, "--storage"),
        ({"storage": "pvc:Claim"}, "--storage"),
        ({"plan_cache_size": "ten"}, "--plan-cache-size"),
        ({"prometheus_url": "prometheus:80"}, "--prometheus"),
        ({"prometheus_url": "http://prometheus:80x"}, "--prometheus"),
        ({"prometheus_url": "http://me:secret@prometheus:80"}, "--prometheus"),
        ({"prometheus_url": "http://prometheus:99999"}, "--prometheus"),
        ({"prometheus_url": "http://[::1"}, "--prometheus"),
        ({"prometheus_url": "http://prometheus/?a=b"}, "--prometheus"),
        ({"object_store_endpoint": "minio"}, "--endpoint"),
        ({"object_store_endpoint": "http://minio:port"}, "--endpoint"),
        ({"storage": "pvc:claim/../other"}, "--storage"),
        ({"storage": "pvc:claim/a//b"}, "--storage"),
        ({"storage": "s3://bucket/../other"}, "--storage"),
        ({"storage": "s3:/bucket"}, "--storage"),
        ({"plan_cache": "node"}, "--plan-cache"),
        ({"plan_cache": "claim", "storage_class": "Fast one"}, "--storage-class"),
        ({"storage_class": "fast"}, "--plan-cache claim"),
        ({"gpu_product": "NVIDIA L4"}, "--gpu-product"),
    ],
)
def test_wrong_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        KubernetesOptions(**options)
    assert said in str(caught.value)
    assert "secret@" not in str(caught.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    repository: Path
    file: Path

    def deploy(self, out: Path, *more: str) -> int:
        return main(
            [
                *("deploy", "kubernetes", str(self.repository), "--out", str(out)),
                *("--measurements", str(self.file), *more),
            ]
        )


@pytest.fixture
def measured(tmp_path: Path) -> Measured:
    repository, measurements = write_measured_repository(tmp_path / "two models")
    write_measurements(tmp_path / "m.json", measurements)
    return Measured(repository=repository, file=tmp_path / "m.json")


def test_command_line_writes_a_folder(
    measured: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a new" / "folder"
    assert measured.deploy(out, "--json", "--min-replicas", "3", "--name", "mine") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == sorted(
        str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.name != MARK
    )
    assert any(step.startswith("one of: ") and "overlays/cpu" in step for step in told["next"])
    assert yaml.safe_load((out / "base/autoscaler.yaml").read_text())["spec"]["minReplicas"] == 3
    assert "# two on Kubernetes" in (out / "README.md").read_text()

    assert measured.deploy(out) == 2
    assert "--force" in capsys.readouterr().err
    assert measured.deploy(out, "--force") == 0
    assert yaml.safe_load((out / "base/autoscaler.yaml").read_text())["spec"]["minReplicas"] == 2


def test_command_line_replaces_only_what_it_rendered(
    measured: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("years of work")
    assert measured.deploy(tmp_path / "own", "--force") == 2
    assert "was not rendered" in capsys.readouterr().err
    assert (tmp_path / "own" / "thesis.txt").exists()


def test_command_line_refuses_other_measurements(
    measured: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (measured.repository / "small" / "config.pbtxt").write_text("max_batch_size: 8")
    assert measured.deploy(tmp_path / "out") == 1
    assert "other configurations" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_line_takes_measurements_or_measures(
    measured: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measured.deploy(tmp_path / "out", "--axis-length", "8") == 2
    assert "--axis-length beside --measurements" in capsys.readouterr().err
