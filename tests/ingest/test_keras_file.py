"""What is refused in a Keras file before anything of it is loaded; no framework is needed."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import pytest

from tritonsmith.errors import SourceError
from tritonsmith.ingest.keras_file import (
    copy_in_float32,
    mixed_policy_of,
    read_keras_file,
    refuse_code,
    refuse_foreign,
)

OWN = frozenset({"relu", "Sequential", "Functional", "InputLayer", "Dense", "TimeDistributed", "Lambda"})


def node(class_name: str, name: str = "layer", **more: Any) -> dict[str, Any]:
    return {"class_name": class_name, "config": {"name": name, **more}, "module": "keras.layers"}


def sequential(*layers: dict[str, Any]) -> dict[str, Any]:
    return node("Sequential", "net", layers=list(layers))


def write_zip(path: Path, config: Any, version: str = "3.15.1") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", config if isinstance(config, str) else json.dumps(config))
        archive.writestr("metadata.json", json.dumps({"keras_version": version}))
        archive.writestr("model.weights.h5", b"weights")
    return path


def write_hdf5(path: Path, config: Any, version: str | None = "2.15.0") -> Path:
    with h5py.File(path, "w") as stream:
        stream.attrs["model_config"] = json.dumps(config)
        if version:
            stream.attrs["keras_version"] = version
    return path


@pytest.mark.parametrize(("version", "is_keras_2"), [("3.15.1", False), ("2.15.0", True), ("2.2.4-tf", True)])
def test_version_is_read_from_both_forms(tmp_path: Path, version: str, is_keras_2: bool) -> None:
    for file in (
        write_zip(tmp_path / "a.keras", sequential(), version),
        write_hdf5(tmp_path / "a.h5", sequential(), version),
    ):
        read = read_keras_file(file)
        assert (read.keras_version, read.is_keras_2) == (version, is_keras_2)
        assert read.config["class_name"] == "Sequential"


def test_hdf5_without_a_version_is_keras_2(tmp_path: Path) -> None:
    assert read_keras_file(write_hdf5(tmp_path / "a.h5", sequential(), None)).is_keras_2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.h5", b"", "is empty"),
        ("a.keras", b"", "is empty"),
        ("a.h5", b"\x89PNG\r\n\x1a\n rest of a picture", "no Keras model"),
        ("a.keras", b"just text", "no Keras model"),
        ("a.keras", b"PK\x03\x04 and then nothing", "is it truncated"),
        ("a.h5", b"\x89HDF\r\n\x1a\n and then nothing", "is it truncated"),
        ("a.keras", b"\x89HDF\r\n\x1a\n", "not what its name says"),
        ("a.h5", b"PK\x03\x04", "not what its name says"),
    ],
)
def test_wrong_content_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_keras_file(tmp_path / name)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no file"):
        read_keras_file(tmp_path / "absent.h5")


def test_another_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    with pytest.raises(SourceError, match="a zip, but no Keras model"):
        read_keras_file(tmp_path / "a.keras")


def test_damaged_member_is_refused(tmp_path: Path) -> None:
    file = write_zip(tmp_path / "a.keras", sequential())
    file.write_bytes(file.read_bytes().replace(b"weights", b"WEIGHTS", 1))
    with pytest.raises(SourceError, match=r"is damaged|is it truncated"):
        read_keras_file(file)


@pytest.mark.parametrize("config", ["no json", "[]", '{"layers": []}'])
def test_broken_configuration_is_refused(tmp_path: Path, config: str) -> None:
    with pytest.raises(SourceError, match="the model's configuration"):
        read_keras_file(write_zip(tmp_path / "a.keras", config))


def test_weights_alone_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.weights.h5", "w") as stream:
        stream["layers/dense/vars/0"] = [1.0]
    with pytest.raises(SourceError, match="holds no model") as caught:
        read_keras_file(tmp_path / "a.weights.h5")
    assert caught.value.found == "weights alone"
    assert "load_weights" in str(caught.value.fix)


CODE = {
    "Lambda layer 'trick'": sequential(node("Dense"), sequential(node("Lambda", "trick"))),
    "Lambda layer 'old'": sequential(node("Lambda", "old", function=["bWFyc2hhbA==", None, None])),
    "Python lambda in layer 'dense'": sequential(
        node("Dense", "dense", activation={"class_name": "__lambda__", "config": {"value": "code"}})
    ),
    "Python lambda in layer 'wrapped'": sequential(node("Dense", "wrapped", function_type="lambda")),
    "pickled torch module in layer 'torch'": sequential(
        node("TimeDistributed", "outer", layer=node("TorchModuleWrapper", "torch"))
    ),
}


@pytest.mark.parametrize("found", CODE)
def test_code_is_refused_however_deep(tmp_path: Path, found: str) -> None:
    file = read_keras_file(write_zip(tmp_path / "a.keras", CODE[found]))
    with pytest.raises(SourceError, match="holds Python code") as caught:
        refuse_code(file)
    assert caught.value.found == found
    assert "--allow-code" in str(caught.value.fix)


def test_compiled_loss_is_no_code_of_the_model(tmp_path: Path) -> None:
    config = {**sequential(), "compile_config": {"loss": {"class_name": "__lambda__", "config": {}}}}
    refuse_code(read_keras_file(write_zip(tmp_path / "a.keras", config)))


def function(module: str | None, name: str) -> dict[str, Any]:
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


FOREIGN = {
    "named": sequential(node("Lambda", function=function("builtins", "named"))),
    "system": sequential({"class_name": "system", "module": "os", "config": {"name": "x"}}),
    "exec": sequential(node("Dense", activation=function("builtins", "exec"))),
    "get_file": sequential(node("Dense", activation=function("keras.utils", "get_file"))),
    "Mine": sequential({"class_name": "Mine", "module": None, "config": {}, "registered_name": "pack>Mine"}),
    "Legacy": {"class_name": "Sequential", "config": {"layers": [{"class_name": "Legacy", "config": {}}]}},
    "Wrapped": {
        "class_name": "Sequential",
        "config": {
            "layers": [{"class_name": "TimeDistributed", "config": {"layer": {"class_name": "Wrapped"}}}]
        },
    },
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_class_is_refused_unless_it_is_supplied(tmp_path: Path, name: str) -> None:
    file = read_keras_file(write_zip(tmp_path / "a.keras", FOREIGN[name]))
    refuse_code(file)
    with pytest.raises(SourceError, match=f"uses '{name}', which is not part of Keras") as caught:
        refuse_foreign(file, OWN, frozenset())
    assert "--custom-objects" in str(caught.value.fix)
    refuse_foreign(file, OWN, frozenset({name}))


def test_kerass_own_classes_are_taken(tmp_path: Path) -> None:
    config = sequential(
        node("Dense", activation=function("builtins", "relu"), kernel_initializer=node("GlorotUniform")),
        {"class_name": "Dense", "config": {"kernel_initializer": {"class_name": "Zeros", "config": {}}}},
    )
    refuse_foreign(read_keras_file(write_zip(tmp_path / "a.keras", config)), OWN, frozenset())


@pytest.mark.parametrize("write", [write_zip, write_hdf5])
def test_mixed_precision_is_found_and_replaced(tmp_path: Path, write: Any) -> None:
    suffix = ".keras" if write is write_zip else ".h5"
    policy = {"class_name": "DTypePolicy", "module": "keras", "config": {"name": "mixed_float16"}}
    file = read_keras_file(write(tmp_path / f"a{suffix}", sequential(node("Dense", dtype=policy))))
    assert mixed_policy_of(file) == "mixed_float16"

    copy = read_keras_file(copy_in_float32(file, tmp_path))

    assert mixed_policy_of(copy) is None
    assert copy.config["config"]["layers"][0]["config"]["dtype"]["config"] == {"name": "float32"}
    assert mixed_policy_of(read_keras_file(file.path)) == "mixed_float16"
