"""Plans without weights, given them back from the ONNX file that they were built from."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from tritonsmith.engines.tensorrt.cuda import open_cuda
from tritonsmith.engines.tensorrt.log import logger_of
from tritonsmith.engines.tensorrt.plan_file import load_engine, write_plan
from tritonsmith.engines.tensorrt.versions import capabilities_of, need_tensorrt
from tritonsmith.errors import PlanError


def refit_plan(plan: Path, onnx: Path, out: Path, *, device: int = 0) -> None:
    """Write `plan` with the weights of `onnx`, as `out`: Triton loads only plans that have their weights.

    Raises:
        PlanError: this version of TensorRT cannot refit, or the files do not belong together.
    """
    trt = need_tensorrt(device)
    with open_cuda(device):
        engine = load_engine(trt, plan)
        refit_engine(trt, engine, plan, onnx)
        config = engine.create_serialization_config()
        config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
        write_plan(engine.serialize_with_config(config), out)


def refit_engine(trt: ModuleType, engine: Any, plan: Path, onnx: Path) -> None:
    """Give a loaded engine the weights of `onnx`.

    Raises:
        PlanError: this version of TensorRT cannot refit, or the files do not belong together.
    """
    if not capabilities_of(str(trt.__version__)).strip_flags:
        raise PlanError(
            f"TensorRT {trt.__version__} cannot give a plan its weights from an ONNX file",
            expected="TensorRT 10 or newer",
        )
    logger, messages = logger_of(trt)
    messages.clear()
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(onnx)) or not refitter.refit_cuda_engine():
        raise PlanError(
            f"{plan} cannot be refitted from {onnx}",
            found=messages.reason("TensorRT gave no reason"),
            expected="the ONNX file that the plan was built from",
        )
