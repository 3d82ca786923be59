"""manifest.json: a published version's lineage on disk.

The file is the `Manifest` record, field by field, led by `schema`. A reader refuses a schema that it
does not know; it neither guesses nor ignores fields. Schema 1 had neither ledger nor search, schema 2 no
targets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from tritonsmith.artifact import MANIFEST_SCHEMA, Artifact, Json, Manifest, Step, Target, TensorSpec
from tritonsmith.errors import RepositoryError

MANIFEST_NAME = "manifest.json"
# What an older schema did not have, as it stands in the newest.
ADDED_SINCE: Mapping[object, Mapping[str, Json]] = {
    1: {"ledger": None, "search": None, "targets": []},
    2: {"targets": []},
}

T = TypeVar("T")


def text_from_manifest(manifest: Manifest) -> str:
    """The text of manifest.json, indented for a reader, ending in a newline."""
    return json.dumps({"schema": MANIFEST_SCHEMA, **asdict(manifest)}, indent=2, ensure_ascii=False) + "\n"


def spec_from_json(record: Mapping[str, Any]) -> TensorSpec:
    """A tensor from what `json_from_tensor` wrote; KeyError, TypeError, ValueError where it is damaged."""
    return _spec_from(record)


def json_from_tensor(spec: TensorSpec) -> dict[str, Json]:
    """A tensor as manifest.json writes it."""
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def json_from_step(step: Step) -> dict[str, Json]:
    """A step of the lineage as manifest.json writes it."""
    return asdict(step)


def json_from_artifact(artifact: Artifact) -> dict[str, Json]:
    """An artifact as a record of what it is; where it lies is left out."""
    return {name: value for name, value in asdict(artifact).items() if name != "path"}


def artifact_from_json(record: Mapping[str, Any], path: Path) -> Artifact:
    """The artifact at `path` of its record.

    Raises:
        KeyError, TypeError, ValueError: a field that is missing, unknown or of another type.
    """
    _check_fields(Artifact, {**record, "path": path})
    return Artifact(
        path=path,
        format=_typed(record, "format", str),
        inputs=_each(record["inputs"], _spec_from),
        outputs=_each(record["outputs"], _spec_from),
        batched=_typed(record, "batched", bool),
        precision=_typed(record, "precision", str),
        steps=_each(record["steps"], _step_from),
    )


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.json.

    Raises:
        RepositoryError: a missing or damaged file, an unknown schema, a missing or unknown field.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RepositoryError(f"{path} cannot be read", found=error.strerror or error) from error
    except ValueError as error:
        raise RepositoryError(f"{path} is damaged", found=error, expected="JSON") from error
    if not isinstance(record, dict):
        raise RepositoryError(f"{path} is damaged", found=type(record).__name__, expected="an object")
    schema = record.pop("schema", None)
    if schema in ADDED_SINCE:
        record |= ADDED_SINCE[schema]
    elif schema != MANIFEST_SCHEMA:
        raise RepositoryError(
            f"{path} has another schema",
            found=schema,
            expected=MANIFEST_SCHEMA,
            fix="use the version of tritonsmith that wrote it, or build the model again",
        )
    try:
        return _manifest_from(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RepositoryError(f"{path} is damaged", found=f"{type(error).__name__}: {error}") from error


def _manifest_from(record: Mapping[str, Any]) -> Manifest:
    _check_fields(Manifest, record)
    return Manifest(
        name=_typed(record, "name", str),
        version=_typed(record, "version", int),
        fingerprint=_typed(record, "fingerprint", str),
        source=_typed(record, "source", str),
        source_sha256=_typed(record, "source_sha256", str),
        inputs=_each(record["inputs"], _spec_from),
        outputs=_each(record["outputs"], _spec_from),
        batched=_typed(record, "batched", bool),
        precision=_typed(record, "precision", str),
        backend=_typed(record, "backend", str),
        files=_digests(record["files"]),
        steps=_each(record["steps"], _step_from),
        gate=record["gate"],
        candidates=_each(record["candidates"], dict),
        model_files=_digests(record["model_files"]),
        ledger=record["ledger"],
        search=record["search"],
        targets=_each(record["targets"], _target_from),
    )


def _target_from(record: Mapping[str, Any]) -> Target:
    _check_fields(Target, record)
    optional = {key: record[key] and _typed(record, key, str) for key in ("precision", "order")}
    return Target(
        name=_typed(record, "name", str),
        backend=_typed(record, "backend", str),
        files=_each(record["files"], str),
        candidates=_each(record["candidates"], dict),
        plans=_each(record["plans"], dict),
        **optional,
    )


def _step_from(record: Mapping[str, Any]) -> Step:
    _check_fields(Step, record)
    return Step(
        name=_typed(record, "name", str),
        options=dict(record["options"]),
        input_sha256=_typed(record, "input_sha256", str),
        output_sha256=_typed(record, "output_sha256", str),
        tools=dict(record["tools"]),
        duration_s=float(record["duration_s"]),
        bytes_before=_typed(record, "bytes_before", int),
        bytes_after=_typed(record, "bytes_after", int),
        measured=dict(record["measured"]),
    )


def _spec_from(record: Mapping[str, Any]) -> TensorSpec:
    _check_fields(TensorSpec, record)
    shape = tuple(record["shape"])
    if not all(isinstance(axis, int | str) for axis in shape):
        raise TypeError(f"shape {shape}")
    return TensorSpec(name=_typed(record, "name", str), dtype=_typed(record, "dtype", str), shape=shape)


def _digests(record: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): str(digest) for name, digest in record.items()}


def _each(records: Any, convert: Callable[[Any], T]) -> tuple[T, ...]:
    if not isinstance(records, list):
        raise TypeError(f"{type(records).__name__} where an array belongs")
    return tuple(convert(record) for record in records)


def _typed(record: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = record[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{key} is {value!r}")
    return value


def _check_fields(kind: type[Any], record: Mapping[str, Any]) -> None:
    expected = {field.name for field in fields(kind)}
    if missing := expected - record.keys():
        raise KeyError(f"{kind.__name__} lacks {', '.join(sorted(missing))}")
    if unknown := record.keys() - expected:
        raise ValueError(f"{kind.__name__} has unknown {', '.join(sorted(unknown))}")
