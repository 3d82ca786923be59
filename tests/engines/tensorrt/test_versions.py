"""What we say that each version of TensorRT offers, against the bindings that NVIDIA published of it."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from typing import Any

import pytest

from tensorrt_bindings_here import BINDINGS, run_with_binding
from tritonsmith.engines.tensorrt.flags import HARDWARE_MEMBERS
from tritonsmith.engines.tensorrt.versions import capabilities_of, number_from_version
from tritonsmith.errors import PlanError

LOOK = """
import json, sys
from tritonsmith.engines.tensorrt.versions import import_tensorrt
trt = import_tensorrt()
members = {name: sorted(kind.__members__) for name, kind in vars(trt).items()
           if isinstance(kind, type) and hasattr(kind, "__members__")}
attributes = {name: sorted(dir(kind)) for name, kind in vars(trt).items() if isinstance(kind, type)}
json.dump({"version": trt.__version__, "members": members, "attributes": attributes}, sys.stdout)
"""
PRECISION_FLAGS = {"FP16", "BF16", "INT8", "FP8", "INT4"}


@pytest.fixture(scope="module", params=list(BINDINGS))
def binding(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a published binding has: its version, the members of its enums, what its classes have."""
    done = run_with_binding(request.param, LOOK)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["version"] == request.param
    return found


def test_every_flag_that_would_be_set_exists(binding: dict[str, Any]) -> None:
    known = capabilities_of(binding["version"])
    flags = set(binding["members"]["BuilderFlag"])
    assert {flag for _, flag in known.precision_flags} <= flags
    assert set(known.strip_flags) <= flags
    assert {"TF32", "SPARSE_WEIGHTS", "VERSION_COMPATIBLE"} <= flags
    assert set(known.network_flags) <= set(binding["members"]["NetworkDefinitionCreationFlag"])
    assert set(known.left_out_tactics) <= set(binding["members"]["TacticSource"])


def test_networks_are_strongly_typed_wherever_the_binding_can(binding: dict[str, Any]) -> None:
    known = capabilities_of(binding["version"])
    can = "STRONGLY_TYPED" in binding["members"]["NetworkDefinitionCreationFlag"]
    assert known.strongly_typed is can
    assert ("STRONGLY_TYPED" in known.network_flags) is can
    if can:  # 10 still has flags for precisions, and 11 has none: neither is asked
        assert known.precision_flags == ()
    if binding["version"].startswith("11."):
        assert not PRECISION_FLAGS & set(binding["members"]["BuilderFlag"])


def test_hardware_levels_are_all_that_the_binding_has(binding: dict[str, Any]) -> None:
    known = {
        HARDWARE_MEMBERS.get(level, "NONE") for level in capabilities_of(binding["version"]).hardware_levels
    }
    assert known == set(binding["members"]["HardwareCompatibilityLevel"])


def test_progress_and_stripping_are_known_where_they_are(binding: dict[str, Any]) -> None:
    known, flags = capabilities_of(binding["version"]), binding["members"]["BuilderFlag"]
    assert known.progress is ("progress_monitor" in binding["attributes"]["IBuilderConfig"])
    assert bool(known.strip_flags) is ("STRIP_PLAN" in flags and "REFIT_IDENTICAL" in flags)
    assert bool(known.strip_flags) is (
        "refit_from_file" in binding["attributes"].get("OnnxParserRefitter", ())
    )


def test_precisions_are_those_that_the_binding_has_a_type_for(binding: dict[str, Any]) -> None:
    types = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "INT8", "fp8": "FP8", "int4": "INT4"}
    known = set(capabilities_of(binding["version"]).precisions)
    assert {types[precision] for precision in known} <= set(binding["members"]["DataType"])
    if not capabilities_of(binding["version"]).strongly_typed:
        known_flags = dict(capabilities_of(binding["version"]).precision_flags)
        assert set(known_flags) == known - {"fp32"}


@pytest.mark.parametrize("version", ["8.5.3", "7.2", "9.3.0", "12.0.0"])
def test_versions_that_nobody_looked_at_are_refused(version: str) -> None:
    with pytest.raises(PlanError, match=f"TensorRT {version} cannot be used"):
        capabilities_of(version)


def test_hardware_levels_grew_within_major_10() -> None:
    assert "same_compute_capability" not in capabilities_of("10.8.0.43").hardware_levels
    assert "same_compute_capability" in capabilities_of("10.10.0.31").hardware_levels


@pytest.mark.parametrize("text", ["", "10", "10.x", "v10.1", "10..1"])
def test_a_version_is_numbers_with_dots(text: str) -> None:
    with pytest.raises(PlanError, match="not a version"):
        number_from_version(text)


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


WHY = (
    "from tritonsmith.engines.tensorrt.versions import why_unavailable, device\n"
    "reason = why_unavailable()\n"
    "print(reason if reason is not None else device())\n"
)


@pytest.mark.parametrize(
    ("driver", "gpus", "said"),
    [
        pytest.param(False, 0, "there is no NVIDIA driver: libcuda.so.1", id="no driver"),
        pytest.param(True, 0, "CUDA finds no GPU that it can use: CUDA_ERROR_NO_DEVICE (100)", id="no gpu"),
        pytest.param(True, 1, "gpu='Stand-in GPU', compute_capability='9.0'", id="gpu"),
    ],
)
def test_what_is_missing_is_found_step_by_step(driver: bool, gpus: int, said: str) -> None:
    if not driver and has_driver():
        pytest.skip("this machine has an NVIDIA driver")
    done = run_with_binding("11.4.0.106", WHY, driver=driver, gpus=gpus)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_a_binding_without_its_libraries_names_the_library() -> None:
    done = run_with_binding("11.4.0.106", WHY, libraries=False)
    assert done.returncode == 0, done.stderr
    assert "libnvonnxparser.so.11: cannot open shared object file" in done.stdout


def test_without_the_package_the_reason_names_it() -> None:
    code = "import sys; sys.modules['tensorrt'] = sys.modules['tensorrt_bindings'] = None\n" + WHY
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the Python package 'tensorrt' is not installed" in done.stdout


def test_a_wheel_packed_again_is_the_same_tensorrt() -> None:
    assert number_from_version("10.14.1.48.post1") == (10, 14, 1, 48)
