"""Which reader a source goes to, and what is said of files that are not what they are called."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from onnx_models import linear_model, write_model
from tritonsmith.artifact import sha256_of
from tritonsmith.errors import SourceError, UsageError
from tritonsmith.ingest import convert, source_bytes, source_sha256
from tritonsmith.ingest.detect import describe_file, detect_kind


def make_hdf5(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros(3)
    return path


def make_zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "{}")
    return path


KERAS = ("metadata.json", "config.json", "model.weights.h5")
PT2 = ("model/models/model.json", "model/archive_format", "model/version")
OLD_PT2 = ("serialized_exported_program.json", "serialized_state_dict.pt", "version")
CHECKPOINT = ("model/data.pkl", "model/version", "model/data/0")
SCRIPT = ("model/data.pkl", "model/constants.pkl", "model/code/x.py")


@pytest.mark.parametrize(
    ("name", "members", "kind"),
    [
        ("m.keras", KERAS, "keras"),
        ("m.KERAS", KERAS, "keras"),
        ("m.pt2", PT2, "torch"),
        ("m.pt2", OLD_PT2, "torch"),
        ("model", PT2, "torch"),
        ("model.bin", KERAS, "keras"),
    ],
)
def test_an_archive_goes_to_its_reader(
    tmp_path: Path, name: str, members: tuple[str, ...], kind: str
) -> None:
    assert detect_kind(str(make_zip(tmp_path / name, *members))) == kind


def test_hdf5_and_onnx_go_to_their_readers(tmp_path: Path) -> None:
    assert detect_kind(str(make_hdf5(tmp_path / "m.h5"))) == "keras"
    assert detect_kind(str(make_hdf5(tmp_path / "m.hdf5"))) == "keras"
    assert detect_kind(str(make_hdf5(tmp_path / "old.keras"))) == "keras"
    assert detect_kind(str(write_model(tmp_path / "m.onnx", linear_model()))) == "onnx"
    assert detect_kind(str(write_model(tmp_path / "model", linear_model()))) == "onnx"


def test_folders_go_to_their_readers(tmp_path: Path) -> None:
    saved, hub = tmp_path / "saved", tmp_path / "hub"
    saved.mkdir()
    (saved / "saved_model.pb").write_bytes(b"\x08\x01")
    hub.mkdir()
    (hub / "config.json").write_text("{}")
    assert detect_kind(str(saved)) == "saved-model"
    assert detect_kind(str(hub)) == "huggingface"


def test_a_factory_is_told_from_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert detect_kind("my_package.models:make_model") == "torch-factory"
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "odd:name", linear_model())
    assert detect_kind("odd:name") == "onnx"


@pytest.mark.parametrize("source", ["absent.onnx", "no/such:thing", "two:colons:here", "package.module:", ""])
def test_what_is_not_there_is_refused_with_what_is_read(source: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        detect_kind(source if not source or ":" in source else str(tmp_path / source))
    assert ".keras" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "members", "words"),
    [
        ("m.keras", PT2, "a torch.export archive"),
        ("m.onnx", KERAS, "a Keras 3 archive"),
        ("m.pt2", CHECKPOINT, "a PyTorch checkpoint (a pickle)"),
        ("m.pth", CHECKPOINT, "a PyTorch checkpoint (a pickle)"),
        ("m.pt", SCRIPT, "a TorchScript archive"),
        ("m.h5", ("x.npy",), "a NumPy .npz archive"),
        ("m.zip", ("readme",), "a zip archive"),
    ],
)
def test_another_archive_is_named_for_what_it_is(
    tmp_path: Path, name: str, members: tuple[str, ...], words: str
) -> None:
    with pytest.raises(SourceError, match="cannot be converted") as caught:
        detect_kind(str(make_zip(tmp_path / name, *members)))
    assert caught.value.found == words


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"x,y\n1,2\n", "a text file"),
        ("Gr\u00fc\u00dfe ".encode() * 800, "a text file"),
        (b"\x80\x04\x95\x00\x00", "a Python pickle"),
        (gzip.compress(b"model"), "a gzip archive"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"PK\x03\x04" + bytes(30), "a truncated or damaged zip archive"),
        (b"\x18\x00\x00\x00TFL3" + bytes(30), "a TensorFlow Lite model"),
        (
            b'\x08\x00\x00\x00\x00\x00\x00\x00{"w":{}}' + bytes(8),
            "a safetensors file without its config.json",
        ),
        (bytes(40), "an unknown binary file"),
    ],
)
@pytest.mark.parametrize("suffix", [".h5", ".keras", ".pt2", ".onnx", ".bin"])
def test_other_files_are_named_for_what_they_are(
    tmp_path: Path, content: bytes, words: str, suffix: str
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    assert describe_file(path) == words
    with pytest.raises(SourceError) as caught:
        detect_kind(str(path))
    assert (caught.value.found, str(path) in caught.value.what) == (words, True)


def test_a_file_under_the_suffix_of_another_kind_is_told_its_own(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        detect_kind(str(make_hdf5(tmp_path / "m.onnx")))
    assert (caught.value.found, caught.value.fix) == ("an HDF5 file", "rename it to *.h5")


def test_other_folders_are_told_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SourceError, match="no known kind") as caught:
        detect_kind(str(tmp_path))
    assert caught.value.found == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no known kind") as caught:
        detect_kind(str(tmp_path / "empty"))
    assert caught.value.found == "an empty folder"


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "m.onnx", linear_model())

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root reads everything, so the mode bits prove nothing
    with pytest.raises(SourceError, match="cannot be read"):
        detect_kind(str(path))


def test_the_target_is_checked_before_the_source_is_read(tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_bytes(b"before")
    with pytest.raises(UsageError, match="exists"):
        convert(str(tmp_path / "absent.h5"), tmp_path / "out.onnx")


def test_the_steps_are_told(tmp_path: Path) -> None:
    said: list[str] = []
    source = write_model(tmp_path / "m.onnx", linear_model())
    convert(str(source), tmp_path / "out.onnx", say=said.append)
    assert said[0] == f"reading {source} (onnx)"
    assert len(said) == 3


def test_a_source_is_hashed_and_sized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_model(tmp_path / "m.onnx", linear_model())
    assert source_sha256(str(source)) == sha256_of(source)
    assert source_bytes(str(source)) == source.stat().st_size
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "hashed_factory.py"
    module.write_text("def make(): ...\n")
    first = source_sha256("hashed_factory:make")
    assert source_bytes("hashed_factory:make") == 16
    assert source_sha256("hashed_factory:other") != first
    module.write_text("def make(): pass\n")
    assert source_sha256("hashed_factory:make") != first
    with pytest.raises(SourceError, match="no Python module is named 'absent_factory'"):
        source_sha256("absent_factory:make")
