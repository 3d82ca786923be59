"""Builds end to end on scanned digits: what is published, what is refused, and what is left alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from digits_models import conv_model, split_digits, write_samples
from tritonsmith.artifact import sha256_of
from tritonsmith.build import build, build_recipe
from tritonsmith.candidates import Candidate, Goal, choose
from tritonsmith.engines import open_session
from tritonsmith.errors import GateRefused, RepositoryError, SamplesError, TritonsmithError, UsageError
from tritonsmith.gate import GateReport
from tritonsmith.measure import SpeedRatio
from tritonsmith.onnx_model import precision_of
from tritonsmith.recipe import BuildRequest
from tritonsmith.repository.config import config_from_text


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """conv.onnx, calibration.npz and evaluation.npz."""
    folder = tmp_path_factory.mktemp("digits data")
    digits = split_digits()
    onnx.save(conv_model(), str(folder / "conv.onnx"))
    write_samples(folder / "calibration.npz", digits.train_images[:200, None])
    write_samples(folder / "evaluation.npz", digits.test_images[:, None], digits.test_labels)
    return folder


@pytest.fixture
def plain(data: Path, tmp_path: Path) -> BuildRequest:
    return BuildRequest(name="digits", source=str(data / "conv.onnx"), repository=tmp_path / "repository")


@pytest.fixture
def int8(data: Path, plain: BuildRequest) -> BuildRequest:
    return replace(
        plain,
        precision="int8",
        calibration=data / "calibration.npz",
        evaluation=data / "evaluation.npz",
        metric="accuracy",
        max_drop=0.01,
    )


def files_below(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def test_fp32_is_converted_and_published(plain: BuildRequest) -> None:
    report = build(plain)

    folder = plain.repository / "digits"
    assert report.entry.version_folder == folder.resolve() / "1"
    assert sorted(path.name for path in (folder / "1").iterdir()) == ["manifest.json", "model.onnx"]
    config = config_from_text((folder / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("digits", "onnxruntime", 8)
    assert [step.name for step in report.manifest.steps] == ["convert", "simplify"]
    assert [row["name"] for row in report.manifest.candidates] == ["fp32"]
    assert report.manifest.gate is None
    json.dumps(report.json(), allow_nan=False)


def test_int8_inside_the_budget_is_published_with_its_evidence(int8: BuildRequest) -> None:
    report = build(int8)

    model = report.entry.version_folder / "model.onnx"
    assert precision_of(onnx.load(str(model))) == report.manifest.precision == "int8"
    fp32, quantized = report.json()["candidates"]
    assert fp32["bytes"] > 2 * quantized["bytes"] == 2 * model.stat().st_size
    assert (quantized["chosen"], quantized["int8_ops"], quantized["ops"]) == (True, 3, 3)
    assert quantized["speed"]["ratio"] > 0

    digits = split_digits()
    outputs = open_session(model).run({"image": digits.test_images[:, None]})["probabilities"]
    accuracy = (outputs.argmax(axis=1) == digits.test_labels).mean()
    assert report.manifest.gate is not None
    assert report.manifest.gate["candidate"] == pytest.approx(accuracy)
    assert report.manifest.gate["max_drop"] == 0.01
    assert report.manifest.steps[-1].bytes_after == model.stat().st_size


def test_a_rebuild_with_nothing_changed_answers_from_the_manifest(int8: BuildRequest, data: Path) -> None:
    first = build(int8)
    before = files_below(int8.repository)
    moved = int8.repository.parent / "moved.npz"
    shutil.copy(data / "calibration.npz", moved)

    began = time.perf_counter()
    again = build(replace(int8, calibration=moved))
    assert time.perf_counter() - began < 2
    assert again.unchanged
    assert again.json()["candidates"] == first.json()["candidates"]
    assert files_below(int8.repository) == before


@pytest.mark.parametrize("repository", ["file", "file/inside"])
def test_a_repository_that_cannot_be_is_found_before_the_work(
    plain: BuildRequest, tmp_path: Path, repository: str
) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    said: list[str] = []
    with pytest.raises(RepositoryError, match="is a file"):
        build(replace(plain, repository=tmp_path / repository), say=said.append)
    assert not said


def test_an_unchanged_build_imports_no_framework(plain: BuildRequest) -> None:
    build(plain)
    code = f"""
import sys, time
began = time.perf_counter()
from pathlib import Path
from tritonsmith.build import build
from tritonsmith.recipe import BuildRequest
repository = Path({str(plain.repository)!r})
report = build(BuildRequest(name="digits", source={plain.source!r}, repository=repository))
heavy = {{"torch", "tensorflow", "keras", "transformers", "onnxruntime", "openvino"}} & set(sys.modules)
print(report.unchanged, sorted(heavy), time.perf_counter() - began)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unchanged, heavy, seconds = ran.stdout.split()
    assert (unchanged, heavy) == ("True", "[]")
    assert float(seconds) < 2


