"""What every compression step ends with: the staged file checked, renamed into place, and measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json, Step, tool_versions
from tritonsmith.errors import CompressionError

TOOLS = ("onnx", "onnxruntime")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A step in progress: its name and options, and when it began (`time.perf_counter`)."""

    name: str
    options: Mapping[str, Json]
    began_s: float


def begin(name: str, options: Mapping[str, Json]) -> Work:
    return Work(name=name, options=options, began_s=time.perf_counter())


def finish(
    work: Work,
    artifact: Artifact,
    staged: Path,
    out: Path,
    *,
    precision: str,
    measured: Mapping[str, Json],
    tools: tuple[str, ...] = TOOLS,
) -> Artifact:
    """Rename a staged ONNX model to `out` (its data file first) and add the step to the lineage.

    `staged` carries the file name of `out`, because external data is named after it.

    Raises:
        CompressionError: the staged model takes or gives other tensors than `artifact`.
    """
    inputs, outputs = onnx_model.signature_of(onnx_model.load_model(staged, with_weights=False))
    if (inputs, outputs) != (artifact.inputs, artifact.outputs):
        raise CompressionError(
            f"{work.name} changed the signature of {artifact.path.name}",
            found="; ".join(map(str, inputs + outputs)),
            expected="; ".join(map(str, artifact.inputs + artifact.outputs)),
        )
    before = onnx_model.model_bytes(artifact.path)
    input_sha256 = onnx_model.model_sha256(artifact.path)
    for file in reversed(onnx_model.model_files(staged)):
        file.replace(out.parent / file.name)
    step = Step(
        name=work.name,
        options=work.options,
        input_sha256=input_sha256,
        output_sha256=onnx_model.model_sha256(out),
        tools=tool_versions(*tools),
        duration_s=round(time.perf_counter() - work.began_s, 3),
        bytes_before=before,
        bytes_after=onnx_model.model_bytes(out),
        measured=measured,
    )
    return replace(artifact, path=out, precision=precision, steps=(*artifact.steps, step))
