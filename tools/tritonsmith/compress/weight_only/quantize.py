"""Weight-only quantization: INT4 or INT8 in blocks, for products and embedding tables.

With `arithmetic = "float"` weights lie behind a DequantizeLinear of opset 21: symmetric, a float scale for
each block along K. ONNX Runtime, OpenVINO and TensorRT read that. ONNX Runtime fuses it to MatMulNBits, as
fast as FP32, and up to twice as fast at one row. Its default computes such products in INT8 inside
(session.qdq_matmulnbits_accuracy_level 4; level 0 is exact and slower than FP32).

With `arithmetic = "int8"` weights become INT8 when a session opens, and activations are quantized as they
come: progressive group quantization (QServe, arXiv 2405.04532), 3 to 5 times as fast as FP32 with VNNI.
`bits = 8` is plain INT8 per column.

Convolutions stay as they are: ONNX Runtime would widen their weights anew in each run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from tritonsmith import onnx_model
from tritonsmith.artifact import Artifact, Json
from tritonsmith.compress import step, steps
from tritonsmith.compress.chain import Material
from tritonsmith.compress.int8.arithmetic import detect_arithmetic
from tritonsmith.compress.int8.audit import audit_int8
from tritonsmith.compress.int8.smooth import smooth_model
from tritonsmith.compress.int8.tables import share_weights
from tritonsmith.compress.names import kept_nodes
from tritonsmith.compress.norms import part_norms
from tritonsmith.compress.opset import BLOCKED_OPSET, PER_CHANNEL_OPSET
from tritonsmith.compress.prepare import prepare_graph, tidy
from tritonsmith.compress.weight_only.blocks import INT4, INT8, Grid, fit_grid, fit_progressive
from tritonsmith.compress.weight_only.compensate import compensated, second_moments
from tritonsmith.compress.weight_only.nodes import Rewriter
from tritonsmith.compress.weight_only.targets import Left, Target, find_targets, products_from_gemms
from tritonsmith.engines import open_session
from tritonsmith.errors import CompressionError, SamplesError, UsageError
from tritonsmith.files import staging_folder
from tritonsmith.ingest.targets import check_target, find_server
from tritonsmith.samples import Samples

INT4_CAST = (1, 23)  # the first ONNX Runtime whose Cast reads INT4 (probed: 1.19.2 no, 1.23.2 yes)
BLOCKS = (16, 32, 64, 128, 256)  # what MatMulNBits takes
REDUCED_LIMIT = 63  # of INT8 weights where sums of two products of 8 bits would saturate

Say = Callable[[str], None]


def apply_weights(
    spec: steps.QuantizeWeights,
    artifact: Artifact,
    material: Material,
    out: Path,
    *,
    checkpoint: Path,
    say: Say = lambda _: None,
) -> Artifact:
    """Store the weights of products and embedding tables in INT4 or INT8; with `epochs`, trained for it.

    Raises:
        CompressionError: nothing to quantize, a node in `keep` that is not there, an opset that cannot be
            raised or that the server does not read, an engine that would gain nothing.
        UsageError: bits, a block or an arithmetic that there is none of.
    """
    _check_options(spec, material)
    work = step.begin("quantize-weights", _options(spec, material))
    with staging_folder(out) as folder:
        int4_type = _reads_int4_cast(material.convert.server)
        opset = BLOCKED_OPSET if spec.arithmetic == "float" or int4_type else PER_CHANNEL_OPSET
        _check_server(material.convert.server, opset)
        prepared, kept = _prepare(spec, artifact, material, folder, opset, say)
        model = onnx_model.load_model(prepared)
        products_from_gemms(model.graph)
        targets, left = find_targets(model.graph, keep=kept, embeddings=spec.embeddings)
        _refuse_nothing(targets, left, artifact)
        _refuse_ragged(targets, spec, model, material.engine)
        grids = fit_grids(model, targets, spec)
        if spec.compensate:
            _compensate(model, targets, grids, prepared, artifact, material, say)
        measured: dict[str, Json] = {}
        if spec.epochs > 0:
            from tritonsmith.compress.weight_only.training import train_on_grids

            report = train_on_grids(model, targets, grids, spec, material, checkpoint=checkpoint, say=say)
            measured["training"] = report.measured()
        rewrite(model, targets, grids, spec, engine=material.engine, int4_type=int4_type)
        tidy(model, onnx_model.load_model(artifact.path, with_weights=False))
        check_target(model, material.convert.server)
        staged = folder / out.name
        onnx_model.save_model(model, staged)
        measured |= _measure(staged, spec, material.engine, left)
        say(f"stored {len(targets)} weights in INT{spec.bits}; {len(left)} stay as they are")
        return step.finish(work, artifact, staged, out, precision=f"int{spec.bits}", measured=measured)


def fit_grids(
    model: onnx.ModelProto, targets: Sequence[Target], spec: steps.QuantizeWeights
) -> dict[str, Grid]:
    """A grid for each weight by its name, fitted to the weight as it is."""
    limit = REDUCED_LIMIT if detect_arithmetic().reduce_range else INT8[1]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    grids = {}
    for target in targets:
        weight = numpy_helper.to_array(tensors[target.weight])
        axis = 1 if target.is_table else 0
        if spec.arithmetic == "float":
            codes = INT4 if spec.bits == 4 else INT8
            grids[target.weight] = fit_grid(weight, codes=codes, block=spec.block, axis=axis)
        elif spec.bits == 4:
            grids[target.weight] = fit_progressive(weight, block=spec.block, axis=axis, limit=limit)
        else:
            grids[target.weight] = fit_grid(
                weight, codes=(-limit, limit), block=weight.shape[axis], axis=axis
            )
    return grids


def rewrite(
    model: onnx.ModelProto,
    targets: Sequence[Target],
    grids: Mapping[str, Grid],
    spec: steps.QuantizeWeights,
    *,
    engine: str,
    int4_type: bool,
) -> None:
    """Replace the weights of `targets` by codes on their grids, and the nodes that read them."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    by_node = {node: target for target in targets for node in target.nodes}
    rewriter = Rewriter(graph=graph, int4_type=int4_type)
    for node in graph.node:
        target = by_node.get(node.name)
        if target is None:
            rewriter.nodes.append(node)
            continue
        weight, grid = numpy_helper.to_array(weights[target.weight]), grids[target.weight]
        if not target.is_table and spec.arithmetic == "int8":
            rewriter.product_of_integers(node, weight, grid)
        elif not target.is_table:
            rewriter.product_of_floats(node, weight, grid)
        elif engine == "onnxruntime":
            rewriter.lookup_of_rows(node, weight, grid)
        else:
            rewriter.lookup_of_table(node, weight, grid)
    rewriter.finish()
    share_weights(graph)
    if engine == "onnxruntime":
        part_norms(graph)


