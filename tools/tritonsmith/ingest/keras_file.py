"""What a Keras file says about itself, read before anything in it is loaded."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonsmith.artifact import Json
from tritonsmith.errors import MissingExtraError, SourceError

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
ZIP_MAGIC = b"PK"
MIXED_POLICIES = ("mixed_float16", "mixed_bfloat16")
SUFFIXES = {"hdf5": (".h5", ".hdf5"), "zip": (".keras",)}

# Where Keras's own classes live; anything else is code of the user's, which only the user may name.
KERAS_PACKAGES = ("keras", "tf_keras", "keras_core")


@dataclass(frozen=True, slots=True, kw_only=True)
class KerasFile:
    """A Keras file's form, the Keras that wrote it, and the configuration of its model."""

    path: Path
    form: str  # "hdf5" or "zip"
    keras_version: str
    config: Json

    @property
    def is_keras_2(self) -> bool:
        return not self.keras_version.startswith("3")


def read_keras_file(path: Path) -> KerasFile:
    """Read the configuration of a `.h5` or `.keras` file; nothing in it is run.

    Raises:
        SourceError: the file is missing, empty, truncated, of another type, or holds weights alone.
    """
    form = _form_of(path)
    keras_version, text = _read_hdf5(path) if form == "hdf5" else _read_zip(path)
    try:
        config = json.loads(text)
    except ValueError as error:
        raise SourceError(f"{path}: the model's configuration is not JSON", found=error) from error
    return KerasFile(path=path, form=form, keras_version=keras_version, config=config)


def refuse_code(file: KerasFile) -> None:
    """Raise SourceError where the configuration holds Python code: a Lambda layer or a pickled lambda."""
    for node, layer in _nodes(file.config):
        marshalled = node.get("class_name") == "__lambda__" or "lambda" in (
            node.get("function_type"),
            node.get("output_shape_type"),
            node.get("mask_type"),
        )
        if node.get("class_name") == "Lambda" or marshalled:
            kind = "Lambda layer" if node.get("class_name") == "Lambda" else "Python lambda in layer"
            raise SourceError(
                f"{file.path} holds Python code, which loading would run",
                found=f"{kind} {layer or 'without a name'!r}",
                fix="add --allow-code if you trust whoever made this file",
            )


def refuse_unknown_classes(file: KerasFile, custom_names: frozenset[str]) -> None:
    """Raise SourceError where the configuration names a class that is neither Keras's nor supplied.

    Keras would import the module that the file names; a file does not get to choose that.
    """
    for node, layer in _nodes(file.config):
        module, name = node.get("module"), node.get("class_name")
        if not isinstance(module, str) or not isinstance(name, str):
            continue
        if module == "builtins" or module.partition(".")[0] in KERAS_PACKAGES:
            continue
        registered = str(node.get("registered_name") or "")
        if not {name, registered, registered.rpartition(">")[2]} & custom_names:
            raise custom_class_error(file.path, f"{module}.{name}", layer, module=module)


def custom_class_error(path: Path, name: str, layer: str | None, *, module: str | None) -> SourceError:
    return SourceError(
        f"{path} uses the class {name}, which is not part of Keras",
        found=f"in layer {layer!r}" if layer else None,
        fix=f"add --custom-objects package.module, naming the module that defines it"
        + (f" (the file says {module})" if module else ""),
    )


def mixed_policy_of(file: KerasFile) -> str | None:
    """The name of the mixed-precision policy that the model was trained under, if there was one."""
    text = json.dumps(file.config)
    return next((policy for policy in MIXED_POLICIES if f'"{policy}"' in text), None)


def copy_in_float32(file: KerasFile, folder: Path) -> Path:
    """A copy whose layers compute in float32 instead of under a mixed-precision policy."""
    import shutil

    text = json.dumps(file.config)
    for policy in MIXED_POLICIES:
        text = text.replace(f'"{policy}"', '"float32"')
    copy = folder / f"float32{file.path.suffix}"
    if file.form == "zip":
        with zipfile.ZipFile(file.path) as old, zipfile.ZipFile(copy, "w") as new:
            for entry in old.infolist():
                new.writestr(entry, text if entry.filename == "config.json" else old.read(entry))
        return copy
    import h5py

    shutil.copyfile(file.path, copy)
    with h5py.File(copy, "r+") as stream:
        stream.attrs["model_config"] = text.encode()
    return copy


def _form_of(path: Path) -> str:
    if not path.is_file():
        raise SourceError(f"{path} is no file", expected="a Keras model, .h5 or .keras")
    with path.open("rb") as stream:
        head = stream.read(len(HDF5_MAGIC))
    if not head:
        raise SourceError(f"{path} is empty", expected="a Keras model, .h5 or .keras")
    form = "hdf5" if head == HDF5_MAGIC else "zip" if head.startswith(ZIP_MAGIC) else None
    if form is None:
        raise SourceError(
            f"{path} is no Keras model",
            found=f"a file that starts with {head!r}",
            expected="HDF5 (.h5) or a zip (.keras)",
        )
    if path.suffix not in SUFFIXES[form]:
        raise SourceError(
            f"{path} is not what its name says",
            found="HDF5 content" if form == "hdf5" else "a zip",
            fix=f"rename it to end in {SUFFIXES[form][0]}, if it is a Keras model",
        )
    return form


def _read_hdf5(path: Path) -> tuple[str, str]:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError(f"cannot read {path}", package="h5py", extra="keras") from error
    try:
        with h5py.File(path, "r") as stream:
            config = stream.attrs.get("model_config")
            version = stream.attrs.get("keras_version", "2")
            members = sorted(stream)
    except (OSError, RuntimeError, KeyError) as error:
        raise SourceError(f"{path} cannot be read as HDF5; is it truncated?", found=error) from error
    if config is None:
        raise SourceError(
            f"{path} holds no model",
            found="weights alone" if members else "an HDF5 file with nothing in it",
            expected="the attribute 'model_config', which model.save() writes",
            fix="build the model in Python, model.load_weights(...) this file, then model.save('model.keras')",
        )
    return _text(version), _text(config)


def _read_zip(path: Path) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            if missing := {"config.json", "metadata.json", "model.weights.h5"} - names:
                raise SourceError(
                    f"{path} is a zip, but no Keras model",
                    found=f"no {', '.join(sorted(missing))} in it",
                    fix="save it again with model.save()",
                )
            if broken := archive.testzip():
                raise SourceError(f"{path} is damaged", found=f"a wrong checksum of {broken}")
            metadata = json.loads(archive.read("metadata.json"))
            return str(metadata.get("keras_version", "3")), archive.read("config.json").decode()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as .keras; is it truncated?", found=error) from error


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _nodes(value: Json, layer: str | None = None) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Every dictionary of a configuration, however deep, with the name of the layer that it is in."""
    stack = [(value, layer)]
    while stack:
        current, name = stack.pop()
        if isinstance(current, dict):
            inner = current.get("config")
            if "class_name" in current and isinstance(inner, dict) and isinstance(inner.get("name"), str):
                name = inner["name"]
            yield current, name
            stack.extend((child, name) for child in reversed(list(current.values())))
        elif isinstance(current, list):
            stack.extend((child, name) for child in reversed(current))
