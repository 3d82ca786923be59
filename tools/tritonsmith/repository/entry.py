"""Publishing a version of a model so that a kill at any moment leaves the repository servable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc import model_config_pb2

from tritonsmith.artifact import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A published version of a model."""

    folder: Path  # <repository>/<name>
    version: int
    manifest: Manifest

    @property
    def version_folder(self) -> Path:
        return self.folder / str(self.version)

    @property
    def config_path(self) -> Path:
        return self.folder / "config.pbtxt"


def publish(
    files: Path,
    config: model_config_pb2.ModelConfig,
    repository: Path,
    *,
    manifest: Manifest,
    version: int | None = None,
    force: bool = False,
    labels: Mapping[str, Path] | None = None,
    warmup: Mapping[str, bytes] | None = None,
) -> Entry:
    """Publish the files of the folder `files` as a version of the model `config.name`.

    `manifest` is completed here: its `version` and `files` (names and hashes) are set to what was
    published. `version` None is the next free one. `labels` maps a file name in the model's folder to
    the file to copy there; `warmup` maps a file name in `<model>/warmup/` to its content.

    Raises:
        RepositoryError: a bad name or version, a version that exists (without `force`), a repository
            that cannot be written, a full disk.
    """
    raise NotImplementedError


def find_entry(repository: Path, name: str, fingerprint: str) -> Entry | None:
    """The newest published version built from `fingerprint`, if all its files are as published."""
    raise NotImplementedError


def check_name(name: str) -> None:
    """Raise RepositoryError unless `name` can name a model."""
    raise NotImplementedError
