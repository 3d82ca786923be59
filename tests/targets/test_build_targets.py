"""Builds with further targets: what lies beside the default, what is judged, and what is left alone."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from digits_models import mlp_model, split_digits, write_samples
from onnx_models import embedding_model, write_model
from plan_orders import OnnxTools
from tritonsmith.artifact import sha256_of
from tritonsmith.build import BuildReport, build
from tritonsmith.client import Client
from tritonsmith.compress.steps import Quantize, QuantizeWeights, Sparsify
from tritonsmith.engines.tensorrt.options import AxisRange, PlanOptions, Profile
from tritonsmith.errors import (
    GateRefused,
    PlanError,
    RecipeError,
    RepositoryError,
    UsageError,
)
from tritonsmith.onnx_model import precision_of
from tritonsmith.recipe import BuildRequest
from tritonsmith.repository.entry import read_config
from tritonsmith.server import ServerOptions, serve
from tritonsmith.server.environment import ServerEnvironment
from tritonsmith.targets import check, choose
from tritonsmith.targets.order_file import facts_from_json, read_order
from tritonsmith.targets.request import TargetRequest
from tritonsmith.validate import validate

GPU = TargetRequest(name="gpu", backend="tensorrt")
OPENVINO = TargetRequest(name="openvino", backend="openvino")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mlp.onnx, calibration.npz and evaluation.npz."""
    folder = tmp_path_factory.mktemp("digits data")
    digits = split_digits()
    onnx.save(mlp_model(), str(folder / "mlp.onnx"))
    write_samples(folder / "calibration.npz", digits.train_images[:100].reshape(-1, 64))
    write_samples(
        folder / "evaluation.npz", digits.test_images[:300].reshape(-1, 64), digits.test_labels[:300]
    )
    return folder


