"""Static INT8: one calibration pass, kept ranges, and the dialect that the engine wants."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress import step, steps
from tritonsmith.compress.calibration import check_calibration
from tritonsmith.compress.graph import WEIGHTED_OPS, constants_of, is_transformer
from tritonsmith.compress.int8.arithmetic import Arithmetic, detect_arithmetic
from tritonsmith.compress.int8.audit import audit_quantized
from tritonsmith.compress.int8.bias import correct_biases
from tritonsmith.compress.int8.calibrate import (
    Histogram,
    collect_histograms,
    load_histograms,
    ranges_of,
    save_histograms,
)
from tritonsmith.compress.int8.qdq_onnxruntime import write_onnxruntime
from tritonsmith.compress.int8.qdq_tensorrt import write_tensorrt
from tritonsmith.compress.int8.smooth import smooth_model
from tritonsmith.compress.int8.tables import share_weights
from tritonsmith.compress.int8.taps import float_tensors
from tritonsmith.compress.int8.thresholds import calibrator_of
from tritonsmith.compress.names import kept_nodes
from tritonsmith.compress.prepare import named_failures, prepare_graph, refuse_weightless, tidy
from tritonsmith.errors import UsageError
from tritonsmith.files import staging_folder
from tritonsmith.samples import Samples

DIALECTS = ("onnxruntime", "openvino", "tensorrt")
# Softmax, Sigmoid and normalisations stay in floating point: they are cheap, and 8 bits hurt them.
QUANTIZED_OPS = (
    *sorted(WEIGHTED_OPS),
    *("Add", "AveragePool", "Clip", "Concat", "Flatten", "Gather", "GlobalAveragePool", "LeakyRelu"),
    *("MaxPool", "Mul", "Pad", "Relu", "Reshape", "Resize", "Split", "Squeeze", "Transpose", "Unsqueeze"),
)
# Masks of -1e9 and layer norms between the products would take all 256 steps for themselves.
TRANSFORMER_OPS = ("Gather", "Gemm", "MatMul")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """A float graph, ready to be written in any dialect, with the range of each tensor."""

    prepared: Path  # FP32; its weights lie in the same folder
    ranges: Mapping[str, tuple[float, float]]
    dialect: str
    arithmetic: Arithmetic
    kinds: tuple[str, ...]  # operators that are quantized
    spared: frozenset[str]  # nodes that are not, whatever they are
    like: Path  # the model as it was before, for its opset and metadata


# Takes a calibrated graph and a folder for files on the way; gives the graph to write, and what was measured.
Refine = Callable[[Calibrated, Path], tuple[Calibrated, dict[str, Json]]]


def quantize_static(
    artifact: Artifact,
    calibration: Samples,
    out: Path,
    *,
    dialect: str = "onnxruntime",
    spec: steps.Quantize = steps.Quantize(),  # noqa: B008 - frozen
    ranges_folder: Path | None = None,
    refine: Refine = lambda calibrated, _: (calibrated, {}),
    say: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Quantize weights and activations to INT8 with the ranges seen on the calibration data.

    What calibration saw is kept in `ranges_folder`, so that a second dialect or calibrator needs no second
    pass. Memory holds the activations of a few samples at a time. `refine` may change what is written,
    given a folder for models on the way (fine-tuning, mixed precision).

    Raises:
        CompressionError: nothing in the graph can be quantized, the opset is too old and cannot be
            raised, or nothing would run in INT8 on the engine of `dialect`.
        SamplesError: calibration samples that are all the same, or that make a tensor infinite.
        UsageError: no such dialect, calibrator or node to keep.
    """
    if dialect not in DIALECTS:
        raise UsageError(f"no dialect is named {dialect!r}", expected=", ".join(DIALECTS))
    calibrator_of(spec.calibrator, percentile=spec.percentile)
    refuse_weightless(artifact.path)
    check_calibration(calibration, say=say)
    arithmetic = _arithmetic_of(dialect)
    work = step.begin("quantize-static", _options(spec, dialect, calibration, arithmetic))
    with staging_folder(out) as folder:
        prepared = prepare_graph(artifact.path, folder)
        kept = kept_nodes(spec.keep, artifact.path, prepared)
        calibrated, notes = calibrate_graph(
            artifact,
            prepared,
            calibration,
            dialect=dialect,
            spec=spec,
            spared=frozenset(kept),
            ranges_folder=ranges_folder,
            say=say,
        )
        asked = calibrated.spared
        calibrated, refined = refine(calibrated, folder)
        kept.update((name, name) for name in calibrated.spared - asked)
        if spec.bias_correction:
            calibrated, corrected = _corrected(calibrated, calibration, folder, batched=artifact.batched)
            notes["biases_corrected"] = corrected
            say(f"{corrected} biases were corrected")
        staged = folder / out.name
        write_static(calibrated, staged)
        audit = audit_quantized(staged, artifact.path, dialect=dialect, kept=kept, say=say)
        measured = {**notes, **refined, **audit.measured()}
        return step.finish(work, artifact, staged, out, precision="int8", measured=measured)


