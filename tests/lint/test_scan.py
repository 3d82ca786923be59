"""Folders and configurations that Triton cannot read as models."""

from __future__ import annotations

from pathlib import Path

import pytest

from linted import DOUBLE, add_double, add_linear, add_model, findings_of, only
from tritonsmith.errors import UsageError
from tritonsmith.targets.view import lay_view


def test_a_right_repository_has_no_finding(tmp_path: Path) -> None:
    add_linear(tmp_path)
    add_double(tmp_path)
    (tmp_path / "README.md").write_text("files of a repository are not read")
    assert findings_of(tmp_path, container="26.07", gpu="9.0") == ()


def test_a_folder_without_a_configuration_is_a_broken_model(tmp_path: Path) -> None:
    add_double(tmp_path)
    (tmp_path / ".staging").mkdir()
    finding = only(findings_of(tmp_path))
    assert (finding.severity, finding.model) == ("error", ".staging")
    assert "every folder" in finding.what


def test_text_that_is_no_configuration_is_named_by_line(tmp_path: Path) -> None:
    add_model(tmp_path, "m", 'backend: "python"\nmax_batchsize: 4\n')
    finding = only(findings_of(tmp_path))
    assert (finding.severity, finding.place) == ("error", "config.pbtxt")
    assert "2:1" in str(finding.found)
    assert "max_batchsize" in str(finding.found)


def test_a_configuration_that_is_no_text(tmp_path: Path) -> None:
    (add_double(tmp_path) / "config.pbtxt").write_bytes(b"backend: \xff")
    assert "cannot be read" in only(findings_of(tmp_path)).what


def test_a_name_is_the_folders(tmp_path: Path) -> None:
    add_double(tmp_path, config='name: "triple"' + DOUBLE)
    finding = only(findings_of(tmp_path))
    assert (finding.severity, finding.found, finding.expected) == ("error", "triple", "double")


def test_a_name_that_urls_cannot_hold(tmp_path: Path) -> None:
    add_double(tmp_path, name="my model")
    assert "cannot name a model" in only(findings_of(tmp_path)).what


@pytest.mark.parametrize("content", ["nothing", "empty"])
def test_what_is_no_repository_is_wrong_usage(tmp_path: Path, content: str) -> None:
    folder = tmp_path / content
    if content == "empty":
        folder.mkdir()
    with pytest.raises(UsageError):
        findings_of(folder)


def test_a_view_is_not_what_was_published(tmp_path: Path) -> None:
    add_double(tmp_path / "repository")
    view = lay_view(tmp_path / "repository", tmp_path / "view")
    with pytest.raises(UsageError, match="is a view"):
        findings_of(view)


def test_an_unknown_target_is_wrong_usage_and_known_ones_are_named(tmp_path: Path) -> None:
    folder = add_double(tmp_path)
    (folder / "configs").mkdir()
    (folder / "configs" / "gpu.pbtxt").write_text(DOUBLE)
    with pytest.raises(UsageError) as caught:
        findings_of(tmp_path, target="tpu")
    assert "gpu" in str(caught.value)


def test_only_what_a_target_serves_is_checked(tmp_path: Path) -> None:
    """A model without the target's own configuration is served by its default."""
    folder = add_double(tmp_path)
    (folder / "configs").mkdir()
    (folder / "configs" / "gpu.pbtxt").write_text(DOUBLE)
    (folder / "config.pbtxt").write_text(DOUBLE + "instance_group { count: -1 }")
    add_double(tmp_path, "other", DOUBLE + "instance_group { count: -1 }")
    assert {finding.model for finding in findings_of(tmp_path)} == {"double", "other"}
    assert {finding.model for finding in findings_of(tmp_path, target="gpu")} == {"other"}
