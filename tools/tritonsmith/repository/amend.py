"""Adding files to a version that is published: plans that a GPU machine built, and what follows from them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tritonclient.grpc import model_config_pb2

from tritonsmith.artifact import Target, sha256_of
from tritonsmith.errors import RepositoryError
from tritonsmith.manifest import MANIFEST_NAME, text_from_manifest
from tritonsmith.repository.config import text_from_config
from tritonsmith.repository.entry import (
    Entry,
    check_written,
    config_name,
    failures_named,
    find_entry,
    flush_file,
    link_tree,
    write_durably,
)
from tritonsmith.repository.staging import (
    STAGING_NAME,
    clean_up,
    locked,
    replace_folder,
    staged,
    sync_folder,
)


def amend(
    entry: Entry,
    *,
    files: Mapping[str, Path],
    targets: tuple[Target, ...],
    configs: Mapping[str, model_config_pb2.ModelConfig],
) -> Entry | None:
    """Publish `entry` again with more files and other targets, all in one rename.

    None: the version is not what `entry` says any more, another process has amended it. Read it again.

    `files` maps a name in the version's folder to the file to copy there, in the place of one of that name.
    `targets` are all targets of the version as they are from now on, and `configs` maps those of them whose
    configuration changes to the new one. The fingerprint stays: an unchanged build finds the version.

    Raises:
        RepositoryError: the version is not as it was published, or the repository cannot be written.
    """
    repository = entry.folder.parent.resolve()
    name, manifest = entry.folder.name, entry.manifest
    with failures_named(repository, name), locked(repository):
        clean_up(repository)
        present = find_entry(repository, name, manifest.fingerprint, entry.version)
        if present is None:
            raise RepositoryError(
                f"{entry.version_folder} is not as it was published",
                fix="build the model again with `tritonsmith build`",
            )
        if present.manifest != manifest:
            return None
        by_name = {config_name(target): config for target, config in configs.items()}
        texts = {file: text_from_config(config) for file, config in by_name.items()}
        inside = f"{entry.version}/"
        replaced = {*texts, inside + MANIFEST_NAME, *(inside + file for file in files)}
        with staged(repository, name) as stage:
            new = stage / "new"
            new.mkdir()
            link_tree(entry.folder, new, leave_out={STAGING_NAME, *replaced})
            for file, text in texts.items():
                write_durably(new / file, text.encode())
            version = new / str(entry.version)
            for file, source in files.items():
                shutil.copyfile(source, version / file)
                flush_file(version / file)
            complete = replace(
                manifest,
                files={**manifest.files, **{file: sha256_of(version / file) for file in files}},
                model_files={**manifest.model_files, **{file: sha256_of(new / file) for file in texts}},
                targets=targets,
            )
            write_durably(version / MANIFEST_NAME, text_from_manifest(complete).encode())
            sync_folder(version)
            sync_folder(new)
            check_written(new, by_name, complete)
            replace_folder(stage, repository / name)
    return replace(entry, manifest=complete)
