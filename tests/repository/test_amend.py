"""Files added to a published version: all of it or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from publishing import publish_payload, state_of
from tritonsmith.artifact import Target, sha256_of
from tritonsmith.errors import RepositoryError
from tritonsmith.repository import amend as amend_module
from tritonsmith.repository.amend import amend
from tritonsmith.repository.entry import Entry, find_entry, read_config, read_entry, write_durably

TARGET = Target(name="gpu", backend="tensorrt", precision="fp16", files=("gpu.sm90.plan",))


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    publish_payload(tmp_path / "repository", "one")
    return read_entry(tmp_path / "repository", "m")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "built.plan"
    path.write_bytes(b"a plan")
    return path


def test_the_version_has_the_file_and_says_so(entry: Entry, plan: Path) -> None:
    repository = entry.folder.parent
    config = read_config(repository, "m")
    config.default_model_filename = "gpu.sm90.plan"
    amend(entry, files={"gpu.sm90.plan": plan}, targets=(TARGET,), configs={"gpu": config})

    manifest = read_entry(repository, "m").manifest
    assert manifest.targets == (TARGET,)
    assert manifest.files == {**entry.manifest.files, "gpu.sm90.plan": sha256_of(plan)}
    assert manifest.fingerprint == entry.manifest.fingerprint
    assert read_config(repository, "m", "gpu") == config
    assert (entry.version_folder / "gpu.sm90.plan").read_bytes() == b"a plan"
    assert find_entry(repository, "m", manifest.fingerprint) is not None
    (entry.version_folder / "gpu.sm90.plan").write_bytes(b"another")
    assert find_entry(repository, "m", manifest.fingerprint) is None


def test_a_file_of_that_name_is_replaced(entry: Entry, plan: Path) -> None:
    amended = amend(entry, files={"gpu.sm90.plan": plan}, targets=(TARGET,), configs={})
    plan.write_bytes(b"a newer plan")
    amended = amend(amended, files={"gpu.sm90.plan": plan}, targets=(TARGET,), configs={})
    assert (entry.version_folder / "gpu.sm90.plan").read_bytes() == b"a newer plan"
    assert amended.manifest.files["gpu.sm90.plan"] == sha256_of(plan)


def test_a_version_that_was_changed_is_refused(entry: Entry, plan: Path) -> None:
    (entry.version_folder / "model.py").write_text("changed")
    before = state_of(entry.folder.parent)
    with pytest.raises(RepositoryError, match="is not as it was published"):
        amend(entry, files={"gpu.sm90.plan": plan}, targets=(TARGET,), configs={})
    assert state_of(entry.folder.parent) == before


def test_a_failure_leaves_what_was_there(entry: Entry, tmp_path: Path) -> None:
    before = state_of(entry.folder.parent)
    with pytest.raises(RepositoryError, match="could not be published"):
        amend(entry, files={"gpu.sm90.plan": tmp_path / "absent"}, targets=(TARGET,), configs={})
    assert state_of(entry.folder.parent) == before
    assert not list(entry.folder.parent.parent.glob(".*staging*"))


@pytest.mark.parametrize("spoilt", ["manifest.json", "configs/gpu.pbtxt"])
def test_what_does_not_read_back_is_not_published(
    entry: Entry, plan: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    """As on a disk that loses what it was given."""
    before = state_of(entry.folder.parent)

    def write_badly(file: Path, content: bytes) -> None:
        write_durably(file, b"" if file.as_posix().endswith(spoilt) else content)

    monkeypatch.setattr(amend_module, "write_durably", write_badly)
    config = read_config(entry.folder.parent, "m")
    with pytest.raises(RepositoryError):
        amend(entry, files={"gpu.sm90.plan": plan}, targets=(TARGET,), configs={"gpu": config})
    assert state_of(entry.folder.parent) == before
