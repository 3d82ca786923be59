"""manifest.json against the files: what was changed by hand is no longer what was judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from tritonsmith.artifact import Manifest, sha256_of
from tritonsmith.errors import RepositoryError
from tritonsmith.lint.findings import Finding, finding_from_error
from tritonsmith.lint.scan import Model
from tritonsmith.manifest import MANIFEST_NAME, read_manifest

REBUILD = "build the model again; changes belong into its recipe"


def read_manifests(model: Model) -> tuple[Mapping[int, Manifest], tuple[Finding, ...]]:
    """The manifest of each version that has one, and those that cannot be read."""
    manifests: dict[int, Manifest] = {}
    findings = []
    for version in model.versions:
        place = f"{version}/{MANIFEST_NAME}"
        if not (model.folder / place).is_file():
            continue
        try:
            manifests[version] = read_manifest(model.folder / place)
        except RepositoryError as error:
            findings.append(finding_from_error(error, model=model.name, place=place))
    return manifests, tuple(findings)


def check_manifests(model: Model, manifests: Mapping[int, Manifest]) -> Iterator[Finding]:
    """Files that are not as their manifest says. Of the model's folder the newest manifest speaks."""
    for version, manifest in manifests.items():
        place = f"{version}/{MANIFEST_NAME}"
        for what, found, expected in (
            ("name", manifest.name, model.name),
            ("version", str(manifest.version), str(version)),
        ):
            if found != expected:
                yield Finding(
                    severity="error",
                    model=model.name,
                    place=place,
                    what=f"the manifest is of another {what}",
                    found=found,
                    expected=expected,
                    fix="publish the model under its own name with `tritonsmith build`",
                )
        yield from _check_hashes(model, f"{version}/", manifest.files)
    if manifests:
        yield from _check_hashes(model, "", manifests[max(manifests)].model_files)


def _check_hashes(model: Model, below: str, digests: Mapping[str, str]) -> Iterator[Finding]:
    for name, digest in sorted(digests.items()):
        path: Path = model.folder / below / name
        if not path.exists():
            yield _changed(model, below + name, "a file that the manifest names is missing")
        elif sha256_of(path) != digest:
            yield _changed(model, below + name, "the file was changed after it was published")


def _changed(model: Model, place: str, what: str) -> Finding:
    return Finding(severity="error", model=model.name, place=place, what=what, fix=REBUILD)