def _check_options(spec: steps.QuantizeWeights, material: Material) -> None:
    if spec.bits not in (4, 8):
        raise UsageError(f"weights of {spec.bits} bits cannot be stored", expected="bits 4 or 8")
    if spec.block not in BLOCKS:
        raise UsageError(
            f"no engine multiplies with blocks of {spec.block}",
            expected=f"a block of {', '.join(map(str, BLOCKS))}",
        )
    if spec.arithmetic not in ("float", "int8"):
        raise UsageError(f"no arithmetic is named {spec.arithmetic!r}", expected="float or int8")
    if spec.arithmetic == "int8" and material.engine != "onnxruntime":
        raise CompressionError(
            f"{material.engine} would widen INT8 products to floats in every run",
            found="quantize-weights arithmetic=int8",
            fix="use arithmetic=float, or the engine onnxruntime",
        )


def _prepare(
    spec: steps.QuantizeWeights,
    artifact: Artifact,
    material: Material,
    folder: Path,
    opset: int,
    say: Say,
) -> tuple[Path, frozenset[str]]:
    """The graph to work on, smoothed where asked, and the names in it of the nodes to keep."""
    prepared = prepare_graph(artifact.path, folder, opset=opset)
    kept = frozenset(kept_nodes(spec.keep, artifact.path, prepared))
    if spec.smooth is None:
        return prepared, kept
    calibration = _calibration(material, "smoothing")
    say(f"smoothing on {calibration.count} samples of {calibration.path.name}")
    prepared, _ = smooth_model(prepared, spec.smooth, calibration, batched=artifact.batched, spared=kept)
    return prepared, kept


