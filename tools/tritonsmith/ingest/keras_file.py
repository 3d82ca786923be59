"""What a Keras file says about itself, read before anything in it is loaded."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonsmith.errors import MissingExtraError, SourceError

HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
ZIP_MAGIC = b"PK"
SUFFIXES = {"hdf5": (".h5", ".hdf5"), "zip": (".keras",)}
MEMBERS = frozenset({"config.json", "metadata.json", "model.weights.h5"})
MIXED_POLICIES = ("mixed_float16", "mixed_bfloat16")

# A configuration may name classes and functions of Keras itself; all else is the user's own code.
KERAS_PACKAGES = ("keras", "tf_keras")
# Parts of Keras that a model's layers have no use for, and that read files or the network.
FOREIGN_PARTS = frozenset({"utils", "saving", "config", "datasets", "export", "preprocessing"})
# Keys that say of a function's configuration that it is marshalled Python.
CODE_TYPES = ("function_type", "output_shape_type", "mask_type", "arguments_type")

Node = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class KerasFile:
    """A Keras file's form, the Keras that wrote it, and the configuration of its model."""

    path: Path
    form: str  # "hdf5" or "zip"
    keras_version: str
    config: Node

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
    if not isinstance(config, dict) or "class_name" not in config:
        raise SourceError(f"{path}: the model's configuration names no class", found=text[:80])
    return KerasFile(path=path, form=form, keras_version=keras_version, config=config)


def refuse_code(file: KerasFile) -> None:
    """Raise SourceError where the configuration holds Python code, as that of a Lambda layer does."""
    for node, layer in _nodes(file.config):
        if kind := _code_in(node):
            raise SourceError(
                f"{file.path} holds Python code, which loading would run",
                found=f"{kind} {layer!r}",
                fix="add --allow-code if you trust whoever made this file",
            )


def refuse_foreign(file: KerasFile, own_names: frozenset[str], custom_names: frozenset[str]) -> None:
    """Raise SourceError where a class or function is neither Keras's nor supplied by the user.

    tf_keras would import whatever module the file names; a file does not get to choose that.
    `own_names` are Keras's own layers, models and functions, for what a file names without a module.
    """
    layers = {id(layer) for node, _ in _nodes(file.config) for layer in _layers_of(node)}
    for node, layer in _nodes(file.config):
        name, module = node.get("class_name"), node.get("module")
        if not isinstance(name, str) or name.startswith("__"):
            continue
        if name == "function" and isinstance(node.get("config"), str):
            name = node["config"]
        registered = str(node.get("registered_name") or "")
        if {name, registered, registered.rpartition(">")[2]} & custom_names:
            continue
        if module == "builtins" and node["class_name"] == "function":
            known = name in own_names
        elif isinstance(module, str):
            known = _is_kerass_own(module)
        else:
            known = name in own_names or not (id(node) in layers or ">" in registered)
        if not known:
            raise SourceError(
                f"{file.path} uses {name!r}, which is not part of Keras",
                found=f"{module}.{name} in layer {layer!r}" if module else f"layer {layer!r}",
                fix="add --custom-objects package.module, naming the Python module that defines it",
            )


def mixed_policy_of(file: KerasFile) -> str | None:
    """The name of the mixed-precision policy that the model was trained under, if there was one."""
    text = json.dumps(file.config)
    return next((policy for policy in MIXED_POLICIES if f'"{policy}"' in text), None)


def copy_in_float32(file: KerasFile, folder: Path) -> Path:
    """A copy of the file whose layers compute in float32 instead of under a mixed-precision policy."""
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
    if path.suffix.lower() not in SUFFIXES[form]:
        raise SourceError(
            f"{path} is not what its name says",
            found="HDF5 content" if form == "hdf5" else "a zip",
            fix=f"if it is a Keras model, rename it to end in {SUFFIXES[form][0]}",
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
            fix="build the model in Python, model.load_weights() this file, then model.save('model.keras')",
        )
    return _text(version), _text(config)


def _read_zip(path: Path) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            if missing := MEMBERS - set(archive.namelist()):
                raise SourceError(
                    f"{path} is a zip, but no Keras model",
                    found=f"no {', '.join(sorted(missing))} in it",
                    fix="save it again with model.save()",
                )
            if broken := archive.testzip():
                raise SourceError(f"{path} is damaged", found=f"a wrong checksum of {broken}")
            metadata = json.loads(archive.read("metadata.json"))
            text = archive.read("config.json").decode()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise SourceError(f"{path} cannot be read as .keras; is it truncated?", found=error) from error
    return str(metadata.get("keras_version", "3")), text


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _code_in(node: Node) -> str | None:
    """The kind of Python code that a node holds itself, marshalled or pickled."""
    name, inner = node.get("class_name"), node.get("config")
    if name == "Lambda" and not (isinstance(inner, dict) and _is_named(inner.get("function"))):
        return "Lambda layer"
    if name == "TorchModuleWrapper":
        return "pickled torch module in layer"
    if name == "__lambda__" or any(node.get(key) == "lambda" for key in CODE_TYPES):
        return "Python lambda in layer"
    return None


def _is_named(function: Any) -> bool:
    """Whether a function is given by its name alone, so that only the user's own code can supply it."""
    return isinstance(function, dict) and function.get("class_name") == "function"


def _is_kerass_own(module: str) -> bool:
    package, *parts = module.split(".")
    return package in (*KERAS_PACKAGES, "builtins") and not FOREIGN_PARTS & set(parts)


def _layers_of(node: Node) -> list[Node]:
    """The layers that a node holds directly: a model's list, a wrapper's `layer`, the root itself."""
    inner = node.get("config")
    if not isinstance(inner, dict):
        return []
    listed = inner.get("layers")
    held = [*listed] if isinstance(listed, list) else []
    held += [inner.get(key) for key in ("layer", "backward_layer", "cell")]
    return [item for item in held if isinstance(item, dict)]


def _nodes(config: Node) -> Iterator[tuple[Node, str | None]]:
    """Every dictionary of a configuration, however deep, with the name of the layer that it is in.

    How the model was compiled is left out at the root: nothing of it is loaded.
    """
    root = {key: value for key, value in config.items() if key != "compile_config"}
    stack: list[tuple[Any, str | None]] = [(root, None)]
    while stack:
        current, layer = stack.pop()
        if isinstance(current, dict):
            inner = current.get("config")
            if "class_name" in current and isinstance(inner, dict) and isinstance(inner.get("name"), str):
                layer = inner["name"]
            yield current, layer
            stack.extend((child, layer) for child in reversed(list(current.values())))
        elif isinstance(current, list):
            stack.extend((child, layer) for child in reversed(current))
