"""FP16: weights and arithmetic in half precision, inputs and outputs as they were.

ONNX Runtime's CPU computes most of such a graph in FP32 and casts in between: there the file is half as
large, not faster, and its accuracy is a little optimistic for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from tritonsmith import onnx_model
from tritonsmith.artifact import BATCH_AXIS, Artifact, Json
from tritonsmith.compress import step, steps
from tritonsmith.compress.calibration import chunks
from tritonsmith.compress.chain import Material
from tritonsmith.compress.graph import nodes_of
from tritonsmith.compress.int8.ranges import find_ranges
from tritonsmith.compress.prepare import prepare_graph, tidy
from tritonsmith.engines.onnxruntime import engine_errors, open_onnxruntime, reason_of
from tritonsmith.errors import CompressionError, EngineError, UsageError
from tritonsmith.files import staging_folder
from tritonsmith.ingest.seeds import draw_inputs, index_ranges
from tritonsmith.samples import Samples

Inputs = Mapping[str, NDArray[Any]]

LARGEST = float(np.finfo(np.float16).max)
HEADROOM = 4.0  # a tensor that comes within this factor of the largest number stays in FP32
PROBE_BATCHES = 2  # of drawn inputs
PROBE_SAMPLES = 64  # of given ones
PROBE_LENGTH = 8  # of a free axis other than the batch, where there are no samples
FREE_BATCH = 2
# ONNX Runtime has no FP16 kernels for these, or their FP16 results are not what the graph means.
KEPT_OPS = ("QuantizeLinear", "DequantizeLinear", "RandomNormal", "RandomUniform", "Loop", "If", "Scan")


def apply_cast(
    spec: steps.Cast,
    artifact: Artifact,
    material: Material,
    out: Path,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Cast to `spec.to`, probing on the calibration data where there are any.

    Raises:
        CompressionError: as `cast_float16` and `cast_bfloat16`.
        UsageError: no such type.
    """
    if spec.to == "bf16":
        from tritonsmith.compress.bfloat16 import cast_bfloat16

        return cast_bfloat16(artifact, out, samples=material.calibration, say=say)
    if spec.to != "fp16":
        raise UsageError(f"no type is named {spec.to!r}", expected="fp16 or bf16")
    return cast_float16(artifact, out, samples=material.calibration, say=say)


def cast_float16(
    artifact: Artifact,
    out: Path,
    *,
    samples: Samples | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Artifact:
    """Cast to FP16 what stays in its range on the first of `samples`; the rest stays in FP32.

    Those are two chunks, of 32 samples at most; without samples, two draws of seeded inputs.

    The step records how many nodes stay and the largest difference from FP32, absolute and relative.

    Raises:
        CompressionError: there is nothing to cast, or the result cannot be run or is NaN.
    """
    from onnxruntime.transformers import float16

    work = step.begin("cast-float16", {"inputs_and_outputs": "unchanged", "headroom": HEADROOM})
    with staging_folder(out) as folder:
        prepared = prepare_graph(artifact.path, folder)
        original = onnx_model.load_model(artifact.path, with_weights=False)
        probes = list(draw_probes(artifact, original, samples))
        try:
            ranges = find_ranges(prepared, probes, folder)
            kept = _overflowing(onnx_model.load_model(prepared), ranges)
            if kept:
                say(f"{len(kept)} nodes leave the range of FP16 and stay in FP32")
            model = float16.convert_float_to_float16(
                str(prepared),
                keep_io_types=True,
                op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *KEPT_OPS],
                node_block_list=sorted(kept),
            )
        except _failures() as error:
            raise CompressionError(
                f"{artifact.path.name} cannot be cast to FP16", found=reason_of(error)
            ) from error
        tidy(model, original)
        staged = folder / out.name
        onnx_model.save_model(model, staged)
        halves = _count_halves(model)
        measured: dict[str, Json] = {"nodes_kept_fp32": len(kept), "fp16_weights": halves}
        if not halves:
            raise CompressionError(f"{artifact.path.name} has no FP32 weights to cast to FP16")
        measured |= compare_models(artifact.path, staged, probes, name="FP16")
        return step.finish(work, artifact, staged, out, precision="fp16", measured=measured)


def _failures() -> tuple[type[Exception], ...]:
    return (*engine_errors(), AssertionError, AttributeError, KeyError)


def draw_probes(artifact: Artifact, model: onnx.ModelProto, samples: Samples | None) -> Iterator[Inputs]:
    """Inputs for one run after another: the first of `samples`, without any of them two seeded draws."""
    if samples is not None:
        first = {name: array[:PROBE_SAMPLES] for name, array in samples.arrays.items()}
        yield from chunks(replace(samples, arrays=first, target=None), batched=artifact.batched)
        return
    free = {axis for spec in artifact.inputs for axis in spec.shape if isinstance(axis, str)}
    axes = {axis: FREE_BATCH if axis == BATCH_AXIS else PROBE_LENGTH for axis in free}
    bounds = index_ranges(model, artifact.inputs)
    for seed in range(PROBE_BATCHES):
        yield draw_inputs(artifact.inputs, axes, bounds, frozenset(), seed)


def _overflowing(model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]]) -> set[str]:
    """Names of nodes that read or write a number beyond the range of FP16, with headroom."""
    limit = LARGEST / HEADROOM
    large = {name for name, (low, high) in ranges.items() if max(-low, high) > limit}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor)
            if values.size and np.abs(values).max() > limit:
                large.add(tensor.name)
    return {node.name for node in nodes_of(model.graph) if large & {*node.input, *node.output}}


def _count_halves(model: onnx.ModelProto) -> int:
    return sum(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)


def compare_models(before: Path, after: Path, probes: list[Inputs], *, name: str) -> dict[str, Json]:
    """The largest differences of the outputs on the same inputs.

    Raises:
        CompressionError: the new model does not run, or gives NaN or infinity.
    """
    try:
        old, new = open_onnxruntime(before), open_onnxruntime(after)
        pairs = [(old.run(inputs), new.run(inputs)) for inputs in probes]
    except EngineError as error:
        raise CompressionError(f"the {name} model does not run", found=error.found) from error
    largest = relative = 0.0
    for expected, found in pairs:
        for output, array in expected.items():
            if array.dtype.kind != "f":
                continue
            if not np.isfinite(found[output]).all():
                raise CompressionError(
                    f"output {output!r} of the {name} model is NaN or infinite",
                    fix="build it with --precision fp32",
                )
            gap = float(np.abs(array - found[output]).max(initial=0.0))
            largest = max(largest, gap)
            relative = max(relative, gap / (float(np.abs(array).max(initial=0.0)) or 1.0))
    return {"max_absolute_error": largest, "max_relative_error": relative, "probes": len(probes)}
