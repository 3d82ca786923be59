"""The verb: exit codes, what is printed where, and how long it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from linted import DOUBLE, add_double, add_linear
from tritonsmith.cli import main

MODEL_REPOSITORY = Path(__file__).parents[2] / "model_repository"


def test_a_right_repository_is_0_and_warnings_are_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_double(tmp_path)
    assert main(["lint", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"0 errors, 0 warnings in {tmp_path}\n"
    assert main(["lint", str(tmp_path), "--for-container", "26.06"]) == 0
    assert "warning: container 26.06 has known vulnerabilities" in capsys.readouterr().out


def test_an_error_is_1_and_says_where_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = add_double(
        tmp_path, config=DOUBLE.replace("max_batch_size: 4", "max_batch_size: 0") + "dynamic_batching { }"
    )
    assert main(["lint", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("error: double/config.pbtxt: ")
    assert "\n  found: " in out
    assert "\n  to do: " in out
    assert out.endswith(f"1 errors, 0 warnings in {tmp_path}\n")
    assert folder.is_dir()


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_double(tmp_path, config=DOUBLE.replace("[3]", "[0]", 1))
    assert main(["lint", str(tmp_path), "--json", "--for-container", "26.07", "--gpu", "H100"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["errors"], said["warnings"], said["gpu"], said["container"]) == (1, 0, "9.0", "26.07")
    finding = said["findings"][0]
    assert (finding["model"], finding["place"]) == ("double", "config.pbtxt")
    assert set(finding) == {"severity", "model", "place", "what", "found", "expected", "fix"}


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [("--for-container", "23.01", "26.07"), ("--gpu", "voodoo", "h100"), ("--target", "gpu", "configs/")],
)
def test_wrong_usage_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, words: str
) -> None:
    add_double(tmp_path)
    assert main(["lint", str(tmp_path), flag, value]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


def test_no_framework_is_imported(tmp_path: Path) -> None:
    add_linear(tmp_path)
    heavy = {"torch", "tensorflow", "keras", "onnxruntime", "openvino", "transformers"}
    code = (
        "import sys; from tritonsmith.cli import main; "
        f"main(['lint', {str(tmp_path)!r}, '--for-container', '26.07']); "
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_is_committed_of_model_repository_is_right() -> None:
    """Its weights may be built or not; `make check` says the same."""
    assert main(["lint", str(MODEL_REPOSITORY), "--configs-only", "--for-container", "26.07"]) == 0
