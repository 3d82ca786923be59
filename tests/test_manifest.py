"""manifest.json, out and in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from publishing import PAYLOAD_ARTIFACT, manifest_of
from tritonsmith.artifact import Target
from tritonsmith.errors import RepositoryError
from tritonsmith.manifest import read_manifest, text_from_manifest


@pytest.fixture
def record() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(text_from_manifest(manifest_of(PAYLOAD_ARTIFACT, "f")))
    return loaded


def test_out_and_in(tmp_path: Path, record: dict[str, Any]) -> None:
    path = tmp_path / "manifest.json"
    text = text_from_manifest(manifest_of(PAYLOAD_ARTIFACT, "f"))
    path.write_text(text)
    manifest = read_manifest(path)
    assert text_from_manifest(manifest) == text
    assert manifest.inputs == PAYLOAD_ARTIFACT.inputs
    assert manifest.steps[0].measured == {"max_abs_error": 1e-7}
    assert record["schema"] == 3
    assert record["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 1]}]
    assert next(iter(record)) == "schema"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema": 4}, "another schema"),
        ({"schema": None}, "another schema"),
        ({"version": "1"}, "damaged"),
        ({"version": True}, "damaged"),
        ({"steps": {}}, "damaged"),
        ({"steps": [{"name": "convert"}]}, "damaged"),
        ({"inputs": [{"name": "x", "dtype": "int8", "shape": [None]}]}, "damaged"),
        ({"files": ["model.onnx"]}, "damaged"),
        ({"surprise": 1}, "damaged"),
    ],
)
def test_what_it_does_not_know_it_refuses(
    tmp_path: Path, record: dict[str, Any], change: dict[str, Any], match: str
) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**record, **change}))
    with pytest.raises(RepositoryError, match=match) as error:
        read_manifest(path)
    assert str(path) in error.value.what


def test_schema_1_had_neither_ledger_nor_search(tmp_path: Path, record: dict[str, Any]) -> None:
    path = tmp_path / "manifest.json"
    newest = read_manifest(write_record(path, record))
    old = {key: value for key, value in record.items() if key not in ("ledger", "search")}
    assert read_manifest(write_record(path, {**old, "schema": 1})) == newest


def test_schema_2_had_no_targets(tmp_path: Path, record: dict[str, Any]) -> None:
    path = tmp_path / "manifest.json"
    newest = read_manifest(write_record(path, record))
    old = {key: value for key, value in record.items() if key != "targets"}
    assert read_manifest(write_record(path, {**old, "schema": 2})) == newest


def test_targets_out_and_in(tmp_path: Path) -> None:
    waiting = Target(
        name="gpu",
        backend="tensorrt",
        precision=None,
        files=("gpu.fp16.onnx", "gpu.order.json"),
        order="gpu.order.json",
        candidates=({"name": "fp16", "chosen": True},),
    )
    built = replace(waiting, precision="fp16", plans=({"file": "gpu.sm90.plan"},))
    assert (waiting.deferred, built.deferred) == (True, False)
    manifest = replace(manifest_of(PAYLOAD_ARTIFACT, "f"), targets=(waiting, built))
    path = tmp_path / "manifest.json"
    path.write_text(text_from_manifest(manifest))
    assert read_manifest(path).targets == (waiting, built)
    damaged = json.loads(path.read_text())
    damaged["targets"][0]["precision"] = 16
    with pytest.raises(RepositoryError, match="damaged"):
        read_manifest(write_record(path, damaged))


def write_record(path: Path, record: dict[str, Any]) -> Path:
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize("key", ["version", "fingerprint", "steps", "model_files", "ledger", "search"])
def test_a_missing_field(tmp_path: Path, record: dict[str, Any], key: str) -> None:
    del record[key]
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(RepositoryError, match="damaged") as error:
        read_manifest(tmp_path / "manifest.json")
    assert key in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(RepositoryError, match="damaged"):
        read_manifest(tmp_path / "manifest.json")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="cannot be read"):
        read_manifest(tmp_path / "manifest.json")