def calibrate_graph(
    artifact: Artifact,
    prepared: Path,
    calibration: Samples,
    *,
    dialect: str,
    spec: steps.Quantize,
    spared: frozenset[str] = frozenset(),
    ranges_folder: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Calibrated, dict[str, Json]]:
    """Smooth the graph where asked, and find the range of each tensor; with what was noted on the way."""
    notes: dict[str, Json] = {}
    graph = onnx_model.load_model(prepared, with_weights=False).graph
    transformer = is_transformer(graph)
    kinds = TRANSFORMER_OPS if transformer else QUANTIZED_OPS
    if transformer:
        spared |= attention_products(prepared)
    if spec.smooth is not None:
        say(f"smoothing on {calibration.count} samples of {calibration.path.name}")
        prepared, smoothed = smooth_model(
            prepared, spec.smooth, calibration, batched=artifact.batched, spared=spared
        )
        notes["tensors_smoothed"] = smoothed
        graph = onnx_model.load_model(prepared, with_weights=False).graph
    wanted = {name for node in graph.node if node.op_type in kinds for name in (*node.input, *node.output)}
    key = f"{onnx_model.model_sha256(artifact.path)} {calibration.sha256} {spec.smooth} {sorted(spared)}"
    name = f"ranges-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    file = None if ranges_folder is None else ranges_folder / name
    histograms = _histograms(
        prepared, wanted & float_tensors(graph), calibration, file, batched=artifact.batched, say=say
    )
    choose = calibrator_of(spec.calibrator, percentile=spec.percentile)
    calibrated = Calibrated(
        prepared=prepared,
        ranges=ranges_of(histograms, choose),
        dialect=dialect,
        arithmetic=_arithmetic_of(dialect),
        kinds=kinds,
        spared=spared,
        like=artifact.path,
    )
    return calibrated, notes


def write_static(calibrated: Calibrated, out: Path, *, keep: frozenset[str] = frozenset()) -> None:
    """Write the quantized model; the nodes of the prepared graph named in `keep` stay in floating point."""
    model = onnx_model.load_model(calibrated.prepared)
    spared = calibrated.spared | keep
    with named_failures(calibrated.like):
        if calibrated.dialect == "tensorrt":
            model = write_tensorrt(model, calibrated.ranges, spared=spared)
        else:
            model = write_onnxruntime(
                model,
                calibrated.ranges,
                arithmetic=calibrated.arithmetic,
                kinds=calibrated.kinds,
                spared=spared,
            )
    share_weights(model.graph)
    tidy(model, onnx_model.load_model(calibrated.like, with_weights=False))
    onnx_model.save_model(model, out)


def attention_products(prepared: Path) -> frozenset[str]:
    """Names of the products of two activations."""
    graph = onnx_model.load_model(prepared, with_weights=False).graph
    constants = constants_of(graph)
    return frozenset(
        node.name for node in graph.node if node.op_type == "MatMul" and not constants & set(node.input)
    )


def _corrected(
    calibrated: Calibrated, calibration: Samples, folder: Path, *, batched: bool
) -> tuple[Calibrated, int]:
    first = folder / "uncorrected.onnx"
    write_static(calibrated, first)
    quantized = onnx_model.load_model(first)
    path, count = correct_biases(calibrated.prepared, quantized, calibration, batched=batched)
    first.unlink()
    return replace(calibrated, prepared=path), count


def _histograms(
    prepared: Path,
    names: set[str],
    calibration: Samples,
    file: Path | None,
    *,
    batched: bool,
    say: Callable[[str], None],
) -> dict[str, Histogram]:
    if file is not None and file.is_file():
        say(f"the ranges were found before, and are taken from {file}")
        return load_histograms(file)
    say(f"calibrating on {calibration.count} samples of {calibration.path.name}")
    histograms = collect_histograms(prepared, names, calibration, batched=batched, say=say)
    if file is not None:
        save_histograms(histograms, file)
    return histograms


def _arithmetic_of(dialect: str) -> Arithmetic:
    arithmetic = detect_arithmetic()
    if dialect == "tensorrt":
        return replace(arithmetic, activations="int8", reduce_range=False)
    return arithmetic


def _options(
    spec: steps.Quantize, dialect: str, calibration: Samples, arithmetic: Arithmetic
) -> dict[str, Json]:
    return {
        "dialect": dialect,
        "format": "QDQ",
        "calibrator": spec.calibrator,
        **({"percentile": spec.percentile} if spec.calibrator == "percentile" else {}),
        "calibration_sha256": calibration.sha256,
        "calibration_samples": calibration.count,
        "smooth": spec.smooth,
        "bias_correction": spec.bias_correction,
        "keep": list(spec.keep),
        "mixed": spec.mixed,
        **({"epochs": spec.epochs, "learning_rate": spec.learning_rate} if spec.epochs else {}),
        **arithmetic.options(),
    }
