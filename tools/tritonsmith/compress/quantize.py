"""INT8: static with calibration data, dynamic without, both through onnxruntime.quantization.

Static QDQ has asymmetric 8-bit activations, a QuantizeLinear on outputs that something quantized reads, and
symmetric INT8 weights per channel, stored as INT8 behind a DequantizeLinear so that the file shrinks.
Measured in November 2026, ONNX Runtime's CPU kernels and OpenVINO both run that best, so their dialects
differ only in the engine on which the result is opened and audited (ResNet-50: 54 of 54 products in INT8 on
ONNX Runtime 1.32, 48 on OpenVINO 2026.4, which leaves strided 1x1 convolutions that share an input).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress import step, steps
from tritonsmith.compress.arithmetic import Arithmetic, detect_arithmetic
from tritonsmith.compress.audit import Audit, audit_int8
from tritonsmith.compress.calibration import check_calibration, chunks
from tritonsmith.compress.chain import Material
from tritonsmith.compress.graph import constants_of, drop_unused
from tritonsmith.compress.prepare import prepare_graph, tidy
from tritonsmith.compress.ranges import Reader
from tritonsmith.errors import CompressionError, SamplesError, UsageError
from tritonsmith.files import staging_folder
from tritonsmith.samples import Samples

WEIGHTED_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Softmax, Sigmoid and normalisations stay in floating point: they are cheap, and 8 bits hurt them.
QUANTIZED_OPS = (
    *sorted(WEIGHTED_OPS),
    *("Add", "AveragePool", "Clip", "Concat", "Flatten", "Gather", "GlobalAveragePool", "LeakyRelu"),
    *("MaxPool", "Mul", "Pad", "Relu", "Reshape", "Resize", "Split", "Squeeze", "Transpose", "Unsqueeze"),
)
# Masks of -1e9 and layer norms between the products would take all 256 steps for themselves.
TRANSFORMER_OPS = ("Gather", "Gemm", "MatMul")
RECURRENT_OPS = frozenset({"GRU", "LSTM", "RNN"})


def apply_quantize(
    spec: steps.Quantize,
    artifact: Artifact,
    material: Material,
    out: Path,
    *,
    checkpoint: Path,
    say: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Quantize as `spec` says; `checkpoint` serves quantization-aware fine-tuning.

    Raises:
        CompressionError, UsageError: as `quantize_static` and `quantize_dynamic`.
        SamplesError: static INT8 without calibration data.
    """
    method = default_int8_method(artifact, material.engine) if spec.method == "auto" else spec.method
    if method == "dynamic":
        return quantize_dynamic(artifact, out, engine=material.engine, say=say)
    if material.calibration is None:
        raise SamplesError(
            "static INT8 needs calibration data, and none is made up",
            expected="some hundreds of samples like those that the model will see",
            fix="take them from the training data, apart from the evaluation data",
        )
    dialect = spec.dialect or material.engine
    return quantize_static(artifact, material.calibration, out, dialect=dialect, say=say)


def default_int8_method(artifact: Artifact, engine: str = "onnxruntime") -> str:
    """ "dynamic" for transformers and recurrent nets on ONNX Runtime, "static" for everything else.

    OpenVINO computes what is quantized dynamically in floating point, slower than before: it gets static.
    """
    return "dynamic" if engine == "onnxruntime" and is_transformer(artifact) else "static"


def is_transformer(artifact: Artifact) -> bool:
    """Whether a graph without convolutions is recurrent, normalises layers or multiplies activations."""
    graph = onnx_model.load_model(artifact.path, with_weights=False).graph
    kinds = {node.op_type for node in graph.node}
    if kinds & {"Conv", "ConvTranspose"}:
        return False
    constants = constants_of(graph)
    attention = any(
        node.op_type == "MatMul" and not constants & set(node.input) for node in graph.node
    ) or bool(kinds & {"Attention", "MultiHeadAttention"})
    normalised = "LayerNormalization" in kinds and "MatMul" in kinds
    return attention or normalised or bool(kinds & RECURRENT_OPS)


