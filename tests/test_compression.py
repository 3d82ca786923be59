"""`compress`: a smaller ONNX with its record, written whether it passes or not; wrong input costs nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from digits_models import conv_model, split_digits, write_samples
from tritonsmith.cli import main
from tritonsmith.compress.cost import cost_of
from tritonsmith.compress.steps import Prune, Quantize
from tritonsmith.compression import CompressRequest, compress
from tritonsmith.engines import open_session
from tritonsmith.errors import UsageError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    digits = split_digits()
    onnx.save(conv_model(), str(folder / "conv.onnx"))
    write_samples(folder / "calibration.npz", digits.train_images[:200, None])
    write_samples(folder / "evaluation.npz", digits.test_images[:, None], digits.test_labels)
    return folder


@pytest.fixture(autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONSMITH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def arguments(data: Path, out: Path, *more: str, max_drop: float = 0.02) -> list[str]:
    return [
        *("compress", str(data / "conv.onnx"), "--out", str(out)),
        *("--calibration", str(data / "calibration.npz"), "--evaluation", str(data / "evaluation.npz")),
        *("--metric", "accuracy", "--max-drop", str(max_drop), *more),
    ]


def accuracy(path: Path) -> float:
    digits = split_digits()
    answer = open_session(path).run({"image": digits.test_images[:, None]})["probabilities"]
    return float((answer.argmax(axis=1) == digits.test_labels).mean())


def test_what_is_written_is_what_is_reported(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.onnx"
    assert main(arguments(data, out, "--step", "quantize", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "small.json").read_text())
    assert printed == record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.json", "small.onnx"]
    assert record["bytes"] == out.stat().st_size
    assert record["gate"]["candidate"] == pytest.approx(accuracy(out))
    first, last = record["ledger"]["entries"]
    assert first["parameters"] == last["parameters"]
    assert first["flops"] == last["flops"] == cost_of(data / "conv.onnx").flops
    assert record["ledger"]["product"]["bytes_factor"] == pytest.approx(first["size_bytes"] / record["bytes"])


def test_a_model_that_fails_the_gate_is_written_all_the_same(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.onnx"
    assert main(arguments(data, out, "--step", "prune ratio=0.5 round_to=1", max_drop=0.001)) == 1
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("FAILED")
    assert "beyond the budget of 0.001" in printed
    assert cost_of(out).flops < cost_of(data / "conv.onnx").flops / 2
    assert json.loads((tmp_path / "small.json").read_text())["passed"] is False


def test_steps_from_a_recipe(data: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        f'[model]\nname = "digits"\nsource = "{data / "conv.onnx"}"\n'
        f'[accuracy]\ncalibration = "{data / "calibration.npz"}"\n'
        '[[compress]]\nstep = "quantize"\n'
    )
    out = tmp_path / "small.onnx"
    assert main(["compress", str(tmp_path / "recipe.toml"), "--out", str(out)]) == 0
    assert out.stat().st_size < (data / "conv.onnx").stat().st_size / 2


def test_without_evaluation_nothing_is_judged(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", str(data / "conv.onnx"), "--out", str(tmp_path / "small.onnx")]
    command += ["--calibration", str(data / "calibration.npz"), "--step", "quantize"]
    assert main(command) == 0
    assert "nothing was judged: there is no evaluation data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        ([], 2, "compress needs to know what to do"),
        (["--step", "quantize", "--search"], 2, "steps beside bounds for a search"),
        (["--epochs", "3"], 2, "--epochs without a search"),
        (["--step", "prune flops=0.000001"], 1, "cannot be brought to"),
        (["--step", "prune ratio=0.5 keep=dens"], 1, "dens"),
        (["--step", "quantize", "--step", "prune flops=0.5"], 1, "prune comes after quantize"),
        (["--step", "distill epochs=1 student=missing.h5"], 1, "missing.h5"),
        (["--step", "quantize-weights block=7"], 1, "block"),
        (["--step", "share-rows rows=10"], 1, "table"),
        (["--step", "quantize", "--max-drop", "2"], 2, "would let everything pass"),
        (["--size-at-most", "5 apples"], 1, "is no size"),
    ],
)
def test_wrong_input_writes_nothing(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    code: int,
    message: str,
) -> None:
    assert main(arguments(data, tmp_path / "small.onnx", *more)) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_data_in_two_roles(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = arguments(data, tmp_path / "small.onnx", "--step", "quantize")
    command += ["--training", str(data / "evaluation.npz")]
    assert main(command) == 1
    assert (
        "the training file evaluation.npz shares samples with the evaluation data" in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    out.write_bytes(b"mine")
    request = CompressRequest(source=str(data / "conv.onnx"), out=out, steps=(Prune(flops=0.5),))
    with pytest.raises(UsageError, match="exists"):
        compress(request)
    assert out.read_bytes() == b"mine"


def test_large_weights_lie_in_a_file_named_after_the_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritonsmith.onnx_model.EXTERNAL_DATA_THRESHOLD_BYTES", 2000)
    out = tmp_path / "small.onnx"
    request = CompressRequest(
        source=str(data / "conv.onnx"), out=out, steps=(Quantize(),), calibration=data / "calibration.npz"
    )
    report = compress(request)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.json", "small.onnx", "small.onnx.data"]
    assert accuracy(out) > 0.9
    assert report.passed is None


def test_the_second_run_makes_nothing_again(data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    request = CompressRequest(
        source=str(data / "conv.onnx"),
        out=tmp_path / "small.onnx",
        steps=(Prune(flops=0.5, round_to=1), Quantize()),
        calibration=data / "calibration.npz",
    )
    first = compress(request)
    second = compress(replace(request, force=True), say=said.append)
    assert np.array_equal(first.artifact.path.read_bytes(), second.artifact.path.read_bytes())
    assert sum("was made before" in line for line in said) == 2
