"""Publishing a version of a model so that a kill at any moment leaves the repository servable."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tritonclient.grpc import model_config_pb2

from tritonsmith.artifact import Manifest, sha256_of
from tritonsmith.errors import RepositoryError
from tritonsmith.manifest import MANIFEST_NAME, read_manifest, text_from_manifest
from tritonsmith.repository.config import HEADER, config_from_text, text_from_config
from tritonsmith.repository.names import check_name, check_version, versions_of
from tritonsmith.repository.staging import STAGING_NAME, clean_up, locked, replace_folder, staged, sync_folder

CONFIG_NAME = "config.pbtxt"
CONFIGS_FOLDER = "configs"  # of further targets: configs/<target>.pbtxt
WARMUP_FOLDER = "warmup"


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
        return self.folder / CONFIG_NAME

    def target_config_path(self, target: str) -> Path:
        return self.folder / config_name(target)


def publish(
    files: Path | None,
    config: model_config_pb2.ModelConfig,
    repository: Path,
    *,
    manifest: Manifest,
    version: int | None = None,
    force: bool = False,
    labels: Mapping[str, Path] | None = None,
    warmup: Mapping[str, bytes] | None = None,
    targets: Mapping[str, model_config_pb2.ModelConfig] | None = None,
) -> Entry:
    """Publish the files of the folder `files` as a version of the model `config.name`.

    `files` None is for an ensemble, whose versions hold a manifest alone.

    `manifest` is completed here: its `name`, `version`, `files` and `model_files` are set to what was
    published. `version` None is the next free one, or the newest with `force`, which then replaces it.
    `labels` maps a file name in the model's folder to the file to copy there; `warmup` maps a file name
    in `<model>/warmup/` to its content. `targets` maps a further target to its configuration, written to
    `<model>/configs/`; those of the version before that are none any more go. What else the model's folder
    holds stays as it is. A version with the fingerprint of `manifest` that is already there is returned as
    it is, without `force`.

    Raises:
        RepositoryError: a bad name or version, a version that exists (without `force`), a model of
            another kind or a configuration changed by hand, a repository that cannot be written, a
            full disk. The repository is then as it was.
    """
    check_name(config.name)
    check_version(version)
    repository = repository.absolute()
    with failures_named(repository, config.name):
        _make_repository(repository)
        repository = repository.resolve()
        with locked(repository):
            clean_up(repository)
            folder = repository / config.name
            twin = None if force else find_entry(repository, config.name, manifest.fingerprint, version)
            if twin is not None:
                return twin  # an equal build was faster
            configs = {CONFIG_NAME: config}
            configs |= {config_name(target): own for target, own in (targets or {}).items()}
            _check_folder(folder, configs, force=force)
            chosen = _choose_version(folder, version, force=force)
            _check_version_policy(config, {*versions_of(folder), chosen})
            with staged(repository, config.name) as stage:
                new = stage / "new"
                model_files = _write_model_folder(new, folder, chosen, configs, labels or {}, warmup or {})
                complete = dataclasses.replace(
                    manifest, name=config.name, version=chosen, files={}, model_files=model_files
                )
                complete = _write_version(new / str(chosen), files, complete)
                check_written(new, configs, complete)
                replace_folder(stage, folder)
    return Entry(folder=folder, version=chosen, manifest=complete)


def read_entry(repository: Path, name: str, version: int | None = None) -> Entry:
    """A version that tritonsmith published; `version` None is the newest.

    Raises:
        RepositoryError: no such model or version, one without a manifest, a damaged manifest.
    """
    check_name(name)
    check_version(version)
    folder = repository / name
    versions = versions_of(folder)
    if not versions or (version is not None and version not in versions):
        what = f"{folder} has no version {version}" if versions else f"{folder} has no published version"
        raise RepositoryError(what, found=list(versions), fix="publish it with `tritonsmith build`")
    chosen = version or versions[-1]
    manifest = read_manifest(folder / str(chosen) / MANIFEST_NAME)
    return Entry(folder=folder, version=chosen, manifest=manifest)


def find_entry(repository: Path, name: str, fingerprint: str, version: int | None = None) -> Entry | None:
    """The newest version (or `version`), if it was built from `fingerprint` and is as it was published.

    Every file is read and its hash compared, so a damaged or edited version is None.
    """
    try:
        entry = read_entry(repository, name, version)
    except RepositoryError:
        return None
    if entry.manifest.fingerprint != fingerprint or entry.manifest.name != name:
        return None
    expected = {entry.version_folder / file: digest for file, digest in entry.manifest.files.items()}
    expected |= {entry.folder / file: digest for file, digest in entry.manifest.model_files.items()}
    intact = all(file.is_file() and sha256_of(file) == digest for file, digest in expected.items())
    return entry if intact else None


def config_name(target: str | None) -> str:
    """Where a target's configuration lies in the model's folder; None is the default's."""
    return CONFIG_NAME if target is None else f"{CONFIGS_FOLDER}/{target}.pbtxt"


