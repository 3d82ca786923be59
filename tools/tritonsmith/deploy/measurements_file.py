"""measurements.json: what was measured of a repository, on disk.

The file is the `Measurements` record, field by field, led by `schema`. A reader refuses a schema that it
does not know, and a rendering refuses measurements of another repository.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tritonsmith.artifact import Json
from tritonsmith.deploy.measurements import MEASUREMENTS_SCHEMA, Measurements, ModelMeasurements
from tritonsmith.errors import DeployError
from tritonsmith.files import write_text_atomically
from tritonsmith.manifest import MANIFEST_NAME, read_manifest

CONFIG_NAME = "config.pbtxt"
_TOO_MUCH = 1 << 63  # of bytes, seconds or anything; what is not below it is no number either
_OPTIONAL = {"target", "load_s", "compute_s"}


def json_from_measurements(measurements: Measurements) -> dict[str, Json]:
    return {"schema": MEASUREMENTS_SCHEMA, **asdict(measurements)}


def text_from_measurements(measurements: Measurements) -> str:
    """The text of measurements.json, indented for a reader, ending in a newline."""
    return json.dumps(json_from_measurements(measurements), indent=2, ensure_ascii=False) + "\n"


def write_measurements(path: Path, measurements: Measurements) -> None:
    write_text_atomically(path, text_from_measurements(measurements))


def read_measurements(path: Path) -> Measurements:
    """Read a measurements.json.

    Raises:
        DeployError: a missing or damaged file, an unknown schema, a missing or unknown field.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise DeployError(
            f"{path} cannot be read",
            found=error.strerror or error,
            expected="what `tritonsmith deploy measure` writes",
        ) from error
    except ValueError as error:
        raise DeployError(f"{path} is damaged", found=error, expected="JSON") from error
    if not isinstance(record, dict) or record.get("schema") != MEASUREMENTS_SCHEMA:
        raise DeployError(
            f"{path} holds no measurements that this version reads",
            found=f"schema {record.get('schema')}" if isinstance(record, dict) else type(record).__name__,
            expected=f"schema {MEASUREMENTS_SCHEMA}",
            fix="measure again: tritonsmith deploy measure DIR --out FILE",
        )
    del record["schema"]
    try:
        models = tuple(ModelMeasurements(**_checked(ModelMeasurements, one)) for one in record["models"])
        return Measurements(**_checked(Measurements, record | {"models": models}))
    except (KeyError, TypeError, ValueError) as error:
        raise DeployError(f"{path} is damaged", found=f"{type(error).__name__}: {error}") from error


def check_measurements(measurements: Measurements, repository: Path) -> None:
    """Raise DeployError where the numbers are of another repository, or of what this one was.

    Weights that are not built here (no manifest at all) are no difference: what is rendered needs none.
    """
    wanted = fingerprint_of_repository(repository, measurements.target)
    configurations, _, manifests = wanted.partition("/")
    measured_configurations, _, measured_manifests = measurements.fingerprint.partition("/")
    if configurations != measured_configurations:
        what, expected, found = "has other configurations", configurations, measured_configurations
    elif manifests and measured_manifests and manifests != measured_manifests:
        what, expected, found = "has other versions, precisions or backends", manifests, measured_manifests
    else:
        return
    raise DeployError(
        f"{repository} {what} than what was measured",
        found=f"measurements of {measurements.repository!r}, fingerprint {found[:12]}",
        expected=f"fingerprint {expected[:12]}",
        fix=f"measure it: tritonsmith deploy measure {repository} --out FILE",
    )


def fingerprint_of_repository(repository: Path, target: str | None) -> str:
    """Two hashes, joined by a slash: of the configurations that `target` has, and of what manifests say.

    Of a manifest it takes version, precision and backend: the hashes of weights that each machine builds for
    itself differ, and what they need does not. The second is empty where nothing has a manifest.

    Raises:
        DeployError: no model in the folder.
    """
    models = model_folders(repository)
    configurations = [[folder.name, _configuration(folder, target)] for folder in models]
    manifests = [
        [manifest.name, manifest.version, manifest.precision, manifest.backend]
        for folder in models
        for path in sorted(folder.glob(f"*/{MANIFEST_NAME}"))
        for manifest in (read_manifest(path),)
    ]
    return f"{_hash(configurations)}/{_hash(manifests) if manifests else ''}"


def model_folders(repository: Path) -> tuple[Path, ...]:
    """The folders of the repository's models, in order.

    Raises:
        DeployError: there is no such folder, or no model in it.
    """
    expected = f"a folder with one folder a model, each with its {CONFIG_NAME}"
    if not repository.is_dir():
        found = "a file" if repository.exists() else "nothing"
        raise DeployError(f"{repository} is not a model repository", found=found, expected=expected)
    folders = tuple(sorted(path.parent for path in repository.glob(f"*/{CONFIG_NAME}")))
    if not folders:
        raise DeployError(f"{repository} is not a model repository", found="no model", expected=expected)
    return folders


def _configuration(folder: Path, target: str | None) -> str:
    """The text of what Triton reads under --model-config-name=<target>."""
    own = folder / "configs" / f"{target}.pbtxt"
    path = own if target is not None and own.is_file() else folder / CONFIG_NAME
    return path.read_text(encoding="utf-8")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _checked(kind: type[Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The record, if it has exactly the fields of `kind`, each of its type; an int stands for a float."""
    types = {field.name: str(field.type).removesuffix(" | None") for field in fields(kind)}
    if differing := types.keys() ^ record.keys():
        raise ValueError(f"missing or unknown: {', '.join(sorted(differing))}")
    accepted: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
    for name, value in record.items():
        if value is None and name in _OPTIONAL:
            continue
        known = accepted.get(types[name])
        if known is not None and (not isinstance(value, known) or isinstance(value, bool)):
            raise TypeError(f"{name} is {value!r}")
        if isinstance(value, int | float) and not 0 <= value < _TOO_MUCH:
            raise ValueError(f"{name} is {value!r}")
        if known is None and not isinstance(value, dict | tuple):
            raise TypeError(f"{name} is {value!r}")
    return dict(record)