def _compensate(
    model: onnx.ModelProto,
    targets: Sequence[Target],
    grids: Mapping[str, Grid],
    prepared: Path,
    artifact: Artifact,
    material: Material,
    say: Say,
) -> None:
    """Move the weights of products to where GPTQ rounds them, in place."""
    calibration = _calibration(material, "error compensation")
    names = {target.nodes[0]: target.weight for target in targets if not target.is_table}
    inputs = {names[node.name]: node.input[0] for node in model.graph.node if node.name in names}
    say(f"compensating {len(inputs)} weights on {calibration.count} samples of {calibration.path.name}")
    tapped = tuple(dict.fromkeys(inputs.values()))
    moments = second_moments(prepared, tapped, calibration, batched=artifact.batched)
    for tensor in model.graph.initializer:
        if tensor.name in inputs:
            moment, grid = moments[inputs[tensor.name]], grids[tensor.name]
            moved = compensated(numpy_helper.to_array(tensor), moment, grid)
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))


def _calibration(material: Material, purpose: str) -> Samples:
    if material.calibration is None:
        raise SamplesError(
            f"{purpose} needs calibration data, and none is made up",
            expected="some hundreds of samples like those that the model will see",
            fix=f"give calibration data, or leave {purpose} out",
        )
    return material.calibration


def _refuse_ragged(
    targets: Sequence[Target], spec: steps.QuantizeWeights, model: onnx.ModelProto, engine: str
) -> None:
    """OpenVINO reads blocks only where they divide the axis; ONNX Runtime takes a shorter last one."""
    if spec.arithmetic != "float" or engine == "onnxruntime":
        return
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for target in targets:
        length = shapes[target.weight][1 if target.is_table else 0]
        if length % spec.block:
            raise CompressionError(
                f"blocks of {spec.block} do not divide weight {target.weight!r}, and {engine} needs that",
                found=f"{length} elements along the axis of the blocks",
                expected=f"a multiple of {spec.block}",
                fix=f"take another block, or keep {', '.join(target.nodes)} as it is",
            )


def _options(spec: steps.QuantizeWeights, material: Material) -> dict[str, Json]:
    options: dict[str, Json] = {
        "bits": spec.bits,
        "block": spec.block,
        "arithmetic": spec.arithmetic,
        "embeddings": spec.embeddings,
        "engine": material.engine,
        "server": material.convert.server,
        "smooth": spec.smooth,
        "compensate": spec.compensate,
        "epochs": spec.epochs,
        "keep": list(spec.keep),
    }
    return options


def _check_server(release: str, opset: int) -> None:
    server = find_server(release)
    if server.opset < opset:
        raise CompressionError(
            f"Triton {release} (ONNX Runtime {server.onnxruntime}) reads no weights in blocks",
            found=f"opset {server.opset}",
            expected=f"opset {opset} or newer",
            fix="name a newer server, or use arithmetic=int8",
        )


def _reads_int4_cast(server: str) -> bool:
    version = find_server(server).onnxruntime.split(".")
    return (int(version[0]), int(version[1])) >= INT4_CAST


def _refuse_nothing(targets: Sequence[Target], left: Sequence[Left], artifact: Artifact) -> None:
    if targets:
        return
    raise CompressionError(
        f"{artifact.path.name} has no weight that could be stored in blocks",
        found="; ".join(map(str, left)) or "no matrix product or embedding table with a constant weight",
        expected="at least one MatMul, Gemm or Gather with a float32 weight of two axes",
        fix="quantize it with the step quantize",
    )


def _measure(staged: Path, spec: steps.QuantizeWeights, engine: str, left: Sequence[Left]) -> dict[str, Json]:
    """What the written file holds, by data type, and what of it runs in INT8; the engine opens it."""
    elements: Counter[str] = Counter()
    for tensor in onnx_model.load_model(staged, with_weights=False).graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        elements[kind] += int(np.prod(tensor.dims))
    measured: dict[str, Json] = {"elements": dict(sorted(elements.items())), "left": [str(x) for x in left]}
    if spec.arithmetic == "float":
        open_session(staged, engine=engine)
        return measured
    audit = audit_int8(staged, engine=engine)
    if audit.int8_ops == 0:
        raise CompressionError(f"{engine} would run nothing of the result in INT8", found=str(audit))
    return {**measured, **audit.measured()}