def test_another_option_or_source_is_a_new_version(plain: BuildRequest, tmp_path: Path) -> None:
    build(plain)
    assert build(replace(plain, max_batch_size=4)).entry.version == 2

    model = onnx.ModelProto()
    model.CopyFrom(conv_model())
    first = model.graph.initializer[0]
    first.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(first) * np.float32(0.9), first.name)
    )
    onnx.save(model, str(tmp_path / "other.onnx"))
    assert build(replace(plain, source=str(tmp_path / "other.onnx"))).entry.version == 3


def test_other_data_is_a_new_version(int8: BuildRequest, tmp_path: Path) -> None:
    build(int8)
    other = write_samples(tmp_path / "other.npz", split_digits().train_images[200:300, None])
    report = build(replace(int8, calibration=other, max_drop=0.5))
    assert (report.unchanged, report.entry.version) == (False, 2)


def test_force_replaces_the_newest_version(plain: BuildRequest) -> None:
    build(plain)
    report = build(replace(plain, force=True))
    assert (report.unchanged, report.entry.version) == (False, 1)


def test_a_published_version_is_refused_before_the_work(plain: BuildRequest) -> None:
    build(plain)
    before = files_below(plain.repository)
    said: list[str] = []
    with pytest.raises(RepositoryError, match="version 1 of 'digits' is published"):
        build(replace(plain, version=1, max_batch_size=2), say=said.append)
    assert said == []
    assert files_below(plain.repository) == before


def test_a_refused_candidate_publishes_nothing_and_says_what_next(int8: BuildRequest) -> None:
    with pytest.raises(GateRefused) as caught:
        build(replace(int8, metric="max-abs-error", max_drop=1e-6))
    message = str(caught.value)
    assert "the accuracy gate refuses int8-static; nothing was published" in message
    assert "max-abs-error 0.0000 ->" in message
    assert "--precision auto" in message
    assert "--max-drop 0." in message
    assert not (int8.repository / "digits").exists()


def test_auto_publishes_the_best_that_passes(int8: BuildRequest) -> None:
    report = build(replace(int8, precision="auto", metric="max-abs-error", max_drop=0.005))
    rows = {row["name"]: row for row in report.json()["candidates"]}

    assert set(rows) == {"fp32", "fp16", "int8-static"}
    assert "is beyond the budget" in rows["int8-static"]["refusal"]
    chosen = [row for row in rows.values() if row["chosen"]]
    assert len(chosen) == 1
    assert chosen[0]["refusal"] is None
    assert report.manifest.precision == chosen[0]["precision"] != "int8"


def test_auto_without_calibration_says_what_it_could_not_try(int8: BuildRequest) -> None:
    report = build(replace(int8, precision="auto", calibration=None))
    rows = {row["name"]: row for row in report.json()["candidates"]}
    assert rows["int8-static"]["refusal"] == "no calibration data: give it with --calibration"
    assert rows["int8-static"]["bytes"] is None


def candidate(name: str, size: int, ratio: float | None, *, drop: float = 0.0) -> Candidate:
    passed = drop <= 0.01
    gate = GateReport(
        metric="accuracy", higher_is_better=True, baseline=0.9, candidate=0.9 - drop, drop=drop,
        ci95_low=drop, ci95_high=drop, samples=100, max_drop=0.01, passed=passed,
        reason="beyond the budget", worst_class=None,
    )  # fmt: skip
    speed = None
    if ratio is not None:
        speed = SpeedRatio(
            ratio=ratio, low=ratio - 0.05, high=ratio + 0.05, rounds=9, baseline_ms=1.0,
            candidate_ms=1 / ratio, batch_size=1,
        )  # fmt: skip
    return Candidate(
        name=name, precision=name.split("-")[0], size_bytes=size, gate=gate, speed=speed,
        refusal=None if passed else gate.reason,
    )  # fmt: skip


GOAL = Goal(
    inference_precision="f32",
    precision="auto", engine="onnxruntime", max_batch_size=8, calibration=None, evaluation=None,
    metric=None, max_drop=0.01,
)  # fmt: skip


def test_int8_that_is_slower_than_fp32_is_not_chosen_under_auto() -> None:
    rows = choose([candidate("fp32", 100, None), candidate("int8-static", 25, 0.8)], GOAL)
    assert [row.chosen for row in rows] == [True, False]
    assert rows[1].refusal == "slower than FP32 on this machine: 0.80 times its speed (0.75 to 0.85)"


def test_auto_takes_the_largest_product_of_speed_and_size() -> None:
    rows = [
        candidate("fp32", 100, None),
        candidate("fp16", 50, 1.1),
        candidate("int8-static", 26, 2.0),
        candidate("int8-dynamic", 25, 3.0, drop=0.02),
    ]
    found = choose(rows, GOAL)
    assert [row.name for row in found if row.chosen] == ["int8-static"]
    assert found[1].refusal == "int8-static gains more in speed times size"
    assert found[3].refusal == "beyond the budget"