@pytest.fixture
def plain(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildRequest:
    monkeypatch.setattr("tritonsmith.build.step_store", lambda: tmp_path / "cache" / "steps")
    monkeypatch.setattr("tritonsmith.build.plan_cache", lambda: tmp_path / "cache" / "plans")
    return BuildRequest(name="digits", source=str(data / "mlp.onnx"), repository=tmp_path / "repository")


@pytest.fixture
def judged(data: Path, plain: BuildRequest) -> BuildRequest:
    return replace(
        plain,
        calibration=data / "calibration.npz",
        evaluation=data / "evaluation.npz",
        metric="accuracy",
        max_drop=0.02,
        targets=(GPU,),
        defer=True,
    )


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def kept(report: BuildReport) -> list[str]:
    (target,) = report.manifest.targets
    return [str(row["name"]) for row in target.candidates if row["chosen"]]


def test_a_deferred_plan_is_ordered(judged: BuildRequest) -> None:
    report = build(judged)

    folder = report.entry.version_folder
    own = ["gpu.fp16.onnx", "gpu.int8.onnx", "gpu.order.json"]
    assert names_below(folder) == [*own, "manifest.json", "model.onnx"]
    order = read_order(folder / "gpu.order.json")
    assert [(item.file, item.precision) for item in order.candidates] == [
        ("gpu.fp16.onnx", "fp16"),
        ("gpu.int8.onnx", "int8"),
    ]
    assert [item.sha256 for item in order.candidates] == [sha256_of(folder / name) for name in own[:2]]
    profile = Profile(axes={"batch": AxisRange(minimum=1, best=8, maximum=8)})
    assert (order.plan.profiles, order.max_batch_size, order.fallback) == ((profile,), 8, None)
    config = read_config(judged.repository, "digits", "gpu")
    assert (config.platform, config.default_model_filename) == ("tensorrt_plan", "gpu.plan")
    (target,) = report.manifest.targets
    assert (target.deferred, target.precision, sorted(target.files)) == (True, None, own)
    assert kept(report) == ["fp16", "int8"]
    assert all(row["gate"] for row in target.candidates)
    assert set(report.manifest.files) == {*own, "model.onnx"}
    assert "configs/gpu.pbtxt" in report.manifest.model_files
    (told,) = report.json()["targets"]  # type: ignore[misc]
    assert told["deferred"] is True  # type: ignore[index, call-overload]


def test_int8_is_written_in_tensorrts_dialect(judged: BuildRequest) -> None:
    folder = build(judged).entry.version_folder
    model = onnx.load(str(folder / "gpu.int8.onnx"))
    zeros = {tensor.name: tensor for tensor in model.graph.initializer}
    points = [zeros[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert points
    assert all(point.data_type == onnx.TensorProto.INT8 for point in points)
    assert not any(onnx.numpy_helper.to_array(point).any() for point in points)  # symmetric
    assert precision_of(onnx.load(str(folder / "gpu.fp16.onnx"))) == "fp16"


def test_the_default_is_as_it_is_without_targets(plain: BuildRequest, judged: BuildRequest) -> None:
    alone = build(replace(plain, repository=plain.repository / "alone")).entry
    beside = build(replace(judged, targets=(GPU, OPENVINO))).entry
    for name in ("config.pbtxt", "1/model.onnx"):
        assert sha256_of(alone.folder / name) == sha256_of(beside.folder / name)


def test_an_unchanged_build_does_nothing_and_covers_targets(judged: BuildRequest) -> None:
    folder = build(judged).entry.version_folder
    began_s = time.monotonic()
    assert build(judged).unchanged
    assert time.monotonic() - began_s < 2
    assert not build(replace(judged, targets=(replace(GPU, precision="fp16"),))).unchanged
    (folder.parent / "2" / "gpu.order.json").unlink()
    assert not build(replace(judged, targets=(replace(GPU, precision="fp16"),))).unchanged


def test_a_target_that_is_none_any_more_goes(judged: BuildRequest) -> None:
    folder = build(replace(judged, targets=(GPU, OPENVINO))).entry.folder
    (folder / "configs" / "mine.pbtxt").write_text("# by hand")
    build(judged)
    assert sorted(path.name for path in (folder / "configs").iterdir()) == ["gpu.pbtxt", "mine.pbtxt"]
    (folder / "configs" / "mine.pbtxt").unlink()
    build(replace(judged, targets=(), defer=False))
    assert not (folder / "configs").exists()


def test_a_targets_configuration_changed_by_hand_is_kept(judged: BuildRequest) -> None:
    path = build(judged).entry.target_config_path("gpu")
    path.write_text(path.read_text().replace("count: 1", "count: 4"))
    for targets in ((GPU, OPENVINO), ()):
        with pytest.raises(RepositoryError, match=r"gpu\.pbtxt was written or changed by hand") as error:
            build(replace(judged, targets=targets, defer=bool(targets)))
        assert "[target.gpu.config]" in str(error.value)
    build(replace(judged, force=True))
    assert "count: 4" not in path.read_text()


def test_without_tensorrt_it_says_so_before_the_long_work(judged: BuildRequest) -> None:
    said: list[str] = []
    with pytest.raises(PlanError, match="'gpu': a TensorRT plan cannot be built on this machine") as error:
        build(replace(judged, defer=False), say=said.append)
    assert "--defer" in str(error.value)
    assert "docker/" in str(error.value)
    assert not said
    assert not judged.repository.exists()


@pytest.mark.parametrize("without_plan", ["defer", "fallback"])
def test_what_a_recipe_may_say_instead(plain: BuildRequest, without_plan: str) -> None:
    report = build(replace(plain, targets=(replace(GPU, without_plan=without_plan),)))
    assert report.manifest.targets[0].deferred
    order = read_order(report.entry.version_folder / "gpu.order.json")
    # Nothing narrower than FP32 without data to judge it.
    assert [item.file for item in order.candidates] == ["gpu.fp32.onnx"]
    assert order.fallback == ("gpu.fp32.onnx" if without_plan == "fallback" else None)


def test_with_a_gpu_the_plan_is_published_with_the_rest(
    judged: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = OnnxTools(milliseconds={"fp16": 2.0, "int8": 1.0})
    monkeypatch.setattr(check, "why_unavailable", lambda: None)
    monkeypatch.setattr(choose, "tensorrt_tools", machine.tools)
    report = build(replace(judged, defer=False))

    (target,) = report.manifest.targets
    assert (target.deferred, target.precision) == (False, "int8")
    assert facts_from_json(target.plans[0]).file == "gpu.sm90.plan"
    assert report.manifest.files["gpu.sm90.plan"] == facts_from_json(target.plans[0]).sha256
    config = read_config(judged.repository, "digits", "gpu")
    assert dict(config.cc_model_filenames) == {"9.0": "gpu.sm90.plan"}
    assert machine.compiled == ["gpu.fp16.onnx", "gpu.int8.onnx"]
    assert build(replace(judged, defer=False)).unchanged


def ruined(data: Path, folder: Path) -> Path:
    """Calibration data that sees next to nothing, so that INT8 clips all that matters."""
    with np.load(data / "calibration.npz") as arrays:
        np.savez(folder / "dark.npz", **{name: arrays[name] * 0.01 for name in arrays.files})
    return folder / "dark.npz"


def test_what_loses_too_much_is_not_ordered(judged: BuildRequest, data: Path, tmp_path: Path) -> None:
    dark = replace(judged, calibration=ruined(data, tmp_path))
    report = build(dark)
    assert kept(report) == ["fp16"]
    refused = next(row for row in report.manifest.targets[0].candidates if row["name"] == "int8")
    assert "budget" in str(refused["refusal"])
    with pytest.raises(GateRefused, match="the accuracy gate refuses int8"):
        build(replace(dark, name="other", targets=(replace(GPU, precision="int8"),)))
    assert not (judged.repository / "other").exists()


def test_a_chain_is_followed_in_tensorrts_way(judged: BuildRequest) -> None:
    chain = replace(judged, steps=(Sparsify(sparsity=0.5), Quantize()))
    report = build(chain)
    assert kept(report) == ["fp16", "int8"]
    rows = {str(row["name"]): row for row in report.manifest.targets[0].candidates}
    for name, last in (("fp16", "cast-float16"), ("int8", "quantize-static")):
        steps = [step["name"] for step in rows[name]["steps"]]  # type: ignore[union-attr, index, call-overload]
        assert steps[-2:] == ["sparsify", last]


def test_a_free_axis_needs_a_range(plain: BuildRequest, tmp_path: Path) -> None:
    source = write_model(tmp_path / "embed.onnx", embedding_model())
    request = replace(plain, source=str(source), targets=(GPU,), defer=True)
    with pytest.raises(RecipeError, match=r"target\.gpu: profile 0 has no range for the free axis") as error:
        build(request)
    assert "[[target.<name>.profile]] into the recipe, with length = [" in str(error.value)
    lengths = Profile(axes={"length": AxisRange(minimum=1, best=4, maximum=9)})
    with_range = replace(GPU, plan=PlanOptions(profiles=(lengths,)))
    order = read_order(build(replace(request, targets=(with_range,))).entry.version_folder / "gpu.order.json")
    assert {axis: best.best for axis, best in order.plan.profiles[0].axes.items()} == {
        "batch": 8,
        "length": 4,
    }


def test_profiles_from_traffic(plain: BuildRequest, tmp_path: Path) -> None:
    traffic = tmp_path / "stats.json"
    stats = [{"batch_size": 4, "compute_infer": {"count": 90}}]
    traffic.write_text(str({"model_stats": [{"name": "digits", "batch_stats": stats}]}).replace("'", '"'))
    request = replace(plain, targets=(replace(GPU, traffic=traffic),), defer=True)
    order = read_order(build(request).entry.version_folder / "gpu.order.json")
    assert order.plan.profiles == (Profile(axes={"batch": AxisRange(minimum=1, best=4, maximum=8)}),)
    traffic.write_text("{}")
    with pytest.raises(RecipeError, match=r"target\.gpu: not Triton's statistics"):
        build(request)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"targets": (GPU, GPU)}, "two targets are named 'gpu'"),
        ({"targets": (OPENVINO,), "defer": True}, "--defer defers nothing"),
        ({"targets": (replace(GPU, precision="int8"),), "calibration": None}, "needs calibration data"),
        ({"max_drop": None}, "needs --max-drop"),
        ({"steps": (QuantizeWeights(),)}, "quantize-weights has no form for TensorRT"),
    ],
)
def test_wishes_that_do_not_fit_together(
    judged: BuildRequest, changes: dict[str, object], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        build(replace(judged, **changes))  # type: ignore[arg-type]


def test_one_repository_serves_two_engines(
    plain: BuildRequest, tmp_path: Path, server_environment: ServerEnvironment
) -> None:
    """Both give the same answers; a model without the target is served as ever."""
    images = split_digits().test_images[:8].reshape(-1, 64).astype(np.float32)
    samples = write_samples(tmp_path / "few.npz", images)
    request = replace(plain, targets=(OPENVINO,))
    build(request)
    build(replace(request, name="plain", targets=()))
    options = ServerOptions(http_port=0, grpc_port=0, metrics_port=0)
    engines, answers = {}, []
    for target in (None, "openvino"):
        with serve(request.repository, replace(options, target=target)) as server:
            with Client(server.http_url) as client:
                models = {name: client.model(name) for name in ("digits", "plain")}
                answers.append(models["digits"](image=images)["probabilities"])
            engines[target] = {name: model.signature.config["backend"] for name, model in models.items()}
            if target is not None:
                assert validate(request.repository, "digits", samples, http_url=server.http_url).passed
    assert engines == {
        None: {"digits": "onnxruntime", "plain": "onnxruntime"},
        "openvino": {"digits": "openvino", "plain": "onnxruntime"},
    }
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-5)


def test_a_target_that_no_model_has(plain: BuildRequest) -> None:
    build(replace(plain, targets=(OPENVINO,)))
    with (
        pytest.raises(RepositoryError, match="has a target 'gpu'"),
        serve(plain.repository, ServerOptions(http_port=0, grpc_port=0, metrics_port=0, target="gpu")),
    ):
        pass
