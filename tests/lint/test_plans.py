"""Plans: there or ordered, of the container's TensorRT, for the GPU.

No plan is opened, so any bytes will do.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from linted import LINEAR, add_linear, findings_of, only, quantized
from onnx_models import linear_model
from publishing import artifact_of, manifest_of, tensor
from tritonsmith.artifact import Target, sha256_of
from tritonsmith.engines.tensorrt.facts import Device, PlanFacts
from tritonsmith.engines.tensorrt.options import PlanOptions
from tritonsmith.lint.findings import Finding
from tritonsmith.manifest import text_from_manifest
from tritonsmith.targets.order import PlanCandidate, PlanOrder
from tritonsmith.targets.order_file import json_from_facts, text_from_order

TENSORRT = LINEAR.replace('backend: "onnxruntime"', 'platform: "tensorrt_plan"')
ARTIFACT = artifact_of([tensor("features", "float32", "batch", 4)], [tensor("scores", "float32", "batch", 3)])
ONNX = linear_model().SerializeToString()


def target_config(plans: dict[str, str] | None = None) -> str:
    """configs/gpu.pbtxt; `plans` by compute capability."""
    named = "".join(
        f'cc_model_filenames {{ key: "{key}" value: "{file}" }}\n' for key, file in (plans or {}).items()
    )
    return TENSORRT + 'default_model_filename: "gpu.plan"\n' + named


def facts_of(file: str, capability: str, *, tensorrt: str = "11.1.0.106", **options: object) -> PlanFacts:
    facts = PlanFacts(
        file=file,
        sha256="",
        size_bytes=4,
        source="gpu.fp16.onnx",
        source_sha256="",
        precision="fp16",
        tensorrt=tensorrt,
        device=Device(gpu="a GPU", compute_capability=capability, driver="580", memory_bytes=1),
        version_compatible=False,
        hardware_compatibility="none",
        stripped=False,
        duration_s=1.0,
    )
    return dataclasses.replace(facts, **options)  # type: ignore[arg-type]


def add_plans(repository: Path, config: str, *facts: PlanFacts, recorded: bool = True) -> Path:
    """A target `gpu` with these plans; the folder of version 1 comes back."""
    folder = add_linear(repository)
    (folder / "configs").mkdir()
    (folder / "configs" / "gpu.pbtxt").write_text(config)
    for plan in facts:
        (folder / "1" / plan.file).write_bytes(b"plan")
    target = Target(
        name="gpu",
        backend="tensorrt",
        precision="fp16",
        files=(),
        plans=tuple(json_from_facts(plan) for plan in facts),
    )
    manifest = manifest_of(ARTIFACT, "f")
    manifest = dataclasses.replace(
        manifest,
        name="linear",
        version=1,
        files={"model.onnx": sha256_of(folder / "1" / "model.onnx")},
        targets=(target,),
    )
    if recorded:
        (folder / "1" / "manifest.json").write_text(text_from_manifest(manifest))
    return folder / "1"


def add_order(version: Path, *, content: bytes = ONNX, fallback: str | None = None) -> None:
    (version / "gpu.fp16.onnx").write_bytes(content)
    order = PlanOrder(
        target="gpu",
        candidates=(
            PlanCandidate(file="gpu.fp16.onnx", sha256=hashlib.sha256(ONNX).hexdigest(), precision="fp16"),
        ),
        inputs=ARTIFACT.inputs,
        outputs=ARTIFACT.outputs,
        max_batch_size=4,
        plan=PlanOptions(),
        precision="auto",
        allow_slow_int8=False,
        fallback=fallback,
        fingerprint="f",
    )
    (version / "gpu.order.json").write_text(text_from_order(order))


def gpu_findings(repository: Path, **deployment: str) -> list[Finding]:
    return [f for f in findings_of(repository, target="gpu", **deployment) if f.model]  # type: ignore[arg-type]


SM90 = {"9.0": "gpu.sm90.plan"}


@pytest.mark.parametrize(
    ("deployment", "words"),
    [
        ({"container": "26.07", "gpu": "9.0"}, None),
        ({"container": "26.07"}, None),
        ({"gpu": "9.0"}, None),
        ({}, None),
        ({"container": "25.01", "gpu": "9.0"}, "10.8.0.43"),
        ({"container": "25.01"}, "10.8.0.43"),
        ({"container": "26.06"}, "TensorRT 11.0"),  # known to two digits, which differ
    ],
)
def test_a_plan_against_a_container(tmp_path: Path, deployment: dict[str, str], words: str | None) -> None:
    add_plans(tmp_path, target_config(SM90), facts_of("gpu.sm90.plan", "9.0"))
    found = gpu_findings(tmp_path, **deployment)
    if words is None:
        assert found == []
        return
    finding = only(found)
    assert (finding.severity, finding.place) == ("error", "1/gpu.sm90.plan")
    assert words in str(finding.found)


def test_a_container_whose_tensorrt_is_not_known_is_not_guessed_about(tmp_path: Path) -> None:
    add_plans(tmp_path, target_config(SM90), facts_of("gpu.sm90.plan", "9.0"))
    finding = only(gpu_findings(tmp_path, container="26.08", gpu="9.0"))
    assert finding.severity == "warning"
    assert "not known here" in finding.what


def test_a_version_compatible_plan_runs_under_a_newer_tensorrt(tmp_path: Path) -> None:
    older = facts_of("gpu.sm90.plan", "9.0", tensorrt="11.0.0.114", version_compatible=True)
    add_plans(tmp_path, target_config(SM90), older)
    assert gpu_findings(tmp_path, container="26.07", gpu="9.0") == []


def test_a_plan_of_another_gpu_under_this_ones_name(tmp_path: Path) -> None:
    add_plans(tmp_path, target_config(SM90), facts_of("gpu.sm90.plan", "8.0"))
    finding = only(gpu_findings(tmp_path))
    assert finding.severity == "error"
    assert "8.0" in str(finding.found)
    assert "9.0" in str(finding.found)


def test_a_gpu_that_no_plan_covers(tmp_path: Path) -> None:
    add_plans(tmp_path, target_config(SM90), facts_of("gpu.sm90.plan", "9.0"))
    finding = only(gpu_findings(tmp_path, gpu="8.9"))
    assert (finding.severity, finding.place) == ("error", "1/gpu.plan")
    assert "8.9" in finding.what
    assert "9.0" in str(finding.found)


@pytest.mark.parametrize("key", ["sm90", "90", "hopper"])
def test_a_key_that_no_gpu_has(tmp_path: Path, key: str) -> None:
    plans = SM90 | {key: "gpu.sm90.plan"}
    add_plans(tmp_path, target_config(plans), facts_of("gpu.sm90.plan", "9.0"))
    finding = only(gpu_findings(tmp_path))
    assert (finding.severity, finding.found) == ("error", key)


def test_a_plan_of_no_known_version(tmp_path: Path) -> None:
    add_plans(tmp_path, target_config(SM90), facts_of("gpu.sm90.plan", "9.0", tensorrt="latest"))
    assert only(gpu_findings(tmp_path, container="26.07")).severity == "error"


def test_a_named_plan_that_is_missing(tmp_path: Path) -> None:
    version = add_plans(
        tmp_path, target_config(SM90 | {"8.0": "gpu.sm80.plan"}), facts_of("gpu.sm90.plan", "9.0")
    )
    assert only(gpu_findings(tmp_path)).place == "1/gpu.sm80.plan"
    (version / "gpu.sm90.plan").unlink()
    assert only(gpu_findings(tmp_path, gpu="9.0")).place == "1/gpu.sm90.plan"


def test_an_order_builds_what_is_missing_at_the_first_start(tmp_path: Path) -> None:
    add_order(add_plans(tmp_path, target_config()), fallback="gpu.fp16.onnx")
    for deployment in ({}, {"gpu": "9.0"}):
        finding = only(gpu_findings(tmp_path, **deployment))
        assert finding.severity == "warning"
        assert "first start" in finding.what
        assert "cache" in str(finding.expected)
        assert "gpu.fp16.onnx" in str(finding.expected)


def test_a_candidate_elsewhere_is_not_opened(tmp_path: Path) -> None:
    version = add_plans(tmp_path / "repository", target_config())
    add_order(version)
    (tmp_path / "outside.onnx").write_bytes(ONNX)
    order = (version / "gpu.order.json").read_text()
    (version / "gpu.order.json").write_text(order.replace('"gpu.fp16.onnx"', '"../../../outside.onnx"'))
    finding = only(item for item in gpu_findings(tmp_path / "repository") if item.severity == "error")
    assert (finding.place, finding.found) == ("1/gpu.order.json", "'../../../outside.onnx'")


@pytest.mark.parametrize("key", [None, "9.0"])
def test_a_plan_elsewhere_is_refused(tmp_path: Path, key: str | None) -> None:
    config = target_config({key: "../gpu.plan"} if key else None)
    version = add_plans(tmp_path, config if key else config.replace("gpu.plan", "../gpu.plan"))
    (version.parent / "gpu.plan").write_bytes(b"plan")
    finding = only(gpu_findings(tmp_path))
    assert (finding.severity, finding.place) == ("error", "configs/gpu.pbtxt")
    assert finding.found == "'../gpu.plan'"


def test_an_order_makes_an_unfit_plan_a_warning(tmp_path: Path) -> None:
    add_order(add_plans(tmp_path, target_config(SM90), facts_of("gpu.sm90.plan", "9.0")))
    finding = only(gpu_findings(tmp_path, container="25.01", gpu="9.0"))
    assert finding.severity == "warning"
    assert "build it again" in str(finding.fix)


def test_an_order_whose_onnx_was_changed_is_broken_or_of_another_dialect(tmp_path: Path) -> None:
    version = add_plans(tmp_path, target_config())
    add_order(version, content=linear_model(opset=17).SerializeToString())
    errors = [finding for finding in gpu_findings(tmp_path) if finding.severity == "error"]
    assert "another one than was ordered" in only(errors).what
    (version / "gpu.fp16.onnx").unlink()
    errors = [finding for finding in gpu_findings(tmp_path) if finding.severity == "error"]
    assert (only(errors).place, "missing" in only(errors).what) == ("1/gpu.fp16.onnx", True)
    (version / "gpu.order.json").write_text("{}")
    assert any("another schema" in finding.what for finding in gpu_findings(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"no onnx", "cannot be read as ONNX"), (quantized("uint8").SerializeToString(), "TensorRT refuses")],
    ids=["unreadable", "uint8"],
)
def test_an_order_of_an_onnx_file_that_tensorrt_cannot_compile(
    tmp_path: Path, content: bytes, words: str
) -> None:
    add_order(add_plans(tmp_path, target_config()), content=content)
    assert any(words in f.what for f in gpu_findings(tmp_path) if f.severity == "error")


def test_facts_that_are_damaged(tmp_path: Path) -> None:
    version = add_plans(tmp_path, target_config(SM90), facts_of("gpu.sm90.plan", "9.0"))
    path = version / "manifest.json"
    path.write_text(path.read_text().replace('"tensorrt": "11.1.0.106"', '"tensorrt": 11'))
    errors = [finding for finding in gpu_findings(tmp_path) if finding.severity == "error"]
    assert (only(errors).place, "damaged" in only(errors).what) == ("1/manifest.json", True)


def test_a_plan_that_nobody_described(tmp_path: Path) -> None:
    add_plans(tmp_path, target_config(SM90), facts_of("gpu.sm90.plan", "9.0"), recorded=False)
    finding = only(gpu_findings(tmp_path, container="26.07", gpu="9.0"))
    assert finding.severity == "warning"
    assert "nothing says" in finding.what


def test_a_default_of_plans_is_model_plan(tmp_path: Path) -> None:
    folder = add_linear(tmp_path, config=TENSORRT)
    assert only(findings_of(tmp_path)).place == "1/model.plan"
    (folder / "1" / "model.plan").write_bytes(b"plan")
    assert only(findings_of(tmp_path)).severity == "warning"
