"""Publishing, finding and refusing."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2

import publishing
from publishing import PAYLOAD_ARTIFACT, manifest_of, publish_payload, state_of
from tritonsmith.errors import RepositoryError
from tritonsmith.manifest import read_manifest
from tritonsmith.repository.config import config_from_artifact, text_from_config
from tritonsmith.repository.entry import find_entry, publish, read_entry
from tritonsmith.repository.names import check_name, versions_of


def config_of(name: str, **options: Any) -> model_config_pb2.ModelConfig:
    return config_from_artifact(PAYLOAD_ARTIFACT, name=name, backend="onnxruntime", **options)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "built"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"model")
    return folder


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_a_new_build_is_a_new_version_and_the_old_stays(tmp_path: Path) -> None:
    repository = tmp_path / "a folder" / "models"
    first = publish_payload(repository, "one")
    before = snapshot(first.version_folder)
    second = publish_payload(repository, "two")
    assert (first.version, second.version) == (1, 2)
    assert snapshot(first.version_folder) == before
    assert publish_payload(repository, "ten", version=10).version == 10
    assert publish_payload(repository, "eleven").version == 11
    assert read_manifest(second.version_folder / "manifest.json").fingerprint == "two"
    assert read_entry(repository, "m").version == 11
    assert read_entry(repository, "m", 2).manifest.version == 2
    assert sorted(path.name for path in tmp_path.joinpath("a folder").iterdir()) == ["models"]


def test_equal_builds_at_the_same_time_are_one_version(tmp_path: Path) -> None:
    """Both looked, found nothing, and built: the second to publish finds the work done."""
    first = publish_payload(tmp_path / "models", "one")
    before = snapshot(first.folder)
    assert publish_payload(tmp_path / "models", "one").version == 1
    assert snapshot(first.folder) == before
    assert publish_payload(tmp_path / "models", "one", version=5).version == 5


def test_a_published_version_is_replaced_by_force_alone(tmp_path: Path) -> None:
    publish_payload(tmp_path / "models", "one")
    before = snapshot(tmp_path / "models")
    with pytest.raises(RepositoryError, match="version 1 of model 'm' is published already"):
        publish_payload(tmp_path / "models", "two", version=1)
    assert snapshot(tmp_path / "models") == before
    assert publish_payload(tmp_path / "models", "two", version=1, force=True).version == 1
    assert state_of(tmp_path / "models")["m"]["versions"] == {"1": "two"}
    assert publish_payload(tmp_path / "models", "three", force=True).version == 1


def test_nothing_changed_is_found(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    assert find_entry(repository, "m", "one") is None
    publish_payload(repository, "one")
    found = find_entry(repository, "m", "one")
    assert found is not None
    assert found == read_entry(repository, "m")
    assert find_entry(repository, "m", "two") is None
    publish_payload(repository, "two")
    # What is served is "two": going back to "one" is a change.
    assert find_entry(repository, "m", "one") is None
    assert find_entry(repository, "m", "two") is not None


@pytest.mark.parametrize(
    "file", ["1/model.py", "1/manifest.json", "config.pbtxt", "labels.txt", "warmup/x.bin"]
)
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-2])])
def test_a_damaged_version_is_not_unchanged(tmp_path: Path, file: str, damage: Callable[[Path], Any]) -> None:
    publish_payload(tmp_path, "one")
    assert find_entry(tmp_path, "m", "one") is not None
    damage(tmp_path / "m" / file)
    assert find_entry(tmp_path, "m", "one") is None


def test_what_else_the_folder_holds_stays(tmp_path: Path, files: Path) -> None:
    folder = tmp_path / "models" / "m"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / ".gitkeep").touch()
    (folder / "notes").mkdir()
    (folder / "notes" / "README").write_text("mine")
    (folder / "config.pbtxt").write_text(text_from_config(config_of("m", max_batch_size=2)))
    entry = publish(files, config_of("m"), tmp_path / "models", manifest=manifest_of(PAYLOAD_ARTIFACT, "f"))
    assert entry.version == 1  # a folder that git keeps is no version
    assert (folder / "notes" / "README").read_text() == "mine"
    assert sorted(path.name for path in (folder / "1").iterdir()) == ["manifest.json", "model.onnx"]


def test_a_configuration_changed_by_hand_is_not_lost(tmp_path: Path, files: Path) -> None:
    manifest = manifest_of(PAYLOAD_ARTIFACT, "f")
    path = publish(files, config_of("m"), tmp_path, manifest=manifest).config_path
    path.write_text(path.read_text() + "instance_group { count: 2 kind: KIND_CPU }\n")
    edited = path.read_text()
    with pytest.raises(RepositoryError, match="changed by hand"):
        publish(files, config_of("m"), tmp_path, manifest=manifest)
    assert path.read_text() == edited
    # Once the recipe says the same, there is nothing to lose.
    same = config_of("m", extra={"instance_group": [{"count": 2, "kind": "KIND_CPU"}]})
    assert publish(files, same, tmp_path, manifest=manifest).version == 2
    path.write_text(edited)
    path.write_text(edited.replace("count: 2", "count: 3"))
    publish(files, config_of("m"), tmp_path, manifest=manifest, force=True)
    assert "instance_group" not in path.read_text()


@pytest.mark.parametrize("force", [False, True])
def test_a_python_stage_is_left_alone(tmp_path: Path, files: Path, force: bool) -> None:
    stage = tmp_path / "models" / "decode"
    (stage / "1").mkdir(parents=True)
    (stage / "1" / "model.py").write_text("# by hand")
    (stage / "config.pbtxt").write_text('backend: "python"\n')
    before = snapshot(tmp_path / "models")
    with pytest.raises(RepositoryError, match="another kind of model") as error:
        publish(
            files,
            config_of("decode"),
            tmp_path / "models",
            manifest=manifest_of(PAYLOAD_ARTIFACT, "f"),
            force=force,
        )
    assert (error.value.found, error.value.expected) == ("a Python stage", "a model file")
    publish_payload(tmp_path / "models", "one")
    after = snapshot(tmp_path / "models")
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/x",
        "a/b",
        "",
        ".",
        "..",
        ".hidden",
        "-x",
        "a b",
        "a\n",
        "a\0b",
        "é",
        "x" * 129,
        "stats",
        "a\\b",
    ],
)
def test_a_name_that_is_none(tmp_path: Path, files: Path, name: str) -> None:
    config = config_of("m")
    config.name = name
    with pytest.raises(RepositoryError, match="cannot name a model") as error:
        publish(files, config, tmp_path / "models", manifest=manifest_of(PAYLOAD_ARTIFACT, "f"))
    assert "ASCII letters" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built"]


@pytest.mark.parametrize("name", ["a", "Model-2.1_x", "7", "x" * 128])
def test_a_name_that_is_one(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("version", [0, -1, 2**63, True, 1.5, "1"])
def test_a_version_that_is_none(tmp_path: Path, version: Any) -> None:
    with pytest.raises(RepositoryError, match="this is no version"):
        publish_payload(tmp_path / "models", "one", version=version)
    assert not (tmp_path / "models").exists()


def test_versions_are_whole_numbers_of_folders_with_content(tmp_path: Path) -> None:
    for name in ("1", "12", "007", "3.staging", "x", "²"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "5").mkdir()
    (tmp_path / "6").touch()
    assert versions_of(tmp_path) == (1, 12)


def test_absent_versions_in_the_policy(tmp_path: Path, files: Path) -> None:
    config = config_of("m", extra={"version_policy": {"specific": {"versions": [1, 4]}}})
    with pytest.raises(RepositoryError, match="absent versions") as error:
        publish(files, config, tmp_path / "models", manifest=manifest_of(PAYLOAD_ARTIFACT, "f"))
    assert (error.value.found, error.value.expected) == ([4], "some of [1]")


def test_a_repository_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("mine")
    with pytest.raises(RepositoryError, match="is a file"):
        publish_payload(tmp_path / "models", "one")
    with pytest.raises(RepositoryError, match="Not a directory"):
        publish_payload(tmp_path / "models" / "below", "one")
    assert (tmp_path / "models").read_text() == "mine"


def test_a_model_folder_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RepositoryError, match="symbolic link"):
        publish_payload(tmp_path / "models", "one")


def test_a_repository_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "real")
    publish_payload(tmp_path / "models", "one")
    assert list(state_of(tmp_path / "real")) == ["m"]
    assert (tmp_path / "models").is_symlink()


def test_a_file_larger_than_the_disk_takes(tmp_path: Path, files: Path) -> None:
    """A limit on file sizes fails as a full disk does, in the middle of a file."""
    publish_payload(tmp_path / "models", "one")
    before = snapshot(tmp_path)
    (files / "model.onnx").write_bytes(bytes(8 << 20))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, hard))
    try:
        with pytest.raises(RepositoryError, match="could not be published") as error:
            publish(files, config_of("big"), tmp_path / "models", manifest=manifest_of(PAYLOAD_ARTIFACT, "f"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(error.value)
    assert "free some space" in str(error.value)
    (files / "model.onnx").write_bytes(b"model")
    assert snapshot(tmp_path) == before


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Mount a file system on a folder; needs root, which containers and CI mostly have."""
    mounted: list[Path] = []

    def mount_on(folder: Path, *arguments: str) -> None:
        done = subprocess.run(["mount", *arguments, folder], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
        if folder not in mounted:
            mounted.append(folder)

    yield mount_on
    for folder in reversed(mounted):
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(tmp_path: Path, files: Path, mount: Callable[..., None]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "-t", "tmpfs", "-o", "size=1M", "tmpfs")
    publish_payload(disk / "models", "one")
    before = snapshot(disk)
    (files / "model.onnx").write_bytes(bytes(2 << 20))
    with pytest.raises(RepositoryError, match="could not be published") as error:
        publish(files, config_of("m2"), disk / "models", manifest=manifest_of(PAYLOAD_ARTIFACT, "f"))
    assert "No space left" in str(error.value)
    assert snapshot(disk) == before


def test_a_read_only_repository(tmp_path: Path, mount: Callable[..., None]) -> None:
    repository = tmp_path / "models"
    publish_payload(repository, "one")
    before = snapshot(tmp_path)
    mount(repository, "--bind", str(repository))
    mount(repository, "-o", "remount,bind,ro")
    with pytest.raises(RepositoryError, match="could not be published") as error:
        publish_payload(repository, "two")
    assert "Read-only file system" in str(error.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("others", [[], ["other"]])
def test_a_repository_that_is_a_mount_point(
    tmp_path: Path, others: list[str], mount: Callable[..., None]
) -> None:
    """Nothing can be renamed into it from beside it."""
    repository = tmp_path / "models"
    repository.mkdir()
    mount(repository, "-t", "tmpfs", "tmpfs")
    for name in others:
        publish_payload(repository, name, name=name)
    publish_payload(repository, "one")
    publish_payload(repository, "two")
    state = state_of(repository)
    assert sorted(state) == ["m", *others]
    assert state["m"]["config"] == "two"
    assert state["m"]["versions"] == {"1": "one", "2": "two"}
    assert sorted(path.name for path in repository.rglob(".*")) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


def test_two_at_the_same_time(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    code = (
        "import sys; from pathlib import Path; from publishing import publish_payload\n"
        "for turn in range(8): publish_payload(Path(sys.argv[1]), sys.argv[2] + str(turn))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(publishing.__file__).parent)}
    running = [
        subprocess.Popen([sys.executable, "-c", code, repository, who], env=environment) for who in ("a", "b")
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    versions = state_of(repository)["m"]["versions"]
    assert sorted(versions, key=int) == [str(number) for number in range(1, 17)]
    assert sorted(versions.values()) == sorted(f"{who}{turn}" for who in "ab" for turn in range(8))
    newest = versions["16"]
    assert state_of(repository)["m"]["config"] == newest


def test_nothing_to_publish(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RepositoryError, match="holds no file"):
        publish(
            tmp_path / "empty",
            config_of("m"),
            tmp_path / "models",
            manifest=manifest_of(PAYLOAD_ARTIFACT, "f"),
        )
    assert not (tmp_path / "models" / "m").exists()
