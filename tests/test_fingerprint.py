"""What counts as a change: here the code that a user names, which is found and hashed, never imported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from onnx_models import linear_model, write_model
from tritonsmith.errors import UsageError
from tritonsmith.fingerprint import fingerprint_of
from tritonsmith.ingest.source import ConvertOptions
from tritonsmith.recipe import BuildRequest


@pytest.fixture
def request_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildRequest:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = write_model(tmp_path / "m.onnx", linear_model())
    return BuildRequest(name="m", source=str(source), repository=tmp_path / "repository")


@pytest.mark.parametrize("marked", [True, False])
def test_every_file_of_a_named_package_counts(
    request_here: BuildRequest, tmp_path: Path, *, marked: bool
) -> None:
    name = f"fingerprinted_{marked}"
    package = tmp_path / name
    package.mkdir()
    if marked:  # without __init__.py it is a namespace package, which can be imported as well
        (package / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    (package / "score.py").write_text("from . import layers\n")
    (package / "layers.py").write_text("SIZE = 1\n")
    requests = (
        replace(request_here, metric=f"{name}.score:score"),
        replace(request_here, convert=ConvertOptions(custom_objects=f"{name}.score")),
    )
    before = [fingerprint_of(request, arithmetic={}) for request in requests]
    assert before == [fingerprint_of(request, arithmetic={}) for request in requests]
    (package / "layers.py").write_text("SIZE = 2\n")
    after = [fingerprint_of(request, arithmetic={}) for request in requests]
    assert not set(before) & set(after)


def test_an_output_with_a_colon_names_no_module(request_here: BuildRequest) -> None:
    assert fingerprint_of(replace(request_here, metric="accuracy@output:0"), arithmetic={})


@pytest.mark.parametrize("metric", ["absent_metric:score", ":score"])
def test_a_module_that_is_not_there(request_here: BuildRequest, metric: str) -> None:
    with pytest.raises(UsageError, match="no Python module is named"):
        fingerprint_of(replace(request_here, metric=metric), arithmetic={})
