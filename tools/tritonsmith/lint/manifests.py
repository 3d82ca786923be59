"""manifest.json against the files: what was changed by hand is no longer what was judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tritonsmith.artifact import Manifest, sha256_of
from tritonsmith.errors import RepositoryError
from tritonsmith.files import path_inside
from tritonsmith.lint.findings import Finding, error_at, finding_from_error, leads_out
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
                yield error_at(
                    model.name,
                    place,
                    f"the manifest is of another {what}",
                    found=found,
                    expected=expected,
                    fix="publish the model under its own name with `tritonsmith build`",
                )
        yield from _check_hashes(model, place, f"{version}/", manifest.files)
    if manifests:
        newest = max(manifests)
        place = f"{newest}/{MANIFEST_NAME}"
        yield from _check_hashes(model, place, "", manifests[newest].model_files)


def _check_hashes(model: Model, place: str, below: str, digests: Mapping[str, str]) -> Iterator[Finding]:
    for name, digest in sorted(digests.items()):
        path = path_inside(model.folder / below, name)
        if path is None:
            yield leads_out(model.name, place, name)
        elif not path.is_file():
            yield _changed(model, below + name, "a file that the manifest names is missing")
        elif sha256_of(path) != digest:
            yield _changed(model, below + name, "the file was changed after it was published")


def _changed(model: Model, place: str, what: str) -> Finding:
    return error_at(model.name, place, what, fix=REBUILD)
