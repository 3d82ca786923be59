"""The orders of a repository, filled: plans published for a fleet, or served by a view."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import model_config_pb2

from onnx_models import linear_model, write_model
from plan_orders import H100, OnnxTools, corrupt, publish_order
from tritonsmith.artifact import sha256_of
from tritonsmith.cli import main
from tritonsmith.errors import PlanError, RepositoryError
from tritonsmith.manifest import read_manifest
from tritonsmith.repository.config import config_from_text
from tritonsmith.repository.entry import find_entry
from tritonsmith.targets import found as found_module
from tritonsmith.targets import placing
from tritonsmith.targets.order_file import facts_from_json
from tritonsmith.targets.placing import PlanReport
from tritonsmith.targets.plans import PlanRequest, build_plans

A10 = dataclasses.replace(H100, gpu="A10", compute_capability="8.6")
H200 = dataclasses.replace(H100, gpu="H200")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    publish_order(tmp_path / "repository", tmp_path / "work", ("fp32", "fp16"))
    return tmp_path / "repository"


def run(repository: Path, machine: OnnxTools, **options: Any) -> tuple[PlanReport, ...]:
    lines: list[str] = []
    request = PlanRequest(repository=repository, cache=repository.parent / "cache", **options)
    return build_plans(request, tools=machine.tools(), say=lines.append)


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def config_of(folder: Path) -> model_config_pb2.ModelConfig:
    return config_from_text((folder / "linear" / "configs" / "gpu.pbtxt").read_text())


def test_a_plan_is_published(repository: Path) -> None:
    before = tree(repository)
    (report,) = run(repository, OnnxTools())
    folder = repository / "linear" / "1"
    assert (report.outcome, report.path) == ("built", folder / "gpu.sm90.plan")
    assert (folder / "gpu.sm90.plan").read_bytes() == (folder / "gpu.fp16.onnx").read_bytes()
    config = config_of(repository)
    assert dict(config.cc_model_filenames) == {"9.0": "gpu.sm90.plan"}
    assert (config.default_model_filename, config.platform) == ("gpu.sm90.plan", "tensorrt_plan")
    (target,) = read_manifest(folder / "manifest.json").targets
    assert target.precision == "fp16"
    assert not target.deferred
    (facts,) = map(facts_from_json, target.plans)
    assert (facts.file, facts.device, facts.tensorrt) == ("gpu.sm90.plan", H100, "10.16.1.11")
    assert facts.sha256 == sha256_of(folder / "gpu.sm90.plan")
    changed = {path for path, digest in tree(repository).items() if before.get(path) != digest}
    assert changed == {"linear/1/gpu.sm90.plan", "linear/1/manifest.json", "linear/configs/gpu.pbtxt"}
    # An unchanged build still finds the version, plan and all.
    fingerprint = read_manifest(folder / "manifest.json").fingerprint
    assert find_entry(repository, "linear", fingerprint) is not None


def test_the_second_time_there_is_nothing_to_do(repository: Path) -> None:
    machine = OnnxTools()
    run(repository, machine)
    before = tree(repository)
    (report,) = run(repository, machine)
    assert report.outcome == "published"
    assert len(machine.compiled) == 2
    assert tree(repository) == before
    (report,) = run(repository, machine, force=True)
    assert report.outcome == "built"
    assert len(machine.compiled) == 4


def test_a_published_plan_that_was_damaged_is_said(repository: Path) -> None:
    machine = OnnxTools()
    run(repository, machine)
    plan = repository / "linear" / "1" / "gpu.sm90.plan"
    content = plan.read_bytes()
    plan.write_bytes(content[:-1])
    with pytest.raises(RepositoryError, match="not as it was published"):
        run(repository, machine)
    assert len(machine.compiled) == 2


def test_a_mixed_fleet(repository: Path) -> None:
    run(repository, OnnxTools())
    run(repository, OnnxTools(device=A10))
    config = config_of(repository)
    assert dict(config.cc_model_filenames) == {"8.6": "gpu.sm86.plan", "9.0": "gpu.sm90.plan"}
    assert config.default_model_filename == "gpu.sm90.plan"
    (target,) = read_manifest(repository / "linear" / "1" / "manifest.json").targets
    assert [facts_from_json(plan).device.gpu for plan in target.plans] == ["A10", "H100"]
    assert {"gpu.sm86.plan", "gpu.sm90.plan"} <= set(target.files)


def test_two_kinds_of_gpu_with_one_compute_capability(repository: Path) -> None:
    """Triton chooses by the capability alone."""
    run(repository, OnnxTools())
    with pytest.raises(PlanError, match="1 of 1 plans") as caught:
        run(repository, OnnxTools(device=H200))
    assert "H100, and this is H200" in str(caught.value)
    run(repository, OnnxTools(device=H200), force=True)
    (target,) = read_manifest(repository / "linear" / "1" / "manifest.json").targets
    assert [facts_from_json(plan).device.gpu for plan in target.plans] == ["H200"]


def test_another_tensorrt_takes_the_plan_s_place(repository: Path) -> None:
    run(repository, OnnxTools())
    (report,) = run(repository, OnnxTools(version="11.4.0.1"))
    assert report.outcome == "built"
    (target,) = read_manifest(repository / "linear" / "1" / "manifest.json").targets
    assert [facts_from_json(plan).tensorrt for plan in target.plans] == ["11.4.0.1"]


def test_two_machines_at_once_lose_no_plan(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine publishes between the reading of the manifest and the writing."""
    read_entry = placing.read_entry

    def read_and_be_overtaken(*arguments: Any) -> Any:
        entry = read_entry(*arguments)
        monkeypatch.setattr(placing, "read_entry", read_entry)
        run(repository, OnnxTools(device=A10))
        return entry

    monkeypatch.setattr(placing, "read_entry", read_and_be_overtaken)
    run(repository, OnnxTools())
    (target,) = read_manifest(repository / "linear" / "1" / "manifest.json").targets
    assert [facts_from_json(plan).device.gpu for plan in target.plans] == ["A10", "H100"]
    assert dict(config_of(repository).cc_model_filenames) == {"8.6": "gpu.sm86.plan", "9.0": "gpu.sm90.plan"}


