"""INT8: which way a model is quantized, and what it needs for it.

Static QDQ has asymmetric 8-bit activations, a QuantizeLinear on outputs that something quantized reads, and
symmetric INT8 weights per channel, stored as INT8 behind a DequantizeLinear so that the file shrinks.
Measured in November 2026, ONNX Runtime's CPU kernels and OpenVINO both run that best, so their dialects
differ only in the engine on which the result is opened and audited (ResNet-50: 54 of 54 products in INT8 on
ONNX Runtime 1.32, 48 on OpenVINO 2026.4, which leaves strided 1x1 convolutions that share an input).
TensorRT has a dialect of its own (qdq_tensorrt.py), written from the same ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact
from tritonsmith.compress import graph, steps
from tritonsmith.compress.chain import Material
from tritonsmith.compress.int8.dynamic import quantize_dynamic
from tritonsmith.compress.int8.mixed import budget_of
from tritonsmith.compress.int8.refine import refine_static
from tritonsmith.compress.int8.static import quantize_static
from tritonsmith.errors import SamplesError, UsageError

__all__ = ["apply_quantize", "default_int8_method", "is_transformer", "quantize_dynamic", "quantize_static"]


def apply_quantize(
    spec: steps.Quantize,
    artifact: Artifact,
    material: Material,
    out: Path,
    *,
    checkpoint: Path,
    say: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Quantize as `spec` says; what calibration saw is kept in `material.ranges`, a training in `checkpoint`.

    Raises:
        CompressionError: as `quantize_static` and `quantize_dynamic`.
        SamplesError: static INT8 or smoothing without calibration data, mixed precision without tuning data.
        UsageError: a method, dialect, calibrator or node that does not exist, mixed precision without a
            budget, or fine-tuning for dynamic INT8.
    """
    if spec.epochs < 0:
        raise UsageError(f"{spec.epochs} epochs cannot be trained", expected="0 or more")
    engine = spec.dialect or material.engine
    method = spec.method if spec.method != "auto" else default_int8_method(artifact, engine)
    if method == "dynamic":
        if spec.epochs:
            raise UsageError(
                "fine-tuning needs the fixed ranges of static INT8, and this is dynamic",
                fix="set method to static, or leave epochs out",
            )
        budget = budget_of(material) if spec.mixed else None
        return quantize_dynamic(
            artifact,
            out,
            engine=engine,
            spec=spec,
            calibration=material.calibration,
            budget=budget,
            say=say,
        )
    if method != "static":
        raise UsageError(f"no method is named {method!r}", expected="auto, static or dynamic")
    if material.calibration is None:
        raise SamplesError(
            "static INT8 needs calibration data, and none is made up",
            expected="some hundreds of samples like those that the model will see",
            fix="take them from the training data, apart from the evaluation data",
        )
    refine = partial(
        refine_static,
        spec=spec,
        material=material,
        budget=budget_of(material) if spec.mixed else None,
        checkpoint=checkpoint,
        say=say,
    )
    return quantize_static(
        artifact,
        material.calibration,
        out,
        dialect=engine,
        spec=spec,
        ranges_folder=material.ranges or checkpoint,
        refine=refine,
        say=say,
    )


def default_int8_method(artifact: Artifact, engine: str = "onnxruntime") -> str:
    """ "dynamic" for transformers and recurrent nets on ONNX Runtime, "static" for everything else.

    OpenVINO and TensorRT compute what is quantized dynamically in floating point, slower than before: they
    get static.
    """
    return "dynamic" if engine == "onnxruntime" and is_transformer(artifact) else "static"


def is_transformer(artifact: Artifact) -> bool:
    """Whether a graph without convolutions is recurrent, normalises layers or multiplies activations."""
    return graph.is_transformer(onnx_model.load_model(artifact.path, with_weights=False).graph)