def quantize_static(
    artifact: Artifact,
    calibration: Samples,
    out: Path,
    *,
    dialect: str = "onnxruntime",
    say: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Quantize weights and activations to INT8 with the ranges seen on the calibration data.

    Memory holds the activations of one chunk of samples at a time.

    Raises:
        CompressionError: nothing in the graph can be quantized, the opset is too old and cannot be
            raised, or nothing would run in INT8 on the engine of `dialect`.
        SamplesError: calibration samples that are all the same.
        UsageError: no such dialect.
    """
    if dialect not in ("onnxruntime", "openvino"):
        raise UsageError(f"no dialect is named {dialect!r}", expected="onnxruntime or openvino")
    _refuse_weightless(artifact)
    check_calibration(calibration, say=say)
    arithmetic = detect_arithmetic()
    options: dict[str, Json] = {
        "dialect": dialect,
        "format": "QDQ",
        "ranges": "min-max",
        "calibration_sha256": calibration.sha256,
        "calibration_samples": calibration.count,
        **arithmetic.options(),
    }
    work = step.begin("quantize-static", options)
    with staging_folder(out) as folder:
        prepared = prepare_graph(artifact.path, folder)
        say(f"calibrating on {calibration.count} samples of {calibration.path.name}")
        quantized = folder / "quantized.onnx"
        transformer = is_transformer(artifact)
        kinds = TRANSFORMER_OPS if transformer else QUANTIZED_OPS
        spared = _attention_products(prepared) if transformer else frozenset()
        with _named_failures(artifact):
            inputs = chunks(calibration, batched=artifact.batched)
            _run_static(prepared, quantized, Reader(inputs), arithmetic, kinds, spared)
        model = onnx_model.load_model(quantized)
        _free_last_outputs(model.graph, kinds, spared)
        tidy(model, onnx_model.load_model(artifact.path, with_weights=False))
        staged = folder / out.name
        onnx_model.save_model(model, staged)
        audit = _audit(staged, artifact, dialect)
        say(f"INT8: {audit}")
        return step.finish(work, artifact, staged, out, precision="int8", measured=audit.measured())


def quantize_dynamic(
    artifact: Artifact,
    out: Path,
    *,
    engine: str = "onnxruntime",
    say: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Quantize weights to INT8 per channel; activations are quantized as they come, with no calibration.

    Raises:
        CompressionError: nothing in the graph can be quantized, or nothing would run in INT8.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as run

    _refuse_weightless(artifact)
    arithmetic = detect_arithmetic()
    options: dict[str, Json] = {"engine": engine, "per_channel": True, **arithmetic.options()}
    work = step.begin("quantize-dynamic", options)
    with staging_folder(out) as folder:
        prepared = prepare_graph(artifact.path, folder)
        quantized = folder / "quantized.onnx"
        with _named_failures(artifact):
            run(
                prepared,
                quantized,
                op_types_to_quantize=["MatMul", "Gemm", "Gather", "LSTM", "EmbedLayerNormalization"],
                per_channel=True,
                reduce_range=arithmetic.reduce_range,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,
            )
        model = onnx_model.load_model(quantized)
        tidy(model, onnx_model.load_model(artifact.path, with_weights=False))
        staged = folder / out.name
        onnx_model.save_model(model, staged)
        audit = _audit(staged, artifact, engine)
        say(f"INT8: {audit}")
        return step.finish(work, artifact, staged, out, precision="int8", measured=audit.measured())


def _run_static(
    prepared: Path,
    quantized: Path,
    reader: Reader,
    arithmetic: Arithmetic,
    kinds: tuple[str, ...],
    spared: frozenset[str],
) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    symmetric = arithmetic.activations == "int8"
    quantize_static(
        prepared,
        quantized,
        reader,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(kinds),
        nodes_to_exclude=sorted(spared),
        per_channel=True,
        reduce_range=arithmetic.reduce_range,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        calibrate_method=CalibrationMethod.MinMax,
        # CalibMaxIntermediateOutputs is left alone: ONNX Runtime 1.32 forgets what it has seen by then.
        extra_options={"ActivationSymmetric": symmetric},
    )


def _attention_products(prepared: Path) -> frozenset[str]:
    """Names of the products of two activations."""
    graph = onnx_model.load_model(prepared, with_weights=False).graph
    constants = constants_of(graph)
    return frozenset(
        node.name for node in graph.node if node.op_type == "MatMul" and not constants & set(node.input)
    )


@contextmanager
def _named_failures(artifact: Artifact) -> Iterator[None]:
    """Whatever the library raises becomes a CompressionError that names the model."""
    from tritonsmith.engines.onnxruntime import engine_errors, reason_of

    failures: tuple[type[Exception], ...] = (*engine_errors(), AssertionError, AttributeError, KeyError)
    try:
        yield
    except failures as error:
        raise CompressionError(
            f"{artifact.path.name} cannot be quantized",
            found=reason_of(error),
            fix="build it with --precision fp32 or fp16",
        ) from error


def _refuse_weightless(artifact: Artifact) -> None:
    graph = onnx_model.load_model(artifact.path, with_weights=False).graph
    kinds = {node.op_type for node in graph.node}
    if not kinds & (WEIGHTED_OPS | RECURRENT_OPS):
        raise CompressionError(
            f"{artifact.path.name} has nothing that INT8 would help",
            found=f"operators {', '.join(sorted(kinds))}",
            expected=f"at least one of {', '.join(sorted(WEIGHTED_OPS | RECURRENT_OPS))}",
            fix="build it with --precision fp32",
        )


def _free_last_outputs(graph: onnx.GraphProto, kinds: tuple[str, ...], spared: frozenset[str]) -> None:
    """Let Gemm and MatMul give floats where nothing quantized reads them.

    Both engines run an INT8 product with a float result, and rounding a result once more only costs
    accuracy: a regression's output would have 256 values.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    for quantize in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        maker = makers.get(quantize.input[0])
        if maker is None or maker.op_type not in ("Gemm", "MatMul"):
            continue
        pair = readers.get(quantize.output[0], [])
        if len(readers[quantize.input[0]]) != 1 or [node.op_type for node in pair] != ["DequantizeLinear"]:
            continue
        dequantize = pair[0]
        reading = readers.get(dequantize.output[0], [])
        if any(node.op_type in kinds and node.name not in spared for node in reading):
            continue
        if quantize.input[0] in outputs:
            continue
        maker.output[0] = dequantize.output[0]
        graph.node.remove(quantize)
        graph.node.remove(dequantize)
    drop_unused(graph)


def _audit(staged: Path, artifact: Artifact, engine: str) -> Audit:
    audit = audit_int8(staged, engine=engine)
    if audit.int8_ops == 0:
        raise CompressionError(
            f"{artifact.path.name} was quantized, but {engine} would run nothing of it in INT8",
            found=str(audit),
            fix="build it with --precision fp32 or fp16",
        )
    return audit