def test_a_view_has_the_plan_and_leaves_the_repository_alone(tmp_path: Path, repository: Path) -> None:
    before = tree(repository)
    view, machine = tmp_path / "view", OnnxTools()
    (report,) = run(repository, machine, view=view, target="gpu")
    assert report.outcome == "built"
    assert tree(repository) == before
    config = config_of(view)
    assert dict(config.cc_model_filenames) == {"9.0": "gpu.sm90.plan"}
    assert config.default_model_filename == "gpu.sm90.plan"
    plan = view / "linear" / "1" / "gpu.sm90.plan"
    assert plan.resolve().is_relative_to(tmp_path / "cache")
    assert plan.read_bytes() == (repository / "linear" / "1" / "gpu.fp16.onnx").read_bytes()
    (report,) = run(repository, machine, view=view, target="gpu")
    assert (report.outcome, len(machine.compiled)) == ("cached", 2)


def test_a_view_takes_a_plan_that_is_published_for_this_machine(tmp_path: Path, repository: Path) -> None:
    machine = OnnxTools()
    run(repository, machine)
    (report,) = run(repository, machine, view=tmp_path / "view")
    assert report.outcome == "published"
    plan = tmp_path / "view" / "linear" / "1" / "gpu.sm90.plan"
    assert plan.resolve() == repository / "linear" / "1" / "gpu.sm90.plan"


def test_without_a_gpu_and_without_fallback(tmp_path: Path, repository: Path) -> None:
    machine = OnnxTools(unavailable="no driver: libcuda.so.1 is missing")
    for view in (None, tmp_path / "view"):
        with pytest.raises(PlanError, match="1 of 1 plans cannot be built on this machine") as caught:
            run(repository, machine, view=view)
        text = str(caught.value)
        assert "libcuda.so.1 is missing" in text
        assert "linear version 1, target gpu" in text
        assert ("[target.gpu]" in text) == (view is not None)
    assert not (tmp_path / "view").exists()


def fallback_repository(tmp_path: Path) -> Path:
    publish_order(tmp_path / "r", tmp_path / "w", ("fp16", "fp32"), fallback="gpu.fp32.onnx")
    return tmp_path / "r"


def test_the_fallback_on_a_gpu_keeps_its_accelerator(tmp_path: Path) -> None:
    repository = fallback_repository(tmp_path)
    machine = OnnxTools(fails=("fp16", "fp32"))
    (report,) = run(repository, machine, view=tmp_path / "view")
    assert report.outcome == "fallback"
    assert "no implementation of node 7" in str(report.reason)
    config = config_of(tmp_path / "view")
    assert (config.backend, config.platform) == ("onnxruntime", "")
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.parameters["trt_engine_cache_path"] == str(tmp_path / "cache" / "engines")
    assert (tmp_path / "cache" / "engines").is_dir()
    # What is published has no fallback: the order is still open.
    with pytest.raises(PlanError):
        run(repository, machine)


def test_the_fallback_without_a_gpu_is_on_the_cpu(tmp_path: Path) -> None:
    repository = fallback_repository(tmp_path)
    run(repository, OnnxTools(unavailable="there is no GPU"), view=tmp_path / "view")
    config = config_of(tmp_path / "view")
    assert not config.HasField("optimization")
    kinds = {group.kind for group in config.instance_group}
    assert kinds == {model_config_pb2.ModelInstanceGroup.KIND_CPU}


def test_a_wrong_plan_is_no_reason_to_fall_back(tmp_path: Path) -> None:
    """The same TensorRT would compute the fallback."""
    repository = fallback_repository(tmp_path)
    with pytest.raises(PlanError, match="1 of 1 plans") as caught:
        run(repository, OnnxTools(wrong=("fp16", "fp32")), view=tmp_path / "view")
    assert "relative error" in str(caught.value)
    assert not (tmp_path / "view").exists()


