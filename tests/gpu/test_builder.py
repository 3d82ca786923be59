"""TensorRT's builder on a real GPU: what comes of options, and what is refused."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpu.conftest import LARGEST, Build
from gpu.tiny import affine, all_tiny, draw, int8_convolution, product, sparse_product, write_tiny
from tritonsmith.artifact import sha256_of
from tritonsmith.engines.tensorrt.builder import build_plan
from tritonsmith.engines.tensorrt.fit import fits
from tritonsmith.engines.tensorrt.options import PlanOptions
from tritonsmith.engines.tensorrt.profiles import filled_profiles
from tritonsmith.engines.tensorrt.refit import refit_plan
from tritonsmith.engines.tensorrt.session import open_plan
from tritonsmith.engines.tensorrt.versions import Capabilities, device
from tritonsmith.errors import PlanError

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.parametrize("model", all_tiny(), ids=lambda model: model.name)
def test_facts_name_the_plan_the_gpu_and_the_version(
    build: Build, model: object, capabilities: Capabilities
) -> None:
    plan, facts = build(model)
    assert facts.sha256 == sha256_of(plan)
    assert facts.size_bytes == plan.stat().st_size > 0
    assert (facts.tensorrt, facts.device) == (capabilities.version, device())
    assert fits(facts, tensorrt=capabilities.version, gpu=device().compute_capability) is None
    assert "problem" not in facts.measured["layers"]
    assert facts.measured["layers"]["count"] >= 1


def test_a_convolution_between_int8_pairs_really_runs_in_int8(build: Build) -> None:
    _, facts = build(int8_convolution())
    assert facts.measured["layers"]["products_by_precision"].get("int8") == 1


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(tf32=False),
        PlanOptions(optimization_level=0),
        PlanOptions(optimization_level=5),
        PlanOptions(workspace_bytes=64 << 20),
        PlanOptions(hardware_compatibility="ampere_plus"),
    ],
    ids=["no tf32", "level 0", "level 5", "workspace", "ampere_plus"],
)
def test_options_keep_the_answer(build: Build, options: PlanOptions) -> None:
    model = product()
    plan, facts = build(model, options)
    assert facts.hardware_compatibility == options.hardware_compatibility
    with open_plan(plan) as session:
        x = draw(model, 3)
        np.testing.assert_allclose(session.run({"x": x})["y"], model.answer(x), atol=model.tolerance)


def test_without_tf32_products_are_exact_to_fp32(build: Build) -> None:
    model = product()
    plan, _ = build(model, PlanOptions(tf32=False))
    with open_plan(plan) as session:
        x = draw(model, LARGEST)
        np.testing.assert_allclose(session.run({"x": x})["y"], model.answer(x), atol=2e-5)


def test_2_to_4_sparse_weights_keep_the_answer(build: Build) -> None:
    model = sparse_product()
    plan, _ = build(model, PlanOptions(sparse_weights=True))
    with open_plan(plan) as session:
        x = draw(model, 4)
        np.testing.assert_allclose(session.run({"x": x})["y"], model.answer(x), atol=model.tolerance)


def test_external_data_is_found_beside_the_file(build: Build) -> None:
    model = product()
    plan, _ = build(model, external=True)
    with open_plan(plan) as session:
        x = draw(model, 2)
        np.testing.assert_allclose(session.run({"x": x})["y"], model.answer(x), atol=model.tolerance)


def test_the_timing_cache_is_kept_and_read_again(build: Build, tmp_path: Path) -> None:
    said: list[str] = []
    build(product(), timing_cache=tmp_path / "cache")
    (cache,) = (tmp_path / "cache").glob("timing-*.cache")
    first = cache.stat().st_size
    assert first > 0
    build(product(), timing_cache=tmp_path / "cache", say=said.append)
    assert cache.stat().st_size >= first
    assert not any("refuses" in line for line in said)


def test_a_spoiled_timing_cache_is_begun_anew(build: Build, tmp_path: Path) -> None:
    build(affine(), timing_cache=tmp_path)
    (cache,) = tmp_path.glob("timing-*.cache")
    cache.write_bytes(b"no cache at all")
    said: list[str] = []
    build(affine(), timing_cache=tmp_path, say=said.append)
    assert any("refuses" in line for line in said)
    assert cache.read_bytes() != b"no cache at all"


def test_version_compatible_plans_load(build: Build) -> None:
    model = affine()
    try:
        plan, facts = build(model, PlanOptions(version_compatible=True))
    except PlanError as error:
        if "lean" in str(error).lower():
            pytest.skip(f"TensorRT's lean runtime is not here: {error.found}")
        raise
    assert facts.version_compatible
    with open_plan(plan) as session:
        x = draw(model, 2)
        np.testing.assert_array_equal(session.run({"x": x})["y"], model.answer(x))


def test_a_stripped_plan_is_smaller_and_refitted(
    build: Build, tmp_path: Path, capabilities: Capabilities
) -> None:
    model = product()
    if not capabilities.strip_flags:
        with pytest.raises(PlanError, match="cannot build plans without their weights"):
            build(model, PlanOptions(strip_weights=True))
        return
    plan, facts = build(model, PlanOptions(strip_weights=True))
    assert facts.stripped
    onnx, whole = tmp_path / f"{model.name}.onnx", tmp_path / "whole.plan"
    refit_plan(plan, onnx, whole)
    assert whole.stat().st_size > plan.stat().st_size
    x = draw(model, 4)
    for path, weights in ((plan, onnx), (whole, None)):
        with open_plan(path, onnx=weights) as session:
            np.testing.assert_allclose(session.run({"x": x})["y"], model.answer(x), atol=model.tolerance)


def test_ctrl_c_ends_a_build(build: Build, tmp_path: Path, capabilities: Capabilities) -> None:
    if not capabilities.progress:
        pytest.skip(f"TensorRT {capabilities.version} cannot be interrupted")

    def interrupt(line: str) -> None:
        if line.startswith("TensorRT: "):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(int8_convolution(), say=interrupt)
    assert list(tmp_path.glob("*.plan")) == []


def test_a_file_that_is_no_model_is_refused_in_tensorrts_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model at all")
    model = affine()
    options = filled_profiles(PlanOptions(), (model.x,), LARGEST)
    with pytest.raises(PlanError, match="cannot read") as caught:
        build_plan(broken, tmp_path / "x.plan", inputs=(model.x,), options=options, precision="fp32")
    assert caught.value.found


def test_a_precision_that_the_graph_lacks_is_refused(tmp_path: Path) -> None:
    model = affine()
    onnx = write_tiny(model, tmp_path)
    options = filled_profiles(PlanOptions(), (model.x,), LARGEST)
    with pytest.raises(PlanError, match="holds no int8 tensor"):
        build_plan(onnx, tmp_path / "x.plan", inputs=(model.x,), options=options, precision="int8")


def test_a_plan_of_something_else_is_refused(build: Build) -> None:
    plan, _ = build(replace(affine(), name="spoiled"))
    plan.write_bytes(plan.read_bytes()[:100])
    with pytest.raises(PlanError, match="cannot load"):
        open_plan(plan)
