"""What a build of an image is given: the package, the stages' packages and their pins."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from tritonsmith.deploy.context import archive_package, context_files
from tritonsmith.errors import ProvisionError

ROOT = Path(__file__).resolve().parents[2]


def names_in(archive: bytes) -> set[str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return set(opened.getnames())


def test_equal_sources_give_equal_bytes() -> None:
    """No time of a file or of the packing is in it, and no owner."""
    archive = archive_package()
    assert archive[4:8] == bytes(4)  # gzip's own time stamp
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        members = opened.getmembers()
    assert {(member.mtime, member.uid, member.uname, member.mode) for member in members} == {
        (0, 0, "", 0o644)
    }
    paths = [PurePosixPath(member.name) for member in members]
    assert paths == sorted(paths)


def test_archive_holds_the_package_and_not_the_context_itself() -> None:
    names = names_in(archive_package())
    assert {
        "tritonsmith/__init__.py",
        "tritonsmith/server/requirements.txt",
        "tritonsmith/server/backends/onnxruntime/model.py",
        "tritonsmith/server/proof/tritonsmith_proof/config.pbtxt",
    } <= names
    assert not [
        name for name in names if "__pycache__" in name or name.startswith("tritonsmith/deploy/docker")
    ]


def test_image_can_be_laid_by_the_archive_alone(tmp_path: Path) -> None:
    """Dockerfile.cpu runs it with Debian's Python, which has no package installed."""
    with tarfile.open(fileobj=io.BytesIO(archive_package())) as opened:
        opened.extractall(tmp_path, filter="data")
    done = subprocess.run(
        [sys.executable, "-S", "-m", "tritonsmith.deploy.image", "--help"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_stages_of_all_models_are_named_once(tmp_path: Path) -> None:
    for model, lines in {"a": "pillow>=11\n", "b": "# why\ntokenizers>=0.21\npillow>=11\n"}.items():
        (tmp_path / model).mkdir()
        (tmp_path / model / "requirements.txt").write_text(lines)
    files = context_files(tmp_path)
    assert files["stages.txt"].decode().splitlines()[1:] == ["pillow>=11", "tokenizers>=0.21"]
    assert files["constraints.txt"] == (ROOT / "tools" / "constraints.txt").read_bytes()


def test_a_stage_that_names_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "requirements.txt").write_text("-r other.txt\n")
    with pytest.raises(ProvisionError, match="only packages can be named here"):
        context_files(tmp_path)


def test_a_wheel_holds_what_images_are_built_from(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for folder in ("tools", "docker"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "recipes")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignored)
    (source / "docker" / "secrets").mkdir(exist_ok=True)
    for private in (".env", "secrets/key", "tritonsmith.tar.gz"):
        (source / "docker" / private).write_text("a user's own")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(tmp_path))
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name.removeprefix("tritonsmith/deploy/") for name in wheel.namelist()}
    assert {
        *("constraints.txt", "docker/Dockerfile.cpu", "docker/Dockerfile.gpu", "docker/entrypoint.sh"),
        *("docker/close_idle.c", "docker/build.sh", "docker/.dockerignore", "docker/stages.txt"),
    } <= names
    assert not names & {"docker/.env", "docker/secrets/key", "docker/tritonsmith.tar.gz"}