def read_config(repository: Path, name: str, target: str | None = None) -> model_config_pb2.ModelConfig:
    """A model's configuration, the default or a target's, parsed; a name that it leaves out is filled in.

    Raises:
        RepositoryError: no such model or target, or a file that cannot be parsed.
    """
    path = repository / name / config_name(target)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RepositoryError(f"{path} cannot be read", found=error) from error
    config = config_from_text(text, place=str(path))
    config.name = config.name or name
    return config


@contextmanager
def failures_named(repository: Path, name: str) -> Iterator[None]:
    """Say of which model and repository an error of the system is, as a RepositoryError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise RepositoryError(
            f"model {name!r} could not be published in {repository}",
            found=f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}",
            expected="a folder that may be written, with room for the model",
            fix="free some space, or name another repository" if full else None,
        ) from error


def check_repository(repository: Path) -> None:
    """Raise RepositoryError for a folder that nothing can be published into, before any long work."""
    existing = next(path for path in (repository.absolute(), *repository.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise RepositoryError(f"{existing} is a file", expected="a folder, or a path where none is yet")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RepositoryError(f"{existing} cannot be written", fix="choose another --repository")


def _make_repository(repository: Path) -> None:
    if repository.exists() and not repository.is_dir():
        raise RepositoryError(f"{repository} is a file", expected="a folder, or a path where none is yet")
    repository.mkdir(parents=True, exist_ok=True)


def _choose_version(folder: Path, version: int | None, *, force: bool) -> int:
    taken = versions_of(folder)
    newest = taken[-1] if taken else 0
    if version is None:
        return max(newest, 1) if force else newest + 1
    if version in taken and not force:
        raise RepositoryError(
            f"version {version} of model {folder.name!r} is published already",
            found=f"versions {', '.join(map(str, taken))}",
            fix=f"leave --version out for version {newest + 1}, or add --force to replace version {version}",
        )
    return version


def _check_folder(folder: Path, configs: Mapping[str, model_config_pb2.ModelConfig], *, force: bool) -> None:
    """Refuse to write over what tritonsmith did not write."""
    if folder.is_symlink():
        raise RepositoryError(f"{folder} is a symbolic link", fix="publish into the repository it points to")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RepositoryError(f"{folder} is a file", expected="a model's folder, or nothing")
    if not (folder / CONFIG_NAME).is_file():
        return
    present, config = read_config(folder.parent, folder.name), configs[CONFIG_NAME]
    if _kind_of(present) != _kind_of(config):
        raise RepositoryError(
            f"{folder} holds another kind of model",
            found=_kind_of(present),
            expected=_kind_of(config),
            fix="name another model, or remove that folder",
        )
    if force:
        return
    written = _written_before(folder)
    for name in sorted({*configs, *_target_configs(folder, written)}):
        path = folder / name
        if not path.is_file() or not _edited_by_hand(path, name, written):
            continue
        if name in configs and _parsed(path) == configs[name]:
            continue
        raise RepositoryError(
            f"{path} was written or changed by hand",
            expected="a file as tritonsmith wrote it",
            fix=f"put the changes into the recipe's [{_table_of(name)}] table, or add --force to write over "
            "them",
        )


def _parsed(path: Path) -> model_config_pb2.ModelConfig:
    return config_from_text(path.read_text(encoding="utf-8"), place=str(path))


def _table_of(name: str) -> str:
    return "config" if name == CONFIG_NAME else f"target.{Path(name).stem}.config"


def _target_configs(folder: Path, written: Mapping[str, str] | None) -> tuple[str, ...]:
    """The targets' configurations that tritonsmith wrote; without a manifest, the header says which."""
    if written is not None:
        return tuple(name for name in written if name.startswith(f"{CONFIGS_FOLDER}/"))
    files = sorted((folder / CONFIGS_FOLDER).glob("*.pbtxt"))
    return tuple(config_name(file.stem) for file in files if not _edited_by_hand(file, file.name, None))