def test_int8_asked_for_by_name_is_published_though_slower() -> None:
    rows = [candidate("fp32", 100, None), candidate("int8-static", 25, 0.8)]
    found = choose(rows, replace(GOAL, precision="int8"))
    assert [row.chosen for row in found] == [False, True]


def test_openvino_gets_its_own_format(int8: BuildRequest) -> None:
    report = build(replace(int8, backend="openvino"))

    names = sorted(path.name for path in report.entry.version_folder.iterdir())
    assert names == ["manifest.json", "model.bin", "model.xml"]
    assert report.manifest.steps[-1].name == "save-openvino"
    row = report.json()["candidates"][1]
    assert (row["int8_ops"], row["ops"]) == (3, 3)
    assert row["bytes"] == sum(
        (report.entry.version_folder / name).stat().st_size for name in ("model.bin", "model.xml")
    )
    digits = split_digits()
    session = open_session(report.entry.version_folder / "model.xml", engine="openvino")
    outputs = session.run({"image": digits.test_images[:, None]})["probabilities"]
    assert (outputs.argmax(axis=1) == digits.test_labels).mean() > 0.97


def test_fp16_needs_no_evaluation(plain: BuildRequest) -> None:
    report = build(replace(plain, precision="fp16"))
    assert report.manifest.precision == "fp16"
    assert report.manifest.gate is None
    assert report.manifest.steps[-1].measured["max_absolute_error"] < 0.01


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"precision": "int4"}, "no precision is named 'int4'"),
        ({"backend": "tensorrt"}, "no backend is named 'tensorrt'"),
        ({"precision": "int8"}, "--precision int8 needs an accuracy budget"),
        ({"precision": "auto"}, "--precision auto needs an accuracy budget"),
        ({"metric": "accuracy"}, "--metric and --max-drop need --evaluation"),
        ({"max_batch_size": -1}, "--max-batch-size -1 is negative"),
        ({"evaluation": "evaluation.npz"}, "--evaluation needs --metric"),
        (
            {"evaluation": "evaluation.npz", "metric": "accuracy", "precision": "int8"},
            "--precision int8 needs --max-drop",
        ),
        (
            {"evaluation": "evaluation.npz", "metric": "accuracy", "precision": "int8", "max_drop": 0.01},
            "static INT8 needs calibration data, and none is made up",
        ),
        (
            {"evaluation": "evaluation.npz", "metric": "precision@k", "max_drop": 0.01},
            "no metric is named 'precision'",
        ),
    ],
)
def test_options_that_do_not_fit_are_wrong_usage(
    plain: BuildRequest, data: Path, changes: dict[str, object], what: str
) -> None:
    if "evaluation" in changes:
        changes = {**changes, "evaluation": data / "evaluation.npz"}
    with pytest.raises(UsageError, match=what) as caught:
        build(replace(plain, **changes))  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert not plain.repository.exists()


def test_bad_data_is_refused_and_nothing_is_published(int8: BuildRequest, tmp_path: Path) -> None:
    digits = split_digits()
    bad: list[tuple[BuildRequest, type[TritonsmithError], str]] = [
        (replace(int8, calibration=int8.evaluation), SamplesError, "shares samples"),
        (
            replace(int8, calibration=write_samples(tmp_path / "a.npz", digits.test_images[:50, None])),
            SamplesError,
            "shares samples with the evaluation data",
        ),
        (
            replace(int8, evaluation=write_samples(tmp_path / "b.npz", digits.test_images[:, None])),
            SamplesError,
            "has no labels, and accuracy needs them",
        ),
        (replace(int8, evaluation=tmp_path / "absent.npz"), SamplesError, "is no file"),
        (replace(int8, max_drop=1.0), UsageError, "would let everything pass"),
        (replace(int8, name="../x"), RepositoryError, "cannot name a model"),
    ]
    for request, kind, what in bad:
        with pytest.raises(kind, match=what):
            build(request)
    assert not (int8.repository / "digits").exists()


def test_an_int8_source_is_not_quantized_again(int8: BuildRequest) -> None:
    published = build(int8).entry.version_folder / "model.onnx"
    with pytest.raises(TritonsmithError, match="the source is int8 already"):
        build(replace(int8, name="again", source=str(published)))
    report = build(BuildRequest(name="kept", source=str(published), repository=int8.repository))
    assert report.manifest.precision == "int8"


def test_a_recipe_builds_its_model(data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
[model]
name = "digits"
source = "{data / "conv.onnx"}"
max_batch_size = 16

[config.dynamic_batching]
preferred_batch_size = [8]
"""
    )
    reports = build_recipe(recipe, repository=tmp_path / "repository")
    assert [report.manifest.name for report in reports] == ["digits"]
    text = (tmp_path / "repository" / "digits" / "config.pbtxt").read_text()
    assert list(config_from_text(text).dynamic_batching.preferred_batch_size) == [8]
    assert [report.unchanged for report in build_recipe(recipe, repository=tmp_path / "repository")] == [True]