def test_what_failed_does_not_keep_the_others_from_the_cache(tmp_path: Path, repository: Path) -> None:
    publish_order(repository, tmp_path / "int8", ("int8",), name="other")
    machine = OnnxTools(fails=("int8",))
    with pytest.raises(PlanError, match="1 of 2 plans") as caught:
        run(repository, machine, view=tmp_path / "view")
    assert "other version 1, target gpu" in str(caught.value)
    assert "linear" not in str(caught.value)
    assert not (tmp_path / "view").exists()
    reports = run(repository, OnnxTools(milliseconds={"int8": 1.0}), view=tmp_path / "view")
    assert [report.outcome for report in reports] == ["cached", "built"]


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, repository: Path) -> None:
    publish_order(repository, tmp_path / "second", ("fp32",), name="second")
    first = OnnxTools()
    count = 0

    def compile_two(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > 2:
            raise KeyboardInterrupt
        return first.compile(*arguments, **options)

    tools = dataclasses.replace(first.tools(), compile=compile_two)
    before = tree(repository)
    request = PlanRequest(repository=repository, cache=tmp_path / "cache", view=tmp_path / "view")
    with pytest.raises(KeyboardInterrupt):
        build_plans(request, tools=tools)
    assert tree(repository) == before
    assert not (tmp_path / "view").exists()
    assert not list(tmp_path.rglob("*.staging"))
    reports = build_plans(request, tools=first.tools())
    assert [report.outcome for report in reports] == ["cached", "built"]


@pytest.mark.parametrize("change", ["onnx", "order", "both", "missing", "elsewhere"])
def test_changed_files_are_refused(repository: Path, change: str) -> None:
    folder = repository / "linear" / "1"
    order = json.loads((folder / "gpu.order.json").read_text())
    if change in ("onnx", "both"):
        corrupt(folder / "gpu.fp16.onnx")
    if change == "both":
        order["candidates"][1]["sha256"] = sha256_of(folder / "gpu.fp16.onnx")
    if change == "order":
        order["allow_slow_int8"] = True
    if change == "missing":
        (folder / "gpu.fp16.onnx").unlink()
    if change == "elsewhere":
        order["candidates"][1]["file"] = "../../other.onnx"
    (folder / "gpu.order.json").write_text(json.dumps(order))
    machine = OnnxTools()
    with pytest.raises(RepositoryError) as caught:
        run(repository, machine)
    expected = {"onnx": "not the file that was ordered", "missing": "gpu.fp16.onnx is no file"}
    assert expected.get(change, "was changed") in str(caught.value)
    assert machine.compiled == []


def test_only_versions_that_are_served_are_built(tmp_path: Path, repository: Path) -> None:
    publish_order(repository, tmp_path / "two", ("fp32",))
    (report,) = run(repository, OnnxTools())
    assert report.found.version == 2


def test_a_target_that_no_model_has(repository: Path) -> None:
    with pytest.raises(RepositoryError, match=r"no model in .* has a target 'gpus'") as caught:
        run(repository, OnnxTools(), target="gpus")
    assert caught.value.found == "gpu"


def test_without_orders_a_view_is_laid_and_no_gpu_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "r" / "m" / "1").mkdir(parents=True)
    (tmp_path / "r" / "m" / "config.pbtxt").write_text('name: "m"')
    write_model(tmp_path / "r" / "m" / "1" / "model.onnx", linear_model())
    assert run(tmp_path / "r", OnnxTools(unavailable="no GPU"), view=tmp_path / "view") == ()
    assert (tmp_path / "view" / "m" / "1" / "model.onnx").is_file()


def test_no_repository(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(RepositoryError):
            found_module.find_orders(folder)


# --- the verb -----------------------------------------------------------------------------------------


def test_the_verb_with_the_fallback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a container's entry point calls it; on this machine with the real tools."""
    repository = fallback_repository(tmp_path)
    view = tmp_path / "view"
    arguments = [
        "plans",
        str(repository),
        "--target",
        "gpu",
        "--cache",
        str(tmp_path / "c"),
        "--view",
        str(view),
    ]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    (plan,) = json.loads(captured.out)["plans"]
    assert (plan["model"], plan["version"], plan["target"]) == ("linear", 1, "gpu")
    assert "laid the view" in captured.err
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("linear")


def test_the_verb_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tritonsmith.engines.tensorrt.versions import why_unavailable

    reason = why_unavailable()
    if reason is None:
        pytest.skip("this machine can build plans")
    publish_order(tmp_path / "r", tmp_path / "w")
    assert main(["plans", str(tmp_path / "r"), "--cache", str(tmp_path / "c")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert reason in " ".join(captured.err.split())
    assert "docker/Dockerfile.gpu" in captured.err
    assert "Traceback" not in captured.err