def _kind_of(config: model_config_pb2.ModelConfig) -> str:
    if config.platform == "ensemble" or config.HasField("ensemble_scheduling"):
        return "an ensemble"
    return "a Python stage" if config.backend == "python" else "a model file"


def _written_before(folder: Path) -> Mapping[str, str] | None:
    """The files in the model's folder that the newest manifest names; None where there is no manifest."""
    for version in reversed(versions_of(folder)):
        if (folder / str(version) / MANIFEST_NAME).is_file():
            return read_manifest(folder / str(version) / MANIFEST_NAME).model_files
    return None


def _edited_by_hand(path: Path, name: str, written: Mapping[str, str] | None) -> bool:
    """Whether a configuration is other than the newest manifest says; without one, its header decides."""
    if written is None:
        return not path.read_text(encoding="utf-8").startswith(HEADER)
    return written.get(name) != sha256_of(path)


def _check_version_policy(config: model_config_pb2.ModelConfig, versions: set[int]) -> None:
    absent = sorted(set(config.version_policy.specific.versions) - versions)
    if absent:
        raise RepositoryError(
            f"config.version_policy.specific.versions of model {config.name!r} names absent versions",
            found=absent,
            expected=f"some of {sorted(versions)}",
        )


def _write_model_folder(
    new: Path,
    old: Path,
    version: int,
    configs: Mapping[str, model_config_pb2.ModelConfig],
    labels: Mapping[str, Path],
    warmup: Mapping[str, bytes],
) -> dict[str, str]:
    """All of the model's folder but the new version; the hashes of the files written."""
    contents = {name: path.read_bytes() for name, path in labels.items()}
    contents |= {f"{WARMUP_FOLDER}/{name}": content for name, content in warmup.items()}
    contents |= {name: text_from_config(config).encode() for name, config in configs.items()}
    new.mkdir()
    if old.is_dir():
        vanished = _target_configs(old, _written_before(old))
        link_tree(old, new, leave_out={str(version), STAGING_NAME, *contents, *vanished})
    for name, content in contents.items():
        write_durably(new / name, content)
    with suppress(OSError):  # of targets that are none any more
        (new / CONFIGS_FOLDER).rmdir()
    return {name: sha256_of(new / name) for name in sorted(contents)}


def write_durably(file: Path, content: bytes) -> None:
    """Write a file that is not there yet, through to the disk."""
    file.parent.mkdir(exist_ok=True)
    with file.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def link_tree(source: Path, target: Path, *, leave_out: set[str], below: str = "") -> None:
    """Hard links to the files below `source`, or copies where the file system has no links."""
    for entry in sorted(source.iterdir()):
        relative = below + entry.name
        if relative in leave_out:
            continue
        if entry.is_dir() and not entry.is_symlink():
            (target / entry.name).mkdir()
            link_tree(entry, target / entry.name, leave_out=leave_out, below=f"{relative}/")
            shutil.copystat(entry, target / entry.name)
            continue
        try:
            os.link(entry, target / entry.name, follow_symlinks=False)
        except OSError:
            shutil.copy2(entry, target / entry.name, follow_symlinks=False)


def _write_version(folder: Path, files: Path | None, manifest: Manifest) -> Manifest:
    """Copy the files, flush them, and write the manifest that names them."""
    folder.mkdir()
    hashes = {}
    sources = sorted(path for path in files.rglob("*") if path.is_file()) if files else []
    if files and not sources:
        raise RepositoryError(f"{files} holds no file to publish")
    for source in sources:
        relative = source.relative_to(files or folder)
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        flush_file(target)
        hashes[relative.as_posix()] = sha256_of(target)
    complete = dataclasses.replace(manifest, files=hashes)
    (folder / MANIFEST_NAME).write_text(text_from_manifest(complete), encoding="utf-8")
    flush_file(folder / MANIFEST_NAME)
    sync_folder(folder)
    sync_folder(folder.parent)
    return complete


def flush_file(file: Path) -> None:
    """Flush a file's content to disk."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def check_written(new: Path, configs: Mapping[str, model_config_pb2.ModelConfig], manifest: Manifest) -> None:
    """Open again what was written below `new`: the manifest, and the configurations by their names.

    Raises:
        RepositoryError: it is not what was to be written.
    """
    written = read_manifest(new / str(manifest.version) / MANIFEST_NAME)
    same = text_from_manifest(written) == text_from_manifest(manifest)
    if not same or any(_parsed(new / name) != config for name, config in configs.items()):
        raise RepositoryError(f"model {manifest.name!r} did not read back as it was written")
