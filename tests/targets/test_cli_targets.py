"""build --target and --defer on the command line: what is printed, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onnx_models import linear_model, write_model
from tritonsmith.cli import main


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("tritonsmith.build.step_store", lambda: tmp_path / "cache" / "steps")
    monkeypatch.setattr("tritonsmith.build.plan_cache", lambda: tmp_path / "cache" / "plans")
    source = write_model(tmp_path / "m.onnx", linear_model())
    return ["build", str(source), "--name", "m", "--repository", str(tmp_path / "repository")]


def test_what_to_run_next_is_told(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--target", "tensorrt", "--defer"]) == 0
    out = capsys.readouterr().out
    assert f"tritonsmith plans {command[-1]} --target tensorrt" in out
    assert main([*command, "--target", "tensorrt", "--defer", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["unchanged"] is True
    (target,) = told["targets"]
    assert (target["name"], target["config"], target["deferred"]) == (
        "tensorrt",
        "configs/tensorrt.pbtxt",
        True,
    )


def test_what_is_missing_is_said(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--target", "tensorrt"]) == 1
    told = capsys.readouterr().err
    assert "cannot be built on this machine" in told
    assert "--defer" in told


@pytest.mark.parametrize("flags", [["--target", "gpu"], ["--defer"]])
def test_wrong_usage(command: list[str], flags: list[str]) -> None:
    assert main([*command, *flags]) == 2


def test_a_recipe_with_targets(command: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[model]\nname = "m"\nsource = "m.onnx"\n'
        '[target.gpu]\nbackend = "tensorrt"\n[target.same]\nbackend = "onnxruntime"\n'
    )
    build = ["build", str(recipe), *command[-2:]]
    configs = tmp_path / "repository" / "m" / "configs"
    assert main([*build, "--target", "same"]) == 0
    assert [path.name for path in configs.iterdir()] == ["same.pbtxt"]
    assert main([*build, "--defer"]) == 0
    assert sorted(path.name for path in configs.iterdir()) == ["gpu.pbtxt", "same.pbtxt"]
    assert main([*build, "--target", "tpu"]) == 2
