"""From ONNX to OpenVINO's own format: model.xml and model.bin."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Step, bytes_of, sha256_of, tool_versions
from tritonsmith.engines import open_session
from tritonsmith.errors import EngineError, MissingExtraError
from tritonsmith.files import staging_folder


def save_openvino(
    artifact: Artifact,
    out: Path,
    *,
    half: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Write an ONNX artifact as `out` (an .xml file) with its .bin beside it; `half` keeps weights in FP16.

    INT8 weights stay INT8. FP16 weights are computed with in whatever precision OpenVINO runs in.

    Raises:
        EngineError: OpenVINO refuses the model.
        MissingExtraError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError(
            "OpenVINO's own format cannot be written", package="openvino", extra="openvino"
        ) from error
    from tritonsmith.engines.openvino import reason_of

    began_s = time.perf_counter()
    say(f"writing {out.name} for OpenVINO")
    with staging_folder(out) as folder:
        staged = folder / out.name
        try:
            openvino.save_model(openvino.Core().read_model(str(artifact.path)), str(staged), half)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO refuses {artifact.path}", found=reason_of(error)) from error
        open_session(staged, engine="openvino", threads=1)
        for file in (staged.with_suffix(".bin"), staged):
            file.replace(out.parent / file.name)
    step = Step(
        name="save-openvino",
        options={"fp16_weights": half},
        input_sha256=onnx_model.model_sha256(artifact.path),
        output_sha256=ir_sha256(out),
        tools=tool_versions("openvino"),
        duration_s=round(time.perf_counter() - began_s, 3),
        bytes_before=onnx_model.model_bytes(artifact.path),
        bytes_after=ir_bytes(out),
    )
    precision = "fp16" if half else artifact.precision
    return replace(artifact, path=out, format="openvino", precision=precision, steps=(*artifact.steps, step))


def ir_bytes(path: Path) -> int:
    return bytes_of(path) + bytes_of(path.with_suffix(".bin"))


def ir_sha256(path: Path) -> str:
    """Of the .xml's and the .bin's own hashes."""
    lines = "".join(f"{sha256_of(file)}\n" for file in (path, path.with_suffix(".bin")))
    return hashlib.sha256(lines.encode()).hexdigest()
