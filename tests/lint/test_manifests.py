"""manifest.json against the files beside it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from linted import add_linear, findings_of, only
from onnx_models import linear_model
from publishing import artifact_of, manifest_of, tensor
from tritonsmith.artifact import sha256_of
from tritonsmith.manifest import read_manifest, text_from_manifest
from tritonsmith.repository.config import config_from_artifact
from tritonsmith.repository.entry import publish

ARTIFACT = artifact_of([tensor("features", "float32", "batch", 4)], [tensor("scores", "float32", "batch", 3)])


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A repository with the model `linear` as tritonsmith publishes it."""
    built = tmp_path / "built"
    built.mkdir()
    (built / "model.onnx").write_bytes(linear_model().SerializeToString())
    config = config_from_artifact(ARTIFACT, name="linear", backend="onnxruntime", max_batch_size=4)
    publish(built, config, tmp_path / "repository", manifest=manifest_of(ARTIFACT, "f"))
    return tmp_path / "repository"


def test_what_was_published_is_right(published: Path) -> None:
    assert findings_of(published) == ()


@pytest.mark.parametrize("place", ["1/model.onnx", "config.pbtxt"])
def test_a_file_changed_by_hand(published: Path, place: str) -> None:
    path = published / "linear" / place
    if place == "config.pbtxt":
        path.write_text(path.read_text() + "# a note\n")
    else:
        path.write_bytes(linear_model(opset=17).SerializeToString())
    finding = only(findings_of(published))
    assert (finding.severity, finding.place) == ("error", place)
    assert "changed after it was published" in finding.what


def test_a_file_of_the_manifest_that_is_missing(published: Path) -> None:
    (published / "linear" / "1" / "model.onnx").unlink()
    said = [finding.what for finding in findings_of(published)]
    assert "a file that the manifest names is missing" in said
    assert len(said) == 2  # and the configuration needs it


@pytest.mark.parametrize("table", ["files", "model_files"])
@pytest.mark.parametrize("name", ["../../../outside", "{root}/outside", "/etc", "."])
def test_a_manifest_that_names_files_elsewhere(published: Path, table: str, name: str) -> None:
    outside = published.parent / "outside"
    outside.write_text("x")
    name = name.format(root=published.parent)
    path = published / "linear" / "1" / "manifest.json"
    manifest = read_manifest(path)
    digests = {**getattr(manifest, table), name: sha256_of(outside)}
    path.write_text(text_from_manifest(dataclasses.replace(manifest, **{table: digests})))
    finding = only(findings_of(published))
    assert (finding.severity, finding.place, finding.found) == ("error", "1/manifest.json", repr(name))


def test_the_newest_manifest_speaks_for_the_folder(published: Path) -> None:
    """An older version's manifest names the configuration of its own time."""
    built = published.parent / "built"
    config = config_from_artifact(ARTIFACT, name="linear", backend="onnxruntime", max_batch_size=2)
    publish(built, config, published, manifest=manifest_of(ARTIFACT, "g"))
    assert findings_of(published) == ()


def test_a_manifest_of_another_model(published: Path) -> None:
    shutil.copytree(published / "linear", published / "copy")
    path = published / "copy" / "config.pbtxt"
    path.write_text(path.read_text().replace('"linear"', '"copy"'))
    said = {finding.what for finding in findings_of(published) if finding.model == "copy"}
    assert "the manifest is of another name" in said


def test_a_manifest_of_another_version(published: Path) -> None:
    path = published / "linear" / "1" / "manifest.json"
    path.write_text(text_from_manifest(dataclasses.replace(read_manifest(path), version=7)))
    assert only(findings_of(published)).what == "the manifest is of another version"


def test_a_damaged_manifest(published: Path) -> None:
    (published / "linear" / "1" / "manifest.json").write_text("{")
    assert "damaged" in only(findings_of(published)).what


def test_configs_only_reads_no_manifest(published: Path) -> None:
    (published / "linear" / "1" / "manifest.json").write_text("{")
    assert findings_of(published, configs_only=True) == ()


def test_a_model_from_elsewhere_has_none(tmp_path: Path) -> None:
    add_linear(tmp_path)
    assert findings_of(tmp_path) == ()
