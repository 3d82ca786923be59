"""The whole TensorRT 8.6.0 for CPython 3.10, as far as it goes without a GPU: `make test-tensorrt`.

It is 1.3 GB, so it is tested where TRITONSMITH_TENSORRT_86 is set: to the wheel, or to `download`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tensorrt_bindings_here import stand_in_cuda_libraries
from tritonsmith.server.interpreter import survey
from tritonsmith.server.provision import cache_folder, clean_environment, run_pip, unpack_wheel

WHEEL = os.environ.get("TRITONSMITH_TENSORRT_86")
TOOLS = Path(__file__).parents[3] / "tools"
pytestmark = [
    pytest.mark.skipif(WHEEL is None, reason="1.3 GB: make test-tensorrt, or set TRITONSMITH_TENSORRT_86"),
    pytest.mark.timeout(1800),
]

LOOK = """
import json, sys
from tritonsmith.engines.tensorrt import builder, session  # on numpy alone
from tritonsmith.engines.tensorrt.flags import flags_from_options
from tritonsmith.engines.tensorrt.log import logger_of
from tritonsmith.engines.tensorrt.options import PlanOptions
from tritonsmith.engines.tensorrt.versions import capabilities_of, import_tensorrt, why_unavailable
from tritonsmith.errors import PlanError
trt = import_tensorrt()
known = capabilities_of(trt.__version__)
flags = flags_from_options(PlanOptions(sparse_weights=True, version_compatible=True), {"fp16", "int8"}, known)
answer = {
    "version": trt.__version__,
    "parser": trt.OnnxParser.__name__,
    "flags": [name for name in flags.builder if not hasattr(trt.BuilderFlag, name)],
    "why": why_unavailable(),
    "third": sorted(name for name in ("onnx", "ml_dtypes", "torch", "google") if name in sys.modules),
}
logger, messages = logger_of(trt)
if answer["why"] is not None:
    try:
        builder._make_builder(trt, logger, messages)
    except PlanError as error:
        answer["builder"] = str(error)
json.dump(answer, sys.stdout)
"""


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    probe = next((probe for probe in survey() if probe.minor == "3.10"), None)
    if probe is None:
        pytest.skip("there is no CPython 3.10 on this machine")
    python = Path(probe.python)
    wheel = Path(WHEEL or "")
    requirement = str(wheel.absolute()) if wheel.is_file() else "tensorrt==8.6.0"
    folder = unpack_wheel(requirement, cache_folder() / "tensorrt" / "whole-8.6.0", python=python)
    site = cache_folder() / "tensorrt" / "numpy-cp310"
    if not site.is_dir():
        scratch = tmp_path_factory.mktemp("pip")
        arguments = ["install", "--only-binary=:all:", "--target", str(site), "numpy==1.26.4"]
        run_pip(python, arguments, scratch=scratch, what="cannot install numpy for CPython 3.10")
    environment = clean_environment() | {
        "PYTHONPATH": os.pathsep.join(map(str, (TOOLS, folder, site))),
        "LD_LIBRARY_PATH": str(stand_in_cuda_libraries()),
    }
    command = [str(python), "-S", "-c", LOOK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_it_is_imported_over_its_own_libraries(answer: dict[str, Any]) -> None:
    assert (answer["version"], answer["parser"]) == ("8.6.0", "OnnxParser")
    assert answer["flags"] == []


def test_numpy_and_the_binding_are_all_that_it_takes(answer: dict[str, Any]) -> None:
    assert answer["third"] == []


def test_a_machine_without_a_gpu_is_told_so(answer: dict[str, Any]) -> None:
    if answer["why"] is None:
        pytest.skip("this machine has a GPU: tests/gpu/ has the rest")
    assert "NVIDIA driver" in answer["why"] or "GPU" in answer["why"]
    # TensorRT 8.6 itself raises a bare TypeError here, and its Runtime ends the process
    assert "CUDA initialization failure" in answer["builder"]
