"""Dynamic INT8: weights in INT8, activations quantized as they come, with no calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress import step, steps
from tritonsmith.compress.int8.arithmetic import Arithmetic, detect_arithmetic
from tritonsmith.compress.int8.audit import audit_quantized
from tritonsmith.compress.int8.mixed import Budget, choose_mixed
from tritonsmith.compress.int8.sensitivity import find_layers
from tritonsmith.compress.int8.smooth import smooth_model
from tritonsmith.compress.int8.tables import quantize_tables, share_weights
from tritonsmith.compress.names import kept_nodes
from tritonsmith.compress.norms import part_norms
from tritonsmith.compress.prepare import named_failures, prepare_graph, refuse_weightless, tidy
from tritonsmith.errors import SamplesError, UsageError
from tritonsmith.files import staging_folder
from tritonsmith.samples import Samples

KINDS = ("EmbedLayerNormalization", "Gemm", "LSTM", "MatMul")


def quantize_dynamic(
    artifact: Artifact,
    out: Path,
    *,
    engine: str = "onnxruntime",
    spec: steps.Quantize = steps.Quantize(),  # noqa: B008 - frozen
    calibration: Samples | None = None,
    budget: Budget | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Quantize weights to INT8, per channel, and tables, per row; `calibration` serves `spec.smooth` alone.

    With a `budget`, layers stay in floating point until it holds.

    Raises:
        CompressionError: nothing in the graph can be quantized, or nothing would run in INT8.
        SamplesError: smoothing without calibration data.
        UsageError: a node to keep that does not exist, or bias correction, which needs static ranges.
    """
    if spec.bias_correction:
        raise UsageError(
            "bias correction needs static INT8: dynamic INT8 has no fixed error to correct",
            fix="set method to static, or leave bias_correction out",
        )
    if engine == "tensorrt":
        raise UsageError(
            "TensorRT computes what is quantized dynamically in floating point", fix="set method to static"
        )
    refuse_weightless(artifact.path)
    arithmetic = detect_arithmetic()
    work = step.begin("quantize-dynamic", _options(spec, engine, calibration, arithmetic))
    with staging_folder(out) as folder:
        prepared = prepare_graph(artifact.path, folder)
        kept = kept_nodes(spec.keep, artifact.path, prepared)
        measured: dict[str, Json] = {}
        if spec.smooth is not None:
            prepared, measured["tensors_smoothed"] = _smoothed(
                prepared, spec.smooth, calibration, artifact, frozenset(kept), say
            )

        def write(keep: frozenset[str], path: Path) -> dict[str, Json]:
            return _write(prepared, path, arithmetic, frozenset(kept) | keep, like=artifact.path)

        if budget is not None:
            layers = [x for x in find_layers(prepared, (*KINDS, "Gather"), frozenset(kept)) if x.bytes]
            mixed = choose_mixed(write, layers, prepared, folder, budget=budget, say=say)
            measured["mixed"] = mixed.measured()
            kept.update((name, name) for name in mixed.nodes)
        staged = folder / out.name
        measured.update(write(frozenset(), staged))
        audit = audit_quantized(staged, artifact.path, dialect=engine, kept=kept, say=say)
        return step.finish(
            work, artifact, staged, out, precision="int8", measured={**measured, **audit.measured()}
        )


def _smoothed(
    prepared: Path,
    alpha: float,
    calibration: Samples | None,
    artifact: Artifact,
    spared: frozenset[str],
    say: Callable[[str], None],
) -> tuple[Path, int]:
    if calibration is None:
        raise SamplesError(
            "smoothing needs calibration data, and none is made up",
            expected="some hundreds of samples like those that the model will see",
            fix="give calibration data, or leave smooth out",
        )
    say(f"smoothing on {calibration.count} samples of {calibration.path.name}")
    return smooth_model(prepared, alpha, calibration, batched=artifact.batched, spared=spared)


def _write(
    prepared: Path, out: Path, arithmetic: Arithmetic, spared: frozenset[str], *, like: Path
) -> dict[str, Json]:
    """Write the quantized model, nodes named in `spared` left in floating point; return what was counted."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = prepared.with_name("quantized.onnx")
    with named_failures(like):
        quantize_dynamic(
            prepared,
            quantized,
            op_types_to_quantize=list(KINDS),
            # The tool splits a Gemm into an Add and a MatMul, which it names so, before it looks for names.
            nodes_to_exclude=sorted(spared | {f"{name}_MatMul" for name in spared}),
            per_channel=True,
            reduce_range=arithmetic.reduce_range,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
    model = onnx_model.load_model(quantized)
    tables = quantize_tables(model.graph, spared=spared)
    shared_bytes = share_weights(model.graph)
    part_norms(model.graph)
    tidy(model, onnx_model.load_model(like, with_weights=False))
    onnx_model.save_model(model, out)
    return {"tables": tables, "shared_bytes": shared_bytes}


def _options(
    spec: steps.Quantize, engine: str, calibration: Samples | None, arithmetic: Arithmetic
) -> dict[str, Json]:
    smoothing: dict[str, Json] = {}
    if spec.smooth is not None and calibration is not None:
        smoothing = {"smooth": spec.smooth, "calibration_sha256": calibration.sha256}
    return {
        "engine": engine,
        "per_channel": True,
        "keep": list(spec.keep),
        "mixed": spec.mixed,
        **smoothing,
        **arithmetic.options(),
    }
