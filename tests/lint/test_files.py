"""Versions, model files, labels and warm-up data that a configuration needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from linted import DOUBLE, LINEAR, add_double, add_linear, add_model, findings_of, only

OPENVINO = LINEAR.replace("onnxruntime", "openvino")
WARMUP = """
model_warmup { name: "one" batch_size: 1 inputs { key: "x"
  value { data_type: TYPE_FP32 dims: [3] input_data_file: "x.bin" } } }
"""


def test_a_missing_model_file_is_named_with_what_is_there(tmp_path: Path) -> None:
    folder = add_linear(tmp_path)
    (folder / "1" / "model.onnx").rename(folder / "1" / "modle.onnx")
    finding = only(findings_of(tmp_path))
    assert (finding.severity, finding.place) == ("error", "1/model.onnx")
    assert "modle.onnx" in str(finding.found)


def test_default_model_filename_names_another_file(tmp_path: Path) -> None:
    folder = add_linear(tmp_path, config=LINEAR + 'default_model_filename: "other.onnx"')
    assert only(findings_of(tmp_path)).place == "1/other.onnx"
    (folder / "1" / "model.onnx").rename(folder / "1" / "other.onnx")
    assert findings_of(tmp_path) == ()


def test_openvino_needs_both_of_its_files(tmp_path: Path) -> None:
    add_model(tmp_path, "m", OPENVINO, {"model.xml": b"<net/>"})
    assert only(findings_of(tmp_path)).place == "1/model.bin"


def test_a_model_without_versions(tmp_path: Path) -> None:
    folder = add_double(tmp_path)
    (folder / "1").rename(folder / "01")  # Triton passes over numbers that begin with 0
    assert "no version folder" in only(findings_of(tmp_path)).what


@pytest.mark.parametrize(
    ("policy", "place"),
    [
        ("", "2/model.py"),
        ("version_policy { latest { num_versions: 2 } }", "2/model.py"),
        ("version_policy { specific { versions: [1] } }", None),
        ("version_policy { specific { versions: [1, 3] } }", "config.pbtxt"),
        ("version_policy { all { } }", "2/model.py"),
    ],
)
def test_only_served_versions_need_their_files(tmp_path: Path, policy: str, place: str | None) -> None:
    (add_double(tmp_path, config=DOUBLE + policy) / "2").mkdir()
    found = findings_of(tmp_path)
    assert [finding.place for finding in found] == ([] if place is None else [place])


@pytest.mark.parametrize(
    ("labels", "severity", "words"),
    [(None, "error", "missing"), ("a\nb\n", "warning", "do not fit"), ("a\nb\nc\n", None, "")],
)
def test_labels(tmp_path: Path, labels: str | None, severity: str | None, words: str) -> None:
    folder = add_double(
        tmp_path,
        config=DOUBLE + 'output { name: "p" data_type: TYPE_FP32 dims: [3] label_filename: "labels.txt" }',
    )
    if labels is not None:
        (folder / "labels.txt").write_text(labels)
    found = findings_of(tmp_path)
    if severity is None:
        assert found == ()
    else:
        assert only(found).severity == severity
        assert words in only(found).what


@pytest.mark.parametrize(("length", "words"), [(None, "missing"), (8, "too short"), (12, None)])
def test_warmup_files(tmp_path: Path, length: int | None, words: str | None) -> None:
    folder = add_double(tmp_path, config=DOUBLE + WARMUP)
    if length is not None:
        (folder / "warmup").mkdir()
        (folder / "warmup" / "x.bin").write_bytes(bytes(length))
    found = findings_of(tmp_path)
    assert (found == ()) if words is None else (words in only(found).what)


LEADING_OUT = ["../../../outside.onnx", "../1/model.onnx", "{root}/outside.onnx", "link.onnx", "loop.onnx"]


@pytest.mark.parametrize("name", LEADING_OUT)
def test_a_model_file_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    name = name.format(root=tmp_path)
    repository = tmp_path / "repository"
    folder = add_linear(repository, config=LINEAR + f'default_model_filename: "{name}"')
    (tmp_path / "outside.onnx").write_bytes(b"opened, this is another finding")
    (folder / "1" / "link.onnx").symlink_to(tmp_path / "outside.onnx")
    (folder / "1" / "loop.onnx").symlink_to("loop.onnx")
    finding = only(findings_of(repository))
    assert (finding.severity, finding.place, finding.found) == ("error", "config.pbtxt", repr(name))
    assert "leads out of the folder" in finding.what


def test_a_link_that_stays_inside_is_right(tmp_path: Path) -> None:
    folder = add_linear(tmp_path, config=LINEAR + 'default_model_filename: "link.onnx"')
    (folder / "1" / "link.onnx").symlink_to("model.onnx")
    assert findings_of(tmp_path) == ()


@pytest.mark.parametrize("kind", ["labels", "warm-up"])
def test_labels_and_warmup_data_elsewhere_are_refused(tmp_path: Path, kind: str) -> None:
    labels = 'output { name: "p" data_type: TYPE_FP32 dims: [3] label_filename: "../../outside" }'
    extra = labels if kind == "labels" else WARMUP.replace("x.bin", "../../../outside")
    folder = add_double(tmp_path / "repository", config=DOUBLE + extra)
    (folder / "warmup").mkdir()
    (tmp_path / "outside").write_bytes(b"abcd\n" * 3)
    finding = only(findings_of(tmp_path / "repository"))
    assert (finding.severity, finding.place) == ("error", "config.pbtxt")
    assert "outside" in str(finding.found)


def test_configs_only_passes_over_what_a_build_makes(tmp_path: Path) -> None:
    folder = add_linear(tmp_path)
    (folder / "1" / "model.onnx").unlink()
    (folder / "1").rmdir()
    assert findings_of(tmp_path, configs_only=True) == ()
    assert findings_of(tmp_path) != ()
