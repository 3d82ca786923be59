"""ONNX files against the configuration and the container's ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from linted import LINEAR, add_linear, findings_of, only, quantized
from onnx_models import linear_model, model_from_text
from tritonsmith import onnx_model

ACCELERATED = """
optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" } } }
"""


@pytest.mark.parametrize(
    ("config", "words", "advice"),
    [
        (LINEAR.replace("dims: [4]", "dims: [1, 4]"), "do not fit", "leave the batch axis out"),
        (LINEAR.replace("dims: [4]", "dims: [-1, 4]"), "do not fit", "leave the batch axis out"),
        (LINEAR.replace("dims: [4]", "dims: [5]"), "do not fit", ""),
        (LINEAR.replace("dims: [4]", "dims: [-1]"), "do not fit", ""),
        (LINEAR.replace("dims: [3]", "dims: [-1]"), "do not fit", ""),
        (LINEAR.replace("FP32 dims: [4]", "FP16 dims: [4]"), "another data type", ""),
        (LINEAR.replace('"scores"', '"Scores"'), "has no output 'Scores'", ""),
    ],
)
def test_a_tensor_that_differs_from_the_file(tmp_path: Path, config: str, words: str, advice: str) -> None:
    add_linear(tmp_path, config=config)
    finding = only(findings_of(tmp_path))
    assert (finding.severity, finding.place) == ("error", "config.pbtxt")
    assert words in finding.what
    assert advice in (finding.fix or "")


def test_a_batch_axis_that_the_file_has_not(tmp_path: Path) -> None:
    add_linear(tmp_path, model=linear_model(batch=1))
    found = findings_of(tmp_path)
    assert {finding.severity for finding in found} == {"error"}
    assert all("no batch axis" in finding.what for finding in found)
    assert len(found) == 2  # the input and the output


def test_dims_are_the_whole_shape_without_max_batch_size(tmp_path: Path) -> None:
    whole = LINEAR.replace("max_batch_size: 4", "max_batch_size: 0")
    add_linear(
        tmp_path, config=whole.replace("[4]", "[1, 4]").replace("[3]", "[1, 3]"), model=linear_model(batch=1)
    )
    assert findings_of(tmp_path) == ()
    add_linear(tmp_path, config=whole, model=linear_model(batch=1))
    assert all("write the whole shape" in str(finding.fix) for finding in findings_of(tmp_path))


def test_an_input_that_nobody_gives(tmp_path: Path) -> None:
    model = model_from_text(
        "sum (float[N, 4] features, float[N, 4] more) => (float[N, 4] scores) "
        "{ scores = Add(features, more) }"
    )
    add_linear(tmp_path, config=LINEAR.replace("[3]", "[4]"), model=model)
    assert "'more'" in only(findings_of(tmp_path)).what


@pytest.mark.parametrize(
    ("versions", "container", "words"),
    [
        ({"opset": 22, "ir_version": 10}, "24.10", "the opset is newer"),
        ({"opset": 21, "ir_version": 11}, "24.10", "the IR version is newer"),
        ({"opset": 22, "ir_version": 10}, "26.07", None),
    ],
)
def test_opset_and_ir_version_against_a_container(
    tmp_path: Path, versions: dict[str, int], container: str, words: str | None
) -> None:
    add_linear(tmp_path, model=linear_model(**versions))
    errors = [finding for finding in findings_of(tmp_path, container=container) if finding.model]
    assert (errors == []) if words is None else (words in only(errors).what)
    assert findings_of(tmp_path) == ()


def test_a_container_whose_runtime_is_not_known_is_not_guessed_about(tmp_path: Path) -> None:
    add_linear(tmp_path)
    finding = only(findings_of(tmp_path, container="26.09"))
    assert finding.severity == "warning"
    assert "not known" in finding.what


@pytest.mark.parametrize(
    ("model", "accelerated", "wrong"),
    [
        (quantized("uint8"), True, True),
        (quantized("uint8", named=False), True, True),  # ONNX's default type of a zero point
        (quantized("int8"), True, False),
        (quantized("uint8"), False, False),
    ],
)
def test_the_dialect_of_int8_against_the_engine(
    tmp_path: Path, model: onnx.ModelProto, accelerated: bool, wrong: bool
) -> None:
    add_linear(tmp_path, config=LINEAR + (ACCELERATED if accelerated else ""), model=model)
    found = findings_of(tmp_path)
    assert ("uint8" in only(found).what) if wrong else (found == ())


def test_weights_outside_of_the_file_that_are_missing(tmp_path: Path) -> None:
    folder = add_linear(tmp_path)
    model = linear_model()
    onnx.external_data_helper.convert_model_to_external_data(model, location="weights", size_threshold=0)
    onnx.save(model, str(folder / "1" / "model.onnx"))
    assert findings_of(tmp_path) == ()
    (folder / "1" / "weights").unlink()
    assert "missing" in only(findings_of(tmp_path)).what


def test_a_file_that_is_no_onnx(tmp_path: Path) -> None:
    folder = add_linear(tmp_path)
    (folder / "1" / "model.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "cannot be read as ONNX" in only(findings_of(tmp_path)).what


def test_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_linear(tmp_path)
    asked: list[bool] = []
    real = onnx_model.load_model

    def load(path: Path, *, with_weights: bool = True) -> onnx.ModelProto:
        asked.append(with_weights)
        return real(path, with_weights=with_weights)

    monkeypatch.setattr(onnx_model, "load_model", load)
    findings_of(tmp_path)
    assert asked
    assert not any(asked)
