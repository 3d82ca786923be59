"""A .pt2 file that tries to run something: every way in that torch.export.load leaves open."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tritonsmith.errors import SourceError
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.ingest.torch import export_torch
from tritonsmith.ingest.torch_archive import load_program

Files = dict[str, bytes]
MODEL = "models/model.json"
SAMPLE = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


class MakeFolder:
    """Makes a folder when it is unpickled: what an attacker would do, made visible."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("honest") / "model.pt2"
    example = (torch.ones(2, 3),)
    shapes = {"input": {0: torch.export.Dim("batch")}}
    program = torch.export.export(torch.nn.Linear(3, 2), example, dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def rewrite(source: Path, target: Path, change: Callable[[Files], None]) -> Path:
    """A copy of an archive with its members changed; names come without the archive's own folder."""
    with zipfile.ZipFile(source) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"model/{name}", content)
    return target


def edit_json(files: Files, name: str, edit: Callable[[Any], None]) -> None:
    document = json.loads(files[name])
    edit(document)
    files[name] = json.dumps(document).encode()


def pickled(path: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(MakeFolder(path), buffer)
    return buffer.getvalue()


def evil_size(files: Files, marker: Path) -> None:
    def edit(document: Any) -> None:
        size = document["graph_module"]["graph"]["tensor_values"]["input"]["sizes"][0]
        size["as_expr"]["expr_str"] = f"__import__('os').mkdir({str(marker)!r}) or Integer(2)"

    edit_json(files, MODEL, edit)


def evil_sample_inputs(files: Files, marker: Path) -> None:
    files[SAMPLE] = pickled(marker)


def evil_weight(files: Files, marker: Path) -> None:
    def edit(document: Any) -> None:
        entry = next(iter(document["config"].values()))
        entry["use_pickle"] = True
        files[f"data/weights/{entry['path_name']}"] = pickled(marker)

    edit_json(files, WEIGHTS, edit)


def evil_constant(files: Files, marker: Path) -> None:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    edit_json(files, CONSTANTS, lambda document: document["config"].update(thing=entry))
    files["data/constants/opaque_obj_0"] = pickle.dumps(MakeFolder(marker))


def evil_import(files: Files, marker: Path) -> None:
    (marker.parent / "evil_module.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    context = json.dumps({"__enum__": True, "fqn": "evil_module:Colour", "name": "RED"})
    spec = json.dumps([1, {"type": "builtins.tuple", "context": context, "children_spec": []}])

    def edit(document: Any) -> None:
        document["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = spec

    edit_json(files, MODEL, edit)


def evil_guard(files: Files, marker: Path) -> None:
    guard = f"__import__('os').mkdir({str(marker)!r}) is None"
    edit_json(files, MODEL, lambda document: document.update(guards_code=[guard]))


ATTACKS = (evil_size, evil_guard, evil_sample_inputs, evil_weight, evil_constant, evil_import)


@pytest.fixture
def attack(
    honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Any], tuple[Path, Path]]:
    """The archive of an attack, and the folder that it makes when it succeeds."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(change: Callable[[Files, Path], None]) -> tuple[Path, Path]:
        marker = tmp_path / "pwned"
        path = rewrite(honest, tmp_path / "evil.pt2", lambda files: change(files, marker))
        return path, marker

    return make


@pytest.mark.parametrize("change", ATTACKS)
def test_nothing_in_a_file_runs(attack: Any, change: Any) -> None:
    path, marker = attack(change)
    with pytest.raises(SourceError, match="--allow-code"):
        load_program(path, allow_code=False)
    assert not marker.exists()


@pytest.mark.parametrize("change", ATTACKS)
def test_the_attacks_are_real(attack: Any, change: Any) -> None:
    path, marker = attack(change)
    with contextlib.suppress(SourceError):  # most break the program, but only after they ran
        export_torch(str(path), path.parent, ConvertOptions(allow_code=True))
    assert marker.exists()


@pytest.mark.parametrize(
    "text", ["__import__('os').mkdir('x')", "L['x'].size().__class__()", "L['\\'\"'] == 1"]
)
def test_a_guard_that_is_no_comparison_is_refused(attack: Any, text: str) -> None:
    def edit(document: Any) -> None:
        document["guards_code"] = [text]

    path, _ = attack(lambda files, _: edit_json(files, MODEL, edit))
    with pytest.raises(SourceError, match="a guard is no comparison"):
        load_program(path, allow_code=False)


def test_a_target_that_is_no_operator_is_refused(attack: Any) -> None:
    def edit(document: Any) -> None:
        document["graph_module"]["graph"]["nodes"][0]["target"] = "torch.hub.load"

    path, _ = attack(lambda files, _: edit_json(files, MODEL, edit))
    with pytest.raises(SourceError, match=r"torch\.hub\.load"):
        load_program(path, allow_code=False)


def test_native_code_is_refused(attack: Any) -> None:
    path, _ = attack(lambda files, _: files.update({"data/aotinductor/model/code.so": b"\x7fELF"}))
    with pytest.raises(SourceError, match="AOTInductor"):
        load_program(path, allow_code=False)


def test_the_format_of_torch_2_7_is_refused(honest: Path, tmp_path: Path) -> None:
    path = rewrite(honest, tmp_path / "old.pt2", lambda files: None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(SourceError, match=r"torch 2\.7"):
        load_program(path, allow_code=False)


class Halving(torch.nn.Module):
    def forward(self, table: torch.Tensor) -> torch.Tensor:
        torch._check(table.shape[1] % 2 == 0)
        return table.reshape(table.shape[0], -1, 2).sum(1)


def test_sizes_and_guards_of_an_honest_file_pass(tmp_path: Path) -> None:
    free = {"table": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    program = torch.export.export(Halving(), (torch.ones(3, 4),), dynamic_shapes=free)
    path = tmp_path / "model.pt2"
    torch.export.save(program, path)
    with zipfile.ZipFile(path) as archive:
        text = archive.read(f"model/{MODEL}").decode()
    assert "expr_str" in text
    assert json.loads(text)["guards_code"]
    load_program(path, allow_code=False)


def test_an_honest_file_is_read(honest: Path, tmp_path: Path) -> None:
    path = rewrite(honest, tmp_path / "copy.pt2", lambda files: None)
    program = load_program(path, allow_code=False)
    assert [str(name) for name in program.graph_signature.user_inputs] == ["input"]
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def truncated(honest: Path) -> bytes:
    return honest.read_bytes()[:-200]


def damaged(honest: Path) -> bytes:
    """The directory is whole, the program's JSON is not."""
    content = bytearray(honest.read_bytes())
    with zipfile.ZipFile(honest) as archive:
        start = archive.getinfo(f"{honest.stem}/{MODEL}").header_offset
    content[start + 200 : start + 400] = bytes(200)
    return bytes(content)


def checkpoint(honest: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer)
    return buffer.getvalue()


def old_checkpoint(honest: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda _: b"", "is empty"),
        (lambda _: b"hello", "no archive"),
        (truncated, "truncated"),
        (damaged, "damaged"),
        (checkpoint, "example inputs"),
        (old_checkpoint, "a pickle"),
    ],
)
def test_a_file_of_another_kind_is_told_apart(
    honest: Path, tmp_path: Path, content: Callable[[Path], bytes], message: str
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(content(honest))
    with pytest.raises(SourceError, match=message):
        load_program(path, allow_code=False)


def test_a_torchscript_archive_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:  # as torch.jit.save lays it out
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl", "version"):
            archive.writestr(f"model/{name}", b"")
    with pytest.raises(SourceError, match="TorchScript"):
        load_program(path, allow_code=True)
